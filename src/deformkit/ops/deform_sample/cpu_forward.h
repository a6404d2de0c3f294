// The samples. An item of work is a block of points of a group.
#pragma once

#include "deform_sample/cpu_problem.h"
#include "sample/plane.h"

namespace deformkit::sampling {

// Plane by plane, where the field lies.
template <typename A, int N, typename Index>
void forward_in_place(const Problem<N>& problem, const Map& input, const Sink& output) {
  struct Scratch {
    Points<A, N, Index> points{block<N>};
    Buffer<A> samples{block<N>};
  };
  const int64_t blocks = problem.blocks(), group_channels = problem.group_channels();
  each(
      problem.batch * problem.groups * blocks, [] { return Scratch(); },
      [&](Scratch& scratch, int64_t item) {
        const int64_t group = item / blocks % problem.groups, b = item / blocks / problem.groups;
        const int64_t first = item % blocks * block<N>, points = std::min(block<N>, problem.points - first);
        scratch.points.read(coordinates_of<A>(problem, b, group, first), points);
        scratch.points.locate(problem, problem.whole(), points, input.position_stride, -1);
        for (int64_t c = group * group_channels; c < (group + 1) * group_channels; ++c) {
          dispatch_dtype(input.dtype(), [&]<typename T>() {
            T* const to = output.data<T>() + (b * problem.channels + c) * problem.points + first;
            A* samples = scratch.samples.get();
            if constexpr (std::is_same_v<T, A>) samples = to;
            problem.nearest ? sample_in_place<true>(scratch.points.cells, points, input.at<T>(b, c), samples)
                            : sample_in_place<false>(scratch.points.cells, points, input.at<T>(b, c), samples);
            if constexpr (!std::is_same_v<T, A>) store_run(samples, points, to);
          });
        }
      });
}

// Row by row, from a field that is laid out.
template <typename A, int N>
void forward_laid_out(const Problem<N>& problem, const Map& input, const Sink& output) {
  struct Scratch {
    Points<A, N, int32_t> points{block<N>};
    Buffer<A> columns{block<N> * slice_channels}, lines{block<N> * slice_channels};
  };
  const int64_t blocks = problem.blocks();
  for_slices<A>(problem, input, [&](const A* rows, const std::vector<Slice>& slices, const std::vector<int64_t>&) {
    each(
        static_cast<int64_t>(slices.size()) * blocks, [] { return Scratch(); },
        [&](Scratch& scratch, int64_t item) {
          const Slice& slice = slices[item / blocks];
          const int64_t first = item % blocks * block<N>, points = std::min(block<N>, problem.points - first);
          scratch.points.read(coordinates_of<A>(problem, slice.batch, slice.group, first), points);
          scratch.points.locate(problem, problem.whole(), points, slice.channels,
                                static_cast<int32_t>(problem.positions() * slice.channels));
          gather<true>(scratch.points.cells, points, 1, LaidOut<const A>{rows + slice.place}, slice.channels,
                       scratch.columns.get(), slice.channels);
          transpose(scratch.columns.get(), points, slice.channels, slice.channels, scratch.lines.get(), block<N>);
          dispatch_dtype(output.dtype(), [&]<typename T>() {
            T* const to = output.data<T>() + (slice.batch * problem.channels + slice.channel) * problem.points + first;
            for (int64_t c = 0; c < slice.channels; ++c)
              store_run(scratch.lines.get() + c * block<N>, points, to + c * problem.points);
          });
        });
  });
}

}  // namespace deformkit::sampling
