// Deformable convolution channel by channel, for a depthwise one whose channels have offsets of their own.
#pragma once

#include "deform_conv/cpu_weights.h"
#include "sample/plane.h"

namespace deformkit::conv {

// What one thread needs for the channels of a planar item.
template <typename A, int N>
struct PlanarScratch {
  Points<A, N, int32_t> points;
  Buffer<A> planes, grad_planes, lines;
};

constexpr int64_t planar_block = 512;

// Channels that share an item: as many as let their planes stay in cache, and no more than spread over the threads.
template <typename A, int N>
int64_t planar_channels(const Problem<N>& problem) {
  return std::clamp<int64_t>(mib / 4 / (count<N>(problem.size) * static_cast<int64_t>(sizeof(A))), 1, 16);
}

// Calls f(channel, begin, points, plane) for every channel and block of some samples, with the origins set.
template <typename A, int N, typename F>
void for_planes(const Call<N>& call, int64_t batch, int64_t first, int64_t last, PlanarScratch<A, N>& scratch,
                const F& f) {
  const Problem<N>& problem = call.problem;
  const int64_t pitch = count<N>(problem.size) + 1;
  const Window<N> window{problem.size, 0, problem.size[0]};
  for (int64_t c = first; c < last; ++c)
    pack(call.input, batch, c, 1, window, 0, pitch - 1, scratch.planes.get() + (c - first) * pitch);
  for (int64_t begin = 0; begin < problem.positions; begin += planar_block) {
    const int64_t points = std::min(planar_block, problem.positions - begin);
    scratch.points.start(problem, begin, points);
    for (int64_t c = first; c < last; ++c) f(c, begin, points, scratch.planes.get() + (c - first) * pitch);
  }
}

template <typename A, int N>
const A* locate(const Call<N>& call, Points<A, N, int32_t>& points, int64_t batch, int64_t group, int64_t tap,
                int64_t begin, int64_t count) {
  const Problem<N>& problem = call.problem;
  const A* const factor = points.read(problem, batch, call.offset, call.mask, group, tap, begin, count);
  points.locate(problem, {problem.size, 0, problem.size[0]}, tap, factor, count, 1,
                static_cast<int32_t>(problem.field()));
  return factor;
}

template <typename A, int N>
void forward_planar(const Call<N>& call, const std::vector<A>& bias, const Sink& output) {
  const Problem<N>& problem = call.problem;
  const int64_t field = count<N>(problem.size), width = planar_channels<A>(problem), rows = problem.group_rows();
  const int64_t items = ceil_div(problem.channels, width);
  const std::vector<A> weight = values_of<A>(call.weight);
  const auto make = [&] {
    return PlanarScratch<A, N>{
        Points<A, N, int32_t>(planar_block), Buffer<A>(width * (field + 1)), {}, Buffer<A>((rows + 1) * planar_block)};
  };
  each(problem.batch * items, make, [&](PlanarScratch<A, N>& scratch, int64_t item) {
    const int64_t first = item % items * width, last = std::min(first + width, problem.channels);
    for_planes(call, item / items, first, last, scratch, [&](int64_t c, int64_t begin, int64_t points, const A* plane) {
      const int64_t group = c / problem.channels_per_offset_group();
      A* const samples = scratch.lines.get() + rows * planar_block;
      for (int64_t r = 0; r < rows; ++r)
        std::fill_n(scratch.lines.get() + r * planar_block, points, bias.empty() ? A(0) : bias[c * rows + r]);
      for (int64_t tap = 0; tap < problem.taps; ++tap) {
        locate(call, scratch.points, item / items, group, tap, begin, points);
        sample_plane(scratch.points.cells, points, plane, samples);
        for (int64_t r = 0; r < rows; ++r) {
          const A w = weight[(c * rows + r) * problem.taps + tap];
          A* const line = scratch.lines.get() + r * planar_block;
#pragma omp simd
          for (int64_t i = 0; i < points; ++i) line[i] += w * samples[i];
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        output.write((item / items * problem.out_channels + c * rows + r) * problem.positions + begin,
                     scratch.lines.get() + r * planar_block, points);
    });
  });
}

template <typename A, int N>
void backward_planar(const Call<N>& call, const Map& grad_output, const Gradients& gradients) {
  const Problem<N>& problem = call.problem;
  const int64_t field = count<N>(problem.size), rows = problem.group_rows(), taps = problem.taps;
  const int64_t together = problem.channels_per_offset_group();
  // Channels with the same offsets stay in one item, which adds up their gradients by offset.
  const int64_t width = ceil_div(planar_channels<A>(problem), together) * together;
  const int64_t items = ceil_div(problem.channels, width), weight_size = problem.out_channels * taps;
  const int64_t sums = std::min(problem.batch, weight_shares);
  const std::vector<A> weight = values_of<A>(call.weight);
  Buffer<A> weight_sums(sums * weight_size);
  std::fill_n(weight_sums.get(), sums * weight_size, A(0));
  const auto make = [&] {
    return PlanarScratch<A, N>{Points<A, N, int32_t>(planar_block), Buffer<A>(width * (field + 1)),
                               Buffer<A>(width * (field + 1)),
                               Buffer<A>((rows + 2 + (N + 1) * (taps + 1)) * planar_block)};
  };
  each(sums * items, make, [&](PlanarScratch<A, N>& scratch, int64_t item) {
    const int64_t first = item % items * width, last = std::min(first + width, problem.channels), own = item / items;
    A* const grads = scratch.lines.get();
    A* const grad_column = grads + rows * planar_block;
    A* const samples = grad_column + planar_block;
    A* const more = samples + planar_block;
    A* const totals = more + (N + 1) * planar_block;
    const Cells<A, N, int32_t>& cells = scratch.points.cells;
    for (int64_t batch = problem.batch * own / sums; batch < problem.batch * (own + 1) / sums; ++batch) {
      if (gradients.input) std::fill_n(scratch.grad_planes.get(), (last - first) * (field + 1), A(0));
      for_planes(call, batch, first, last, scratch, [&](int64_t c, int64_t begin, int64_t points, const A* plane) {
        const int64_t group = c / together;
        A* const grad_plane = scratch.grad_planes.get() + (c - first) * (field + 1);
        for (int64_t r = 0; r < rows; ++r)
          read_run(grad_output, batch, c * rows + r, begin, points, grads + r * planar_block);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const A* factor = locate(call, scratch.points, batch, group, tap, begin, points);
          if (gradients.weight) {
            sample_plane(cells, points, plane, samples);
            for (int64_t r = 0; r < rows; ++r) {
              const A* const grad = grads + r * planar_block;
              A sum = 0;
#pragma omp simd reduction(+ : sum)
              for (int64_t i = 0; i < points; ++i) sum += grad[i] * samples[i];
              weight_sums[own * weight_size + (c * rows + r) * taps + tap] += sum;
            }
          }
          std::fill_n(grad_column, points, A(0));
          for (int64_t r = 0; r < rows; ++r) {
            const A w = weight[(c * rows + r) * taps + tap];
            const A* const grad = grads + r * planar_block;
#pragma omp simd
            for (int64_t i = 0; i < points; ++i) grad_column[i] += w * grad[i];
          }
          if (gradients.by_point()) {
            dot_plane(cells, points, plane, grad_column);
            A* const lines = c % together == 0 ? totals + tap * (N + 1) * planar_block : more;
            A* grad_shift[N];
            for (int axis = 0; axis < N; ++axis)
              grad_shift[axis] = gradients.offset ? lines + axis * planar_block : nullptr;
            cells.slopes(points, factor, grad_shift, gradients.mask ? lines + N * planar_block : nullptr);
            A* const total = totals + tap * (N + 1) * planar_block;
            if (lines == more)
              for (int64_t i = 0; i < (N + 1) * planar_block; ++i) total[i] += more[i];
            if ((c + 1) % together == 0)
              write_by_point(problem, batch, group, tap, begin, points, total, planar_block, false, gradients);
          }
          if (gradients.input) {
            scatter_plane(cells, points, grad_column, grad_plane);
          }
        }
      });
      if (gradients.input)
        for (int64_t c = first; c < last; ++c)
          gradients.input->write((batch * problem.channels + c) * field,
                                 scratch.grad_planes.get() + (c - first) * (field + 1), field);
    }
  });
  if (gradients.weight) {
    for (int64_t own = 1; own < sums; ++own)
      for (int64_t i = 0; i < weight_size; ++i) weight_sums[i] += weight_sums[own * weight_size + i];
    gradients.weight->write(0, weight_sums.get(), weight_size);
  }
}

}  // namespace deformkit::conv
