// Sampling one channel: positions, not channels, fill the registers.
#pragma once

#include "sample/sample.h"

namespace deformkit {

// What lies at two corners that are neighbours along the last axis, in a plane of any dtype. A corner that does not
// count has a negative index, or that of a zero.
template <typename T, typename A, int N, typename Index>
__attribute__((always_inline)) inline void read_neighbours(const Cells<A, N, Index>& cells, int corner, int64_t i,
                                                           const T* plane, typename Cells<A, N, Index>::Reals& low,
                                                           typename Cells<A, N, Index>::Reals& high) {
  using Run = Cells<A, N, Index>;
  using Indices = typename Run::Indices;
  const Indices first = read_lanes<Indices>(cells.index(corner) + i),
                second = read_lanes<Indices>(cells.index(corner + 1) + i);
  if constexpr (sizeof(T) <= 4 && std::is_same_v<A, float> && sizeof(Index) == 4) {
    // Both count, and lie side by side.
    if (!any_lane(((second - first) ^ 1) | (first >> 31))) return load_pairs(plane, cells.index(corner) + i, low, high);
  }
  low = gather_lanes<typename Run::Reals>(plane, first), high = gather_lanes<typename Run::Reals>(plane, second);
}

// Samples of such a plane; with kOne from the first corner of each cell alone. With kKeep what lies at the corners
// stays in Cells::values().
template <bool kOne, bool kKeep = false, typename T, typename A, int N, typename Index>
void sample_in_place(const Cells<A, N, Index>& cells, int64_t points, const T* plane, A* samples) {
  using Run = Cells<A, N, Index>;
  using Reals = typename Run::Reals;
  for (int64_t i = 0; i < points; i += Run::lanes) {
    Reals sum{};
    if constexpr (kOne) {
      sum = read_lanes<Reals>(cells.weight(0) + i) *
            gather_lanes<Reals>(plane, read_lanes<typename Run::Indices>(cells.index(0) + i));
    } else {
#pragma GCC unroll 4
      for (int corner = 0; corner < 1 << N; corner += 2) {
        Reals low, high;
        read_neighbours(cells, corner, i, plane, low, high);
        if constexpr (kKeep)
          write_lanes(cells.values(corner) + i, low), write_lanes(cells.values(corner + 1) + i, high);
        sum += read_lanes<Reals>(cells.weight(corner) + i) * low;
        sum += read_lanes<Reals>(cells.weight(corner + 1) + i) * high;
      }
    }
    if (i + Run::lanes <= points) {
      write_lanes(samples + i, sum);
    } else {
      std::memcpy(samples + i, &sum, static_cast<size_t>(points - i) * sizeof(A));
    }
  }
}

// Adds what lies at the corners, times the gradient of the sample, to Cells::values(); sets them for the first plane.
template <bool kFirst, typename T, typename A, int N, typename Index>
void add_dots_in_place(const Cells<A, N, Index>& cells, int64_t points, const T* plane, const A* grads) {
  using Run = Cells<A, N, Index>;
  using Reals = typename Run::Reals;
  for (int64_t i = 0; i < points; i += Run::lanes) {
    const Reals grad = Run::template read_some<Reals>(grads, i, points);
#pragma GCC unroll 4
    for (int corner = 0; corner < 1 << N; corner += 2) {
      Reals value[2];
      read_neighbours(cells, corner, i, plane, value[0], value[1]);
      for (int upper = 0; upper < 2; ++upper) {
        A* const dot = cells.values(corner + upper) + i;
        const Reals product = grad * value[upper];
        write_lanes(dot, kFirst ? product : read_lanes<Reals>(dot) + product);
      }
    }
  }
}

// The reverse: every sample's gradient to the first `corners` corners that it was read from.
template <typename A, int N, typename Index>
void scatter_plane(const Cells<A, N, Index>& cells, int64_t points, const A* grads, A* plane, int corners = 1 << N) {
  using Run = Cells<A, N, Index>;
  using Reals = typename Run::Reals;
  for (int64_t i = 0; i < points; i += Run::lanes) {
    const Reals grad = Run::template read_some<Reals>(grads, i, points);
    // Corner by corner: those of neighbours seldom coincide, and an addition would wait for the one before.
    for (int corner = 0; corner < corners; ++corner) {
      const Index* const index = cells.index(corner) + i;
      A amount[Run::lanes];
      write_lanes(amount, read_lanes<Reals>(cells.weight(corner) + i) * grad);
      if (i + Run::lanes <= points) {
#pragma GCC unroll 16
        for (int lane = 0; lane < Run::lanes; ++lane) plane[index[lane]] += amount[lane];
      } else {
        for (int64_t lane = 0; lane < points - i; ++lane) plane[index[lane]] += amount[lane];
      }
    }
  }
}

}  // namespace deformkit
