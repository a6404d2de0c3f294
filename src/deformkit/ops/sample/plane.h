// Sampling one channel: positions, not channels, fill the registers.
#pragma once

#include "sample/sample.h"

namespace deformkit {

// Samples of one plane at the located cells; what lies at their corners stays in Cells::values().
template <typename A, int N>
void sample_plane(const Cells<A, N, int32_t>& cells, int64_t points, const A* plane, A* samples) {
  for (int corner = 0; corner < 1 << N; ++corner) {
    const A* const weight = cells.weight(corner);
    const int32_t* const index = cells.index(corner);
    A* const values = cells.values(corner);
    if (corner == 0) std::fill_n(samples, points, A(0));
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) {
      values[i] = plane[index[i]];
      samples[i] += weight[i] * values[i];
    }
  }
}

// The corners of the cells: weights, indices, and what is kept of each.
template <typename A, int N, typename Index>
struct Corners {
  const A* weight[1 << N];
  const Index* index[1 << N];
  A* values[1 << N];

  explicit Corners(const Cells<A, N, Index>& cells) {
    for (int corner = 0; corner < 1 << N; ++corner)
      weight[corner] = cells.weight(corner), index[corner] = cells.index(corner), values[corner] = cells.values(corner);
  }
};

// An element of a plane where it lies; one outside of it has a negative index, and reads the first instead.
template <typename A, typename T, typename Index>
inline A element_of(const T* plane, Index index) {
  const A value = load<A>(plane[index < 0 ? 0 : index]);
  return index < 0 ? A(0) : value;
}

// Samples of one plane where it lies, from the first kCorners corners of each cell.
template <int kCorners, typename T, typename A, int N, typename Index>
void sample_in_place(const Cells<A, N, Index>& cells, int64_t points, const T* plane, A* samples) {
  const Corners<A, N, Index> of(cells);
#pragma omp simd
  for (int64_t i = 0; i < points; ++i) {
    A sum = 0;
#pragma GCC unroll 8
    for (int corner = 0; corner < kCorners; ++corner)
      sum += of.weight[corner][i] * element_of<A>(plane, of.index[corner][i]);
    samples[i] = sum;
  }
}

// Adds what lies at the corners, times the gradient of the sample, to Cells::values().
template <typename T, typename A, int N, typename Index>
void add_dots_in_place(const Cells<A, N, Index>& cells, int64_t points, const T* plane, const A* grads) {
  const Corners<A, N, Index> of(cells);
#pragma omp simd
  for (int64_t i = 0; i < points; ++i) {
#pragma GCC unroll 8
    for (int corner = 0; corner < 1 << N; ++corner)
      of.values[corner][i] += grads[i] * element_of<A>(plane, of.index[corner][i]);
  }
}

// The reverse: every sample's gradient to the first `corners` corners that it was read from.
template <typename A, int N, typename Index>
void scatter_plane(const Cells<A, N, Index>& cells, int64_t points, const A* grads, A* plane, int corners = 1 << N) {
  for (int corner = 0; corner < corners; ++corner) {
    const A* const weight = cells.weight(corner);
    const Index* const index = cells.index(corner);
    // Neighbours often share a corner, and an addition would wait for the one before: take points far apart in turn.
    const int64_t streams = 16, each_stream = points / streams;
    for (int64_t i = 0; i < each_stream; ++i)
      for (int64_t p = i; p < streams * each_stream; p += each_stream) plane[index[p]] += weight[p] * grads[p];
    for (int64_t p = streams * each_stream; p < points; ++p) plane[index[p]] += weight[p] * grads[p];
  }
}

}  // namespace deformkit
