// Sampling one channel: positions, not channels, fill the registers.
#pragma once

#include "sample/sample.h"

namespace deformkit {

// Samples of one plane at the located cells.
template <typename A, int N>
void sample_plane(const Cells<A, N, int32_t>& cells, int64_t points, const A* plane, A* samples) {
  std::fill_n(samples, points, A(0));
  for (int corner = 0; corner < 1 << N; ++corner) {
    const A* const weight = cells.weight(corner);
    const int32_t* const index = cells.index(corner);
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) samples[i] += weight[i] * plane[index[i]];
  }
}

// The reverse: every sample's gradient to the corners that it was read from.
template <typename A, int N>
void scatter_plane(const Cells<A, N, int32_t>& cells, int64_t points, const A* grads, A* plane) {
  for (int corner = 0; corner < 1 << N; ++corner) {
    const A* const weight = cells.weight(corner);
    const int32_t* const index = cells.index(corner);
    // Neighbours often share a corner, and an addition would wait for the one before: take points far apart in turn.
    const int64_t streams = 16, each_stream = points / streams;
    for (int64_t i = 0; i < each_stream; ++i)
      for (int64_t p = i; p < streams * each_stream; p += each_stream) plane[index[p]] += weight[p] * grads[p];
    for (int64_t p = streams * each_stream; p < points; ++p) plane[index[p]] += weight[p] * grads[p];
  }
}

// The gradient of every sample times its corners, for Cells::slopes().
template <typename A, int N>
void dot_plane(const Cells<A, N, int32_t>& cells, int64_t points, const A* plane, const A* grads) {
  constexpr int corners = 1 << N;
  A* const dots = cells.dots();
  for (int corner = 0; corner < corners; ++corner) {
    const int32_t* const index = cells.index(corner);
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) dots[i * corners + corner] = grads[i] * plane[index[i]];
  }
}

}  // namespace deformkit
