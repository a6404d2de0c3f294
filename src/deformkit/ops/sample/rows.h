// Rows of sums, to and from tensors of any dtype that hold them a fixed pitch apart, or turned: as planes.
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
               int64_t own_pitch);

// The reverse.
template <typename A>
void write_rows(const Sink& out, int64_t at, int64_t pitch, const A* values, int64_t own_pitch, int64_t rows,
                int64_t width);

// Rows of `channels` elements for `points` positions of some planes, from position `from` on.
template <typename A>
void read_turned(const Map& field, int64_t batch, int64_t channel, int64_t channels, int64_t from, int64_t points,
                 A* rows);

// The reverse: rows of `channels` elements, `pitch` apart, to planes, `plane` apart, of a tensor from element `at` on.
template <typename A>
void write_turned(const A* rows, int64_t pitch, int64_t points, int64_t channels, const Sink& out, int64_t at,
                  int64_t plane, bool add);

}  // namespace deformkit
