// The sampler: from points to the cells around them, and the walk over a cell's corners. The definition is in
// reference.py: a point is base + shift, its cell base + floor(shift), its fraction shift - floor(shift).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace deformkit {

template <int N>
using Axes = std::array<int64_t, N>;

template <int N>
int64_t count(const Axes<N>& size) {
  int64_t result = 1;
  for (int64_t s : size) result *= s;
  return result;
}

// The work of sampling `channels` elements at each of some points, of which finding the cell is a part.
template <int N>
double work_of(double points, int64_t channels) {
  return points * (1 << N) * static_cast<double>(channels + 8);
}

// The work of a backward pass, which also sets a gradient of the field to 0.
inline double backward_work(double forward_work, const Tensor& field) {
  return 3 * forward_work + static_cast<double>(field.numel()) / 8;
}

// The rows [first, last) of a field of `size`, along its first axis, with the other axes whole.
template <int N>
struct Window {
  Axes<N> size;
  int64_t first, last;

  int64_t inner() const { return count<N>(size) / size[0]; }
  int64_t positions() const { return (last - first) * inner(); }
};

// origin[axis][i] = stride * o - padding for each output position o from `begin` on, `repeat` times over.
template <int N, typename Index>
void fill_origins(const Axes<N>& out_size, const Axes<N>& stride, const Axes<N>& padding, int64_t begin,
                  int64_t positions, int64_t repeat, Index* const (&origin)[N]) {
  Axes<N> at;
  int64_t rest = begin;
  for (int axis = N; axis-- > 0;) {
    at[axis] = rest % out_size[axis];
    rest /= out_size[axis];
  }
  for (int64_t i = 0; i < positions; ++i) {
    for (int axis = 0; axis < N; ++axis)
      std::fill_n(origin[axis] + i * repeat, repeat, static_cast<Index>(at[axis] * stride[axis] - padding[axis]));
    for (int axis = N; axis-- > 0;) {
      if (++at[axis] < out_size[axis] || axis == 0) break;
      at[axis] = 0;
    }
  }
}

// What counts outside of a field: nothing; its nearest end; its mirror image; or the end within one pixel, and nothing
// further away.
enum class Boundary { zeros, border, reflect, near };

// An operator's argument: its place among the names in _shape.py.
inline Boundary boundary_of(int64_t code) {
  STD_TORCH_CHECK(0 <= code && code <= 2, "boundary must be 0 (zeros), 1 (border) or 2 (reflect)");
  return static_cast<Boundary>(code);
}

// How far a shift may reach where the field is reflected: it is clamped there.
inline int64_t furthest_reflected(int64_t size) {
  return std::max(int64_t(1) << 30, 2 * size);
}

// The position of a field that one outside of it is mirrored to.
inline int64_t reflected(int64_t position, int64_t size) {
  position %= 2 * size;
  position += position < 0 ? 2 * size : 0;
  return std::min(position, 2 * size - 1 - position);
}

// Where the points of a run are looked for along one axis: in a window that is the same for all, or in one of their
// own.
template <typename Index>
struct Line {
  Index tap, size, least, past, stride;
};

template <typename Index>
struct Lines {
  const Index *size, *stride;  // of each point
  const Index* start;          // where its field starts; given for the last axis alone
};

// The cells around a run of points. A corner that does not count has the index `outside`, a row of zeros: it is never
// multiplied into what lies elsewhere, and a NaN coordinate still makes its sample NaN.
template <typename A, int N, typename Index>
class Cells {
 public:
  static constexpr int corners = 1 << N;

  // Comparisons of vectors longer than a register are compiled element by element.
#if defined(__AVX__)
  static constexpr int lanes = register_bytes / static_cast<int>(sizeof(A));
#else
  static constexpr int lanes = 16 / static_cast<int>(sizeof(A));
#endif
  typedef typename Lanes<A, lanes>::type Reals;
  typedef typename Lanes<Index, lanes>::type Indices;

  // The elements [i, i + lanes) of an array of `points`; 0 beyond its end.
  template <typename V, typename T>
  static V read_some(const T* from, int64_t i, int64_t points) {
    if (i + lanes <= points) return read_lanes<V>(from + i);
    V value{};
    std::memcpy(&value, from + i, static_cast<size_t>(points - i) * sizeof(T));
    return value;
  }

  // Whether a corner is the upper one along an axis; the last axis varies fastest.
  static constexpr bool is_upper(int corner, int axis) { return corner >> (N - 1 - axis) & 1; }

  explicit Cells(int64_t capacity)
      : capacity_(ceil_div(capacity, lanes) * lanes),
        reals_((N + 2 * corners) * capacity_),
        indices_(corners * capacity_) {}

