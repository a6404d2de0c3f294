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

}  // namespace deformkit
