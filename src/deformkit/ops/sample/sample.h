// The sampler: from points to the cells around them, and the walk over a cell's corners. The definition is in
// reference.py: a point is base + shift, its cell base + floor(shift), its fraction shift - floor(shift).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

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

// The share of a corner along one axis.
template <bool upper, typename A>
inline A side(A fraction) {
  return upper ? fraction : 1 - fraction;
}

// The rows [first, last) of a field of `size`, along its first axis, with the other axes whole.
template <int N>
struct Window {
  Axes<N> size;
  int64_t first, last;

  int64_t inner() const { return count<N>(size) / size[0]; }
  int64_t positions() const { return (last - first) * inner(); }
};

// The cells around a run of points. A corner that does not count has the index `outside`, a row of zeros: it is never
// multiplied into what lies elsewhere, and a NaN coordinate still makes its sample NaN.
template <typename A, int N, typename Index>
class Cells {
 public:
  static constexpr int corners = 1 << N;

  // Whether a corner is the upper one along an axis; the last axis varies fastest.
  static constexpr bool is_upper(int corner, int axis) { return corner >> (N - 1 - axis) & 1; }

  explicit Cells(int64_t capacity)
      : capacity_(capacity), reals_((N + 2 * corners) * capacity), indices_((2 * N + corners) * capacity) {}

  A* fraction(int axis) const { return reals_.get() + axis * capacity_; }
  A* weight(int corner) const { return reals_.get() + (N + corner) * capacity_; }
  Index* index(int corner) const { return indices_.get() + corner * capacity_; }

