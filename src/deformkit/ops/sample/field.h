// A field as the kernels hold it: the channels of one position side by side, so that a corner is one contiguous row;
// and the two walks over the corners of located points, one to sample and one for the gradients.
#pragma once

#include "cpu/lanes.h"
#include "sample/rows.h"
#include "sample/sample.h"

namespace deformkit {

// Rows of `channels` elements for the positions [begin, end) of the window; after its last, one row of zeros for what
// lies outside.
template <typename A, int N>
void pack(const Map& field, int64_t batch, int64_t channel, int64_t channels, const Window<N>& window, int64_t begin,
          int64_t end, A* rows) {
  read_turned(field, batch, channel, channels, window.first * window.inner() + begin, end - begin,
              rows + begin * channels);
  if (end == window.positions()) std::fill_n(rows + end * channels, channels, A(0));
}

// Stores rows laid out as by pack() in `out`, [channels, field positions] from element `at` on, or adds them to it.
template <typename A, int N>
void unpack(const A* rows, int64_t channels, const Window<N>& window, const Sink& out, int64_t at, bool add) {
  write_turned(rows, channels, window.positions(), channels, out, at + window.first * window.inner(),
               count<N>(window.size), add);
}

// For a field too large to lay out: the corners of these points alone, one channel, as a field of their own. The cells
// then point into it; `where` keeps the places that they pointed to, -1 for outside.
template <typename A, int N>
void compact(const Map& field, int64_t batch, int64_t channel, int64_t points, const Cells<A, N, int64_t>& cells,
             int64_t* where, A* rows) {
  constexpr int corners = 1 << N;
  dispatch_dtype(field.dtype(), [&]<typename T>() {
    const T* plane = field.at<T>(batch, channel);
    for (int corner = 0; corner < corners; ++corner) {
      for (int64_t i = 0; i < points; ++i) {
        int64_t& index = cells.index(corner)[i];
        const int64_t own = i * corners + corner;
        where[own] = index;
        rows[own] = index < 0 ? A(0) : load<A>(plane[index * field.position_stride]);
        index = own;
      }
    }
  });
}

// How a field is held. Laid out by pack(), it has a row of zeros among its rows for what lies outside. Read where it
// is, in the tensor, the row for what lies outside is apart: corners there have a negative index. A field is `far` if
// it exceeds a core's caches, or has other rows between its own: its rows are asked for before they are read.
template <typename T>
struct LaidOut {
  static constexpr bool in_place = false;
  using Element = T;
  T* first = nullptr;
  bool far = false;

  T* row(int64_t index) const { return first + index; }
  LaidOut from(int64_t element) const { return {first + element, far}; }
  explicit operator bool() const { return first; }
};

template <typename T>
struct InPlace {
  static constexpr bool in_place = true, far = true;
  using Element = T;
  T *first = nullptr, *outside = nullptr;

  T* row(int64_t index) const { return index < 0 ? outside : first + index; }
  InPlace from(int64_t element) const { return {first + element, outside + element}; }
  explicit operator bool() const { return first; }
};

template <typename A, typename Index>
constexpr bool is_usual = std::is_same_v<A, float> && std::is_same_v<Index, int32_t>;

// columns[j * pitch ...] = the sum of the samples at the points [j * per, (j + 1) * per), of `channels` channels. With
// kOne, per is 1. U is A, or BFloat16 if the processor multiplies pairs of it.
template <bool kOne, typename A, int N, typename Index, typename Field, typename U>
void gather(const Cells<A, N, Index>& cells, int64_t sums, int64_t per, const Field& field, int64_t channels,
            U* columns, int64_t pitch);

// What walk() is asked for; a null pointer asks for nothing. kHeld is LaidOut or InPlace, of elements T.
template <typename A, int N, template <typename> typename kHeld, typename T = A>
struct Walk {
  kHeld<const T> field;
  kHeld<A> grad_field;    // += gradient by the field
  const A* grad_columns;  // gradient of the loss by the sums of `per` samples, `pitch` apart
  A* columns;             // the sums of samples
  A* grad_shift[N];       // gradient by the shift
  A* grad_factor;         // gradient by the factor
  int64_t pitch, channels, per = 1;

  bool by_point() const { return grad_shift[0] || grad_factor; }
};

// The one backward walk over the corners: sums of samples again, and the gradient by field, point and factor.
// `factor` is the one that the cells were located with. The gradient by the factor does not depend on it: where that is
// all, cells without a factor are faster.
template <typename A, int N, typename Index, template <typename> typename kHeld, typename T>
void walk(const Cells<A, N, Index>& cells, int64_t points, const A* factor, const Walk<A, N, kHeld, T>& w);

}  // namespace deformkit