  A* fraction(int axis) const { return reals_.get() + axis * capacity_; }
  A* weight(int corner) const { return reals_.get() + (N + corner) * capacity_; }
  Index* index(int corner) const { return indices_.get() + corner * capacity_; }

  // The points origin[axis][i] + tap[axis] + shift[axis][i], in units of grid cells. Indices are of elements in a
  // window laid out with `width` of them for each position; weights are times factor[i], if given. With `nearest` the
  // one corner that counts, the first, is at floor(point + 1/2).
  void locate(const Window<N>& window, Boundary boundary, bool nearest, int64_t points, const Index* const (&origin)[N],
              const Axes<N>& tap, const A* const (&shift)[N], const A* factor, int64_t width, Index outside);

  // The same for points that each have a field of their own among those laid out together. The nearest corner is then
  // one of the field.
  void locate(const std::array<Lines<Index>, N>& lines, Boundary boundary, bool nearest, int64_t points,
              const Index* const (&origin)[N], const A* const (&shift)[N], const A* factor, Index outside);

  // dots()[i * corners + corner]: the scalar product of a corner's row with a gradient, for slopes().
  A* dots() const { return reals_.get() + (N + corners) * capacity_; }

  // The slopes of what does not change with the point: 0, or NaN where a coordinate is.
  void no_slopes(int64_t points, A* const (&grad_shift)[N]) const {
    for (int64_t i = 0; i < points; ++i) {
      A sum = 0;
      for (int axis = 0; axis < N; ++axis) sum += fraction(axis)[i];
      for (int axis = 0; axis < N; ++axis) grad_shift[axis][i] = 0 * sum;
    }
  }

  // From the dots, d sample / d shift[axis] times factor, and the sample itself: each where it is not null.
  void slopes(int64_t points, const A* factor, A* const (&grad_shift)[N], A* sample) const {
    all_slopes<corners, 1>(points, 1, factor, grad_shift, sample);
  }

  // values()[corner * capacity + i]: what lies at the corners of one plane, for slopes_of_values(), which are then to
  // be multiplied by the sample's gradient. They lie where the dots do.
  A* values(int corner) const { return dots() + corner * capacity_; }

  void slopes_of_values(int64_t points, const A* factor, A* const (&grad_shift)[N], A* sample) const {
    all_slopes<1, 0>(points, capacity_, factor, grad_shift, sample);
  }

 private:
  // Between a lower and an upper value along one axis: their difference if it is `axis`, else the interpolation. A NaN
  // coordinate has a NaN slope, though no corner.
  template <bool differ>
  static A between(A low, A high, A part) {
    return differ ? high - low + 0 * part : sum_of_products(low, 1 - part, high, part);
  }

  // The dot of a point and corner is dots()[point * kPoint + corner * corner_step]; kCorner is that step, or 0 where it
  // is not known.
  template <int kPoint, int kCorner>
  void all_slopes(int64_t points, int64_t corner_step, const A* factor, A* const (&grad_shift)[N], A* sample) const {
    const int64_t step = kCorner > 0 ? kCorner : corner_step;
    if (grad_shift[0]) slope<0, kPoint>(points, step, factor, grad_shift[0]);
    if constexpr (N > 1) {
      if (grad_shift[0]) slope<1, kPoint>(points, step, factor, grad_shift[1]);
    }
    if constexpr (N > 2) {
      if (grad_shift[0]) slope<2, kPoint>(points, step, factor, grad_shift[2]);
    }
    if (sample) slope<N, kPoint>(points, step, nullptr, sample);
  }

  template <int axis, int kPoint>
  void slope(int64_t points, int64_t step, const A* factor, A* out) const {
    const A *const f0 = fraction(0), *const f1 = fraction(N > 1), *const f2 = fraction(N > 2 ? 2 : 0);
    const A* const d = dots();
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) {
      const A* const dot = d + i * kPoint;
      A sum;
      if constexpr (N == 1) {
        sum = between<axis == 0>(dot[0], dot[step], f0[i]);
      } else {
        const A last = N == 2 ? f1[i] : f2[i];
        const A low = between<axis == N - 1>(dot[0], dot[step], last);
        const A high = between<axis == N - 1>(dot[2 * step], dot[3 * step], last);
        sum = between<axis == N - 2>(low, high, N == 2 ? f0[i] : f1[i]);
        if constexpr (N == 3) {
          const A low2 = between<axis == 2>(dot[4 * step], dot[5 * step], last);
          const A high2 = between<axis == 2>(dot[6 * step], dot[7 * step], last);
          sum = between<axis == 0>(sum, between<axis == 1>(low2, high2, f1[i]), f0[i]);
        }
      }
      out[i] = sum;
    }
    if (!factor) return;
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) out[i] *= factor[i];
  }

  int64_t capacity_;
  Buffer<A> reals_;
  Buffer<Index> indices_;
};

}  // namespace deformkit
