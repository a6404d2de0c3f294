// The sampler: from points to the cells around them, and the walk over a cell's corners. The definition is in
// reference.py: a point is base + shift, its cell base + floor(shift), its fraction shift - floor(shift).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

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

  explicit Cells(int64_t capacity)
      : capacity_(capacity), reals_((N + corners) * capacity), indices_((2 * N + corners) * capacity) {}

  A* fraction(int axis) const { return reals_.get() + axis * capacity_; }
  A* weight(int corner) const { return reals_.get() + (N + corner) * capacity_; }
  Index* index(int corner) const { return indices_.get() + corner * capacity_; }

  // base[axis][i] + shift[axis][i] in units of grid cells; rows of the window are counted from its first.
  void locate(const Window<N>& window, bool border, int64_t points, const Index* const (&origin)[N], const Axes<N>& tap,
              const A* const (&shift)[N], Index outside) {
    constexpr Index nowhere = std::numeric_limits<Index>::min() / 4;
    constexpr A far = sizeof(Index) == 4 ? A(1 << 30) : A(int64_t(1) << 40);
    int64_t step = window.positions() / (window.last - window.first);
    for (int axis = 0; axis < N; ++axis) {
      const Index size = static_cast<Index>(window.size[axis]);
      if (axis > 0) step /= size;
      const Index stride = static_cast<Index>(step);
      const Index least = axis == 0 ? static_cast<Index>(window.first) : 0;
      const Index past = axis == 0 ? static_cast<Index>(window.last) : size;
      const Index add = static_cast<Index>(tap[axis]);
      const Index* const from = origin[axis];
      const A* const by = shift[axis];
      A* const part = fraction(axis);
      Index* const below = lower(axis);
      Index* const above = upper(axis);
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) {
        const A s = by[i];
        const bool number = s == s;
        A distance = number ? s : A(0);
        distance = distance < -far ? -far : (distance > far ? far : distance);
        const A whole = std::floor(distance);
        part[i] = number ? distance - whole : s;
        const Index cell = from[i] + add + static_cast<Index>(whole);
        Index low = cell, high = cell + 1;
        if (border) {
          low = low < 0 ? 0 : (low >= size ? size - 1 : low);
          high = high < 0 ? 0 : (high >= size ? size - 1 : high);
        }
        below[i] = (number & (low >= least) & (low < past)) ? (low - least) * stride : nowhere;
        above[i] = (number & (high >= least) & (high < past)) ? (high - least) * stride : nowhere;
      }
    }
    for (int corner = 0; corner < corners; ++corner) {
      A* const w = weight(corner);
      Index* const at = index(corner);
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) {
        A product = 1;
        Index sum = 0;
        for (int axis = 0; axis < N; ++axis) {
          const A part = reals_.get()[axis * capacity_ + i];
          const bool high = corner >> (N - 1 - axis) & 1;
          product *= high ? part : 1 - part;
          sum += indices_.get()[(corners + (high ? N : 0) + axis) * capacity_ + i];
        }
        w[i] = product;
        at[i] = sum < 0 ? outside : sum;
      }
    }
  }

  // d sample / d shift[axis], from the scalar products of the corners' rows with one gradient.
  A slope(int axis, int64_t i, const A (&dots)[corners]) const {
    A sum = 0;
    for (int corner = 0; corner < corners; ++corner) {
      A factor = corner >> (N - 1 - axis) & 1 ? dots[corner] : -dots[corner];
      for (int other = 0; other < N; ++other) {
        const A part = fraction(other)[i];
        if (other != axis) factor *= corner >> (N - 1 - other) & 1 ? part : 1 - part;
      }
      sum += factor;
    }
    return sum;
  }

 private:
  Index* lower(int axis) const { return indices_.get() + (corners + axis) * capacity_; }
  Index* upper(int axis) const { return indices_.get() + (corners + N + axis) * capacity_; }

  int64_t capacity_;
  Buffer<A> reals_;
  Buffer<Index> indices_;
};

}  // namespace deformkit
