// Rows of sums, to and from tensors of any dtype that hold them a fixed pitch apart, or turned: as planes.
#pragma once

#include <algorithm>

#include "cpu/lanes.h"

namespace deformkit {

// Rows far apart escape the hardware's prefetching; so do those that the caller will ask for next. A core waits for
// more lines of its second-level cache than of its first, so rows that are read are asked for far ahead, there. `python
// benchmarks/run.py attn aggregate layers` measures other values.
constexpr int64_t rows_ahead = 48, written_ahead = 16;
template <typename T>
constexpr int64_t line = 64 / sizeof(T);

// Prefetches a row that is used later and begins where a line does; always inlined, as ask_for_run() is. With kFar no
// nearer than into a core's second-level cache.
template <bool kWritten = false, bool kFar = false, typename T>
__attribute__((always_inline)) inline void ask_for_lines(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += line<T>) __builtin_prefetch(row + i, kWritten, kFar ? 2 : 3);
}

// The same for a row that may begin anywhere, and so end a line later.
template <bool kWritten = false, bool kFar = false, typename T>
__attribute__((always_inline)) inline void ask_for_row(const T* row, int64_t width) {
  ask_for_lines<kWritten, kFar>(row, width);
  ask_for_lines<kWritten, kFar>(row + width - 1, 1);
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