  // The points origin[axis][i] + tap[axis] + shift[axis][i], in units of grid cells. Indices are of elements in a
  // window laid out with `width` of them for each position; weights are times factor[i], if given.
  void locate(const Window<N>& window, bool border, int64_t points, const Index* const (&origin)[N], const Axes<N>& tap,
              const A* const (&shift)[N], const A* factor, int64_t width, Index outside) {
    int64_t step = window.positions() / (window.last - window.first) * width;
    for (int axis = 0; axis < N; ++axis) {
      if (axis > 0) step /= window.size[axis];
      const Line line{origin[axis],
                      shift[axis],
                      static_cast<Index>(tap[axis]),
                      static_cast<Index>(window.size[axis]),
                      static_cast<Index>(axis == 0 ? window.first : 0),
                      static_cast<Index>(axis == 0 ? window.last : window.size[axis]),
                      static_cast<Index>(step)};
      if (border) {
        locate_axis<true>(axis, points, line);
      } else {
        locate_axis<false>(axis, points, line);
      }
    }
    weigh(std::make_integer_sequence<int, corners>{}, points, outside);
    if (!factor) return;
    for (int corner = 0; corner < corners; ++corner) {
      A* const w = weight(corner);
      const Index* const at = index(corner);
      // An infinite factor stays away from what is outside.
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) w[i] *= at[i] == outside ? A(0) : factor[i];
    }
  }

  // dots()[i * corners + corner]: the scalar product of a corner's row with a gradient, for slopes().
  A* dots() const { return reals_.get() + (N + corners) * capacity_; }

  // From the dots, d sample / d shift[axis] times factor, and the sample itself: each where it is not null.
  void slopes(int64_t points, const A* factor, A* const (&grad_shift)[N], A* sample) const {
    if (grad_shift[0]) slope<0>(points, factor, grad_shift[0]);
    if constexpr (N > 1) {
      if (grad_shift[0]) slope<1>(points, factor, grad_shift[1]);
    }
    if constexpr (N > 2) {
      if (grad_shift[0]) slope<2>(points, factor, grad_shift[2]);
    }
    if (sample) slope<N>(points, nullptr, sample);
  }

 private:
  // One axis of locate(): where a cell may lie and how far apart its indices are.
  struct Line {
    const Index* origin;
    const A* shift;
    Index tap, size, least, past, stride;
  };

  template <bool kBorder>
  void locate_axis(int axis, int64_t points, const Line& line) {
    constexpr Index nowhere = std::numeric_limits<Index>::min() / 4;
    constexpr A far = sizeof(Index) == 4 ? A(1 << 30) : A(int64_t(1) << 40);
    const Index* const origin = line.origin;
    const A* const shift = line.shift;
    const Index tap = line.tap, most = line.size - 1, least = line.least, past = line.past, stride = line.stride;
    A* const part = fraction(axis);
    Index *const below = lower(axis), *const above = upper(axis);
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) {
      const A s = shift[i];
      const bool number = s == s;
      const A distance = std::min(std::max(number ? s : A(0), -far), far);
      const A whole = std::floor(distance);
      part[i] = number ? distance - whole : s;
      Index low = origin[i] + tap + static_cast<Index>(whole), high = low + 1;
      if constexpr (kBorder) {
        low = std::min(std::max(low, Index(0)), most);
        high = std::min(std::max(high, Index(0)), most);
      }
      below[i] = number & (low >= least) & (low < past) ? (low - least) * stride : nowhere;
      above[i] = number & (high >= least) & (high < past) ? (high - least) * stride : nowhere;
    }
  }

  template <int... all>
  void weigh(std::integer_sequence<int, all...>, int64_t points, Index outside) {
    (weigh_corner<all>(points, outside), ...);
  }

  template <int corner>
  void weigh_corner(int64_t points, Index outside) {
    // Axes that are not there repeat the first.
    constexpr bool up0 = is_upper(corner, 0), up1 = is_upper(corner, N > 1), up2 = is_upper(corner, N > 2 ? 2 : 0);
    const A *const f0 = fraction(0), *const f1 = fraction(N > 1), *const f2 = fraction(N > 2 ? 2 : 0);
    const Index* const s0 = up0 ? upper(0) : lower(0);
    const Index* const s1 = up1 ? upper(N > 1) : lower(N > 1);
    const Index* const s2 = up2 ? upper(N > 2 ? 2 : 0) : lower(N > 2 ? 2 : 0);
    A* const w = weight(corner);
    Index* const at = index(corner);
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) {
      A product = side<up0>(f0[i]);
      Index sum = s0[i];
      if constexpr (N > 1) product *= side<up1>(f1[i]), sum += s1[i];
      if constexpr (N > 2) product *= side<up2>(f2[i]), sum += s2[i];
      w[i] = product * (sum < 0 ? A(0) : A(1));
      at[i] = sum < 0 ? outside : sum;
    }
  }

  // Between a lower and an upper value along one axis: their difference if it is `axis`, else the interpolation. A NaN
  // coordinate has a NaN slope, though no corner.
  template <bool differ>
  static A between(A low, A high, A part) {
    return differ ? high - low + 0 * part : low * (1 - part) + high * part;
  }

  template <int axis>
  void slope(int64_t points, const A* factor, A* out) const {
    const A *const f0 = fraction(0), *const f1 = fraction(N > 1), *const f2 = fraction(N > 2 ? 2 : 0);
    const A* const d = dots();
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) {
      const A* const dot = d + i * corners;
      A sum;
      if constexpr (N == 1) {
        sum = between<axis == 0>(dot[0], dot[1], f0[i]);
      } else {
        const A last = N == 2 ? f1[i] : f2[i];
        const A low = between<axis == N - 1>(dot[0], dot[1], last), high = between<axis == N - 1>(dot[2], dot[3], last);
        sum = between<axis == N - 2>(low, high, N == 2 ? f0[i] : f1[i]);
        if constexpr (N == 3) {
          const A low2 = between<axis == 2>(dot[4], dot[5], last), high2 = between<axis == 2>(dot[6], dot[7], last);
          sum = between<axis == 0>(sum, between<axis == 1>(low2, high2, f1[i]), f0[i]);
        }
      }
      out[i] = sum;
    }
    if (!factor) return;
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) out[i] *= factor[i];
  }

  Index* lower(int axis) const { return indices_.get() + (corners + axis) * capacity_; }
  Index* upper(int axis) const { return indices_.get() + (corners + N + axis) * capacity_; }

  int64_t capacity_;
  Buffer<A> reals_;
  Buffer<Index> indices_;
};

}  // namespace deformkit
