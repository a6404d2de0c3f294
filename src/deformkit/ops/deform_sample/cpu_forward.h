// The samples. An item of work is a block of points of a group.
#pragma once

#include "deform_sample/cpu_problem.h"
#include "sample/inner.h"
#include "sample/plane.h"

namespace deformkit::sampling {

// Plane by plane, where the field lies.
template <typename A, int N, typename Index>
class ForwardInPlace {
 public:
  ForwardInPlace(const Problem<N>& problem, const Map& input, const Sink& output)
      : problem_(problem), input_(input), output_(output) {}

  void run() const {
    for_blocks<Scratch, A>(problem_, [&](Scratch& scratch, int64_t b, int64_t group, int64_t first, int64_t points) {
      if constexpr (is_usual<A, Index>) {
        if (problem_.is_in_registers(input_))
          return dispatch_summed_as<float>(input_.dtype(),
                                           [&]<typename T>() { by_registers<T>(scratch, b, group, first, points); });
      }
      by_planes(scratch, b, group, first, points);
    });
  }

 private:
  struct Scratch {
    Points<A, N, Index> points{block<N>};
    Buffer<A> samples{block<N>};
  };
  using Run = Cells<A, N, Index>;

  template <typename T>
  T* place(int64_t b, int64_t channel, int64_t point) const {
    return output_.data<T>() + (b * problem_.channels + channel) * problem_.points + point;
  }

  void by_planes(Scratch& scratch, int64_t b, int64_t group, int64_t first, int64_t points) const {
    const int64_t group_channels = problem_.group_channels();
    scratch.points.locate(problem_, problem_.whole(), points, input_.position_stride, -1);
    for (int64_t c = group * group_channels; c < (group + 1) * group_channels; ++c)
      dispatch_dtype(input_.dtype(), [&]<typename T>() { sample_plane<T>(scratch, b, c, first, points); });
  }

  // The points that are located, which follow one another from `first` on.
  template <typename T>
  void sample_plane(Scratch& scratch, int64_t b, int64_t channel, int64_t first, int64_t points) const {
    T* const to = place<T>(b, channel, first);
    A* samples = scratch.samples.get();
    if constexpr (std::is_same_v<T, A>) samples = to;
    problem_.nearest ? sample_in_place<true>(scratch.points.cells, points, input_.at<T>(b, channel), samples)
                     : sample_in_place<false>(scratch.points.cells, points, input_.at<T>(b, channel), samples);
    if constexpr (!std::is_same_v<T, A>) store_run(samples, points, to);
  }

  // A register of points at a time: at all of them some planes are sampled, then the next planes.
  template <typename T>
  void by_registers(Scratch& scratch, int64_t b, int64_t group, int64_t first, int64_t points) const {
    using Reals = typename Run::Reals;
    const int64_t begin = group * problem_.group_channels(), end = begin + problem_.group_channels();
    const InnerField<N> field(problem_.size, problem_.boundary);
    InnerCells<N> found[block<N> / Run::lanes];
    int64_t place_of[block<N> / Run::lanes], registers = 0;
    for (int64_t i = 0; i < points; i += Run::lanes) {
      const int64_t some = std::min<int64_t>(Run::lanes, points - i);
      Reals shift[N];
      for (int axis = 0; axis < N; ++axis) shift[axis] = read_lanes<Reals>(scratch.points.shift(axis) + i);
      if (some == Run::lanes && found[registers].find(field, shift)) {
        place_of[registers++] = first + i;
        continue;
      }
      scratch.points.locate(problem_, problem_.whole(), some, 1, -1, i);
      for (int64_t c = begin; c < end; ++c) sample_plane<T>(scratch, b, c, first + i, some);
    }
    for (int64_t c = begin; c < end; c += planes_together)
      for (int64_t r = 0; r < registers; ++r) {
        T* const to = place<T>(b, c, place_of[r]);
        found[r].sample(input_.at<T>(b, c), input_.channel_stride, std::min(planes_together, end - c),
                        [&](int64_t i, const Reals& samples) { store_lanes(to + i * problem_.points, samples); });
      }
  }

  const Problem<N>& problem_;
  const Map& input_;
  const Sink& output_;
};

// Row by row, from a field that is laid out.
template <typename A, int N>
void forward_laid_out(const Problem<N>& problem, const Map& input, const Sink& output) {
  struct Scratch {
    Points<A, N, int32_t> points{block<N>};
    Buffer<A> columns{block<N> * slice_channels};
  };
  const int64_t blocks = problem.blocks();
  for_slices<A>(problem, input, [&](const A* rows, const std::vector<Slice>& slices, const std::vector<int64_t>&) {
    each_in_runs(
        static_cast<int64_t>(slices.size()) * blocks, [] { return Scratch(); },
        [&](Scratch& scratch, int64_t item) {
          const Slice& slice = slices[item / blocks];
          const int64_t first = item % blocks * block<N>, points = std::min(block<N>, problem.points - first);
          scratch.points.read(coordinates_of<A>(problem, slice.batch * problem.groups + slice.group, first), points);
          scratch.points.locate(problem, problem.whole(), points, slice.channels,
                                static_cast<int32_t>(problem.positions() * slice.channels));
          gather<true>(scratch.points.cells, points, 1, slice.field(problem, rows), slice.channels,
                       scratch.columns.get(), slice.channels);
          write_turned(scratch.columns.get(), slice.channels, points, slice.channels, output,
                       (slice.batch * problem.channels + slice.channel) * problem.points + first, problem.points,
                       false);
        });
  });
}

}  // namespace deformkit::sampling
