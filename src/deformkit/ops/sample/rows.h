// Rows of a tensor of any dtype, which start a fixed pitch apart, to and from rows of sums.
#pragma once

#include <algorithm>

#include "cpu/lanes.h"

namespace deformkit {

// to[0 ... count) = from[0 ... count), as A.
template <typename A, typename T>
inline void load_run(const T* from, int64_t count, A* to) {
  constexpr int lanes = register_bytes / static_cast<int>(sizeof(A));
  typedef typename Lanes<A, lanes>::type V;
  typedef typename Lanes<A, lanes / 2>::type Short;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) write_lanes(to + i, load_lanes<V>(from + i));
  if (i + lanes / 2 <= count) write_lanes(to + i, load_lanes<Short>(from + i)), i += lanes / 2;
  for (; i < count; ++i) to[i] = load<A>(from[i]);
}

// The reverse, rounded to T.
template <typename T, typename A>
inline void store_run(const A* from, int64_t count, T* to) {
  constexpr int lanes = register_bytes / static_cast<int>(sizeof(A));
  typedef typename Lanes<A, lanes>::type V;
  typedef typename Lanes<A, lanes / 2>::type Short;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_lanes(to + i, read_lanes<V>(from + i));
  if (i + lanes / 2 <= count) store_lanes(to + i, read_lanes<Short>(from + i)), i += lanes / 2;
  for (; i < count; ++i) to[i] = store<T>(from[i]);
}

// Rows far apart escape the hardware's prefetching; so do those that the caller will ask for next.
constexpr int64_t rows_ahead = 16;
template <typename T>
constexpr int64_t line = 64 / sizeof(T);

// Prefetches a row that is used later; always inlined, as ask_for_run() is.
template <bool kWritten = false, typename T>
__attribute__((always_inline)) inline void ask_for_row(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += line<T>) __builtin_prefetch(row + i, kWritten);
}

// `rows` runs of `width` elements from element `at` on, `pitch` apart, into rows of `own_pitch`; zeros fill what is
// left of those.
template <typename A>
void read_rows(const Tensor& tensor, int64_t at, int64_t pitch, int64_t rows, int64_t width, A* values,
               int64_t own_pitch) {
  dispatch_dtype(tensor.scalar_type(), [&]<typename T>() {
    const T* source = static_cast<const T*>(tensor.data_ptr()) + at;
    for (int64_t r = 0; r < rows; ++r, source += pitch, values += own_pitch) {
      ask_for_row(source + rows_ahead * pitch, width);
      load_run(source, width, values);
      std::fill(values + width, values + own_pitch, A(0));
    }
  });
}

// The reverse.
template <typename A>
void write_rows(const Sink& out, int64_t at, int64_t pitch, const A* values, int64_t own_pitch, int64_t rows,
                int64_t width) {
  dispatch_dtype(out.dtype(), [&]<typename T>() {
    T* to = out.data<T>() + at;
    for (int64_t r = 0; r < rows; ++r, to += pitch, values += own_pitch) {
      ask_for_row<true>(to + rows_ahead * pitch, width);
      store_run(values, width, to);
    }
  });
}

}  // namespace deformkit
