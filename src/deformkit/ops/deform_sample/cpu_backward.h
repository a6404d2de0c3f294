// The gradients of sampling: by the points, an item of work for each block of points; by the field, an item for each
// window of some channels, which it owns.
#pragma once

#include "deform_sample/cpu_windows.h"
#include "sample/inner.h"
#include "sample/plane.h"

namespace deformkit::sampling {

// The part of a block's points from which on the whole block is added to a window: to read those points one by one
// takes longer than to add the others to nothing. `python benchmarks/run.py sample --case 3d` measures other values.
constexpr double most_of_a_block = 0.6;

// What a thread holds of a block of points: they, located, and their slopes along each axis.
template <typename A, int N, typename Index>
struct PointScratch {
  Points<A, N, Index> points{block<N>};
  Buffer<A> lines{N * block<N>};
  A* slopes[N];

  PointScratch() {
    for (int axis = 0; axis < N; ++axis) slopes[axis] = lines.get() + axis * block<N>;
  }

  // Writes the slopes of a run of points side by side, or adds them to what is there.
  void write(const Problem<N>& problem, int64_t b, int64_t group, int64_t first, int64_t count, bool add,
             const Sink& grad_points) const {
    A* const to = grad_points.data<A>() + ((b * problem.groups + group) * problem.points + first) * N;
    const A* from[N];
    std::copy_n(slopes, N, from);
    if (add) {
      for (int64_t i = 0; i < count; ++i)
        for (int axis = 0; axis < N; ++axis) to[i * N + axis] += from[axis][i];
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int axis = 0; axis < N; ++axis) to[i * N + axis] = from[axis][i];
    }
  }
};

// By the points, where the field lies.
template <typename A, int N, typename Index>
class PointsInPlace {
  using Run = Cells<A, N, Index>;

 public:
  struct Scratch : PointScratch<A, N, Index> {
    Buffer<A> grads{block<N>};
  };

  PointsInPlace(const Problem<N>& problem, const Map& input, const Tensor& grad_output)
      : problem_(problem), input_(input), grad_(grad_output) {}

  void run(const Sink& grad_points) const {
    for_blocks<Scratch, A>(problem_, [&](Scratch& scratch, int64_t b, int64_t group, int64_t first, int64_t points) {
      slopes_of(scratch, b, group * problem_.group_channels(), first, points);
      scratch.write(problem_, b, group, first, points, false, grad_points);
    });
  }

  // All channels of a register of points, before the next points: their slopes, if asked for; then also(cells, i, some)
  // is called for `some` points from i on, with null in place of the cells where these are not inner ones.
  template <typename T, typename F>
  void by_registers(Scratch& scratch, int64_t b, int64_t channel, int64_t first, int64_t points, bool asked,
                    const F& also) const {
    using Reals = typename Run::Reals;
    const InnerField<N> field(problem_.size, problem_.boundary);
    InnerCells<N> inner;
    for (int64_t i = 0; i < points; i += Run::lanes) {
      const int64_t some = std::min<int64_t>(Run::lanes, points - i);
      Reals shift[N], slopes[N];
      for (int axis = 0; axis < N; ++axis) shift[axis] = read_lanes<Reals>(scratch.points.shift(axis) + i);
      if (some < Run::lanes || !inner.find(field, shift)) {
        if (asked) by_planes(scratch, b, channel, first, i, some);
        also(nullptr, i, some);
        continue;
      }
      if (asked) {
        const T* const grads = grad_.at<T>(b, channel, first + i);
        inner.slopes(
            input_.at<T>(b, channel), input_.channel_stride, problem_.group_channels(),
            [&](int64_t c) { return load_lanes<Reals>(grads + c * problem_.points); }, slopes);
        for (int axis = 0; axis < N; ++axis) write_lanes(scratch.slopes[axis] + i, slopes[axis]);
      }
      also(&inner, i, some);
    }
  }

 private:
  void slopes_of(Scratch& scratch, int64_t b, int64_t channel, int64_t first, int64_t points) const {
    if constexpr (is_usual<A, Index>) {
      if (problem_.is_in_registers(input_))
        return dispatch_summed_as<float>(input_.dtype(), [&]<typename T>() {
          by_registers<T>(scratch, b, channel, first, points, true, [](const InnerCells<N>*, int64_t, int64_t) {});
        });
    }
    by_planes(scratch, b, channel, first, 0, points);
  }

  // Of the points [begin, begin + points) of those that were read, plane by plane.
  void by_planes(Scratch& scratch, int64_t b, int64_t channel, int64_t first, int64_t begin, int64_t points) const {
    Run& cells = scratch.points.cells;
    scratch.points.locate(problem_, problem_.whole(), points, input_.position_stride, -1, begin);
    A* slopes[N];
    for (int axis = 0; axis < N; ++axis) slopes[axis] = scratch.slopes[axis] + begin;
    if (problem_.nearest) return cells.no_slopes(points, slopes);
    for (int64_t c = channel; c < channel + problem_.group_channels(); ++c) {
      const A* const grads = view_run(grad_, b, c, first + begin, points, scratch.grads.get());
      const bool first_channel = c == channel;
      dispatch_dtype(input_.dtype(), [&]<typename T>() {
        first_channel ? add_dots_in_place<true>(cells, points, input_.at<T>(b, c), grads)
                      : add_dots_in_place<false>(cells, points, input_.at<T>(b, c), grads);
      });
    }
    cells.slopes_of_values(points, nullptr, slopes, nullptr);
  }

  const Problem<N>& problem_;
  const Map& input_;
  const Map grad_;
};

// By the points, row by row, from a field that is laid out. The samples themselves are written, too, if asked for.
template <typename A, int N>
void points_laid_out(const Problem<N>& problem, const Map& input, const Tensor& grad_output, const Sink* output,
                     const Sink& grad_points) {
  struct Scratch : PointScratch<A, N, int32_t> {
    Buffer<A> grads{block<N> * slice_channels}, columns{block<N> * slice_channels};
  };
  const int64_t blocks = problem.blocks();
  const Map grad(grad_output);
  const auto of_slice = [&](Scratch& scratch, const A* rows, const Slice& slice, int64_t first, int64_t points) {
    scratch.points.locate(problem, problem.whole(), points, slice.channels,
                          static_cast<int32_t>(problem.positions() * slice.channels));
    read_turned(grad, slice.batch, slice.channel, slice.channels, first, points, scratch.grads.get());
    Walk<A, N, LaidOut> walked{};
    walked.field = slice.field(problem, rows);
    walked.grad_columns = scratch.grads.get(), walked.pitch = walked.channels = slice.channels;
    walked.columns = output ? scratch.columns.get() : nullptr;
    std::copy_n(scratch.slopes, N, walked.grad_shift);
    walk(scratch.points.cells, points, static_cast<const A*>(nullptr), walked);
    if (output)
      write_turned(scratch.columns.get(), slice.channels, points, slice.channels, *output,
                   (slice.batch * problem.channels + slice.channel) * problem.points + first, problem.points, false);
  };
  for_slices<A>(
      problem, input, [&](const A* rows, const std::vector<Slice>& slices, const std::vector<int64_t>& groups) {
        const auto of_groups = static_cast<int64_t>(groups.size()) - 1;
        each_in_runs(
            of_groups * blocks, [] { return Scratch(); },
            [&](Scratch& scratch, int64_t item) {
              const int64_t first = item % blocks * block<N>, points = std::min(block<N>, problem.points - first);
              for (int64_t s = groups[item / blocks]; s < groups[item / blocks + 1]; ++s) {
                const Slice& slice = slices[s];
                scratch.points.read(coordinates_of<A>(problem, slice.batch * problem.groups + slice.group, first),
                                    points);
                of_slice(scratch, rows, slice, first, points);
                scratch.write(problem, slice.batch, slice.group, first, points, !slice.first, grad_points);
              }
            });
      });
}

template <typename A, int N>
void backward_by_points(const Problem<N>& problem, const Map& input, const Tensor& grad_output,
                        const Sink& grad_points) {
  if (problem.points == 0) return;
  if (problem.is_laid_out(input, sizeof(A)) && !problem.nearest)
    return points_laid_out<A>(problem, input, grad_output, nullptr, grad_points);
  problem.is_wide(std::max<int64_t>(input.position_stride, 1))
      ? PointsInPlace<A, N, int64_t>(problem, input, grad_output).run(grad_points)
      : PointsInPlace<A, N, int32_t>(problem, input, grad_output).run(grad_points);
}

// By the field.
template <typename A, int N, typename Index>
class FieldBackward {
 public:
  FieldBackward(const Problem<N>& problem, const Tensor& grad_output, const Sink& grad_input)
      : problem_(problem),
        grad_output_(grad_output),
        grad_input_(grad_input),
        width_(std::min(few_channels, problem.group_channels())),
        of_group_(ceil_div(problem.group_channels(), width_)),
        windows_(problem, width_ * int64_t(sizeof(A)), problem.batch * problem.groups * of_group_),
        touches_(problem, windows_) {}

  void run(const std::vector<char>& done) const {
    const int64_t items = problem_.batch * problem_.groups * of_group_ * windows_.number;
    each(
        items, [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t item) {
          const int64_t slice = item / windows_.number, group = slice / of_group_ % problem_.groups;
          const int64_t begin = slice % of_group_ * width_, b = slice / of_group_ / problem_.groups;
          if (done[slice / of_group_]) return;
          const int64_t channels = std::min(width_, problem_.group_channels() - begin);
          const auto number = static_cast<uint8_t>(item % windows_.number);
          window(scratch, {windows_.window(problem_, number), number, b * problem_.groups + group,
                           b * problem_.channels + group * problem_.group_channels() + begin, channels});
        });
  }

 private:
  struct Scratch {
    Points<A, N, Index> points{block<N>};
    Buffer<A> sums, grads{block<N> * few_channels};
    Buffer<int64_t> list{2 * block<N>};

    explicit Scratch(const FieldBackward& work)
        : sums(work.width_ * (work.windows_.window(work.problem_, 0).positions() + 1)) {}
  };

  struct Item {
    Window<N> window;
    uint8_t number;
    int64_t group, channel, channels;  // among those of all samples

    // Whether the channels of a position lie side by side.
    bool in_rows() const { return channels == few_channels; }
  };

  void window(Scratch& scratch, const Item& item) const {
    const int64_t positions = item.window.positions();
    std::fill_n(scratch.sums.get(), (positions + 1) * item.channels, A(0));
    int64_t listed = 0;
    for (int64_t i = 0; i < problem_.blocks(); ++i) {
      if (!touches_.touches(item.group, i, item.number)) continue;
      const int64_t first = i * block<N>, points = std::min(block<N>, problem_.points - first);
      const bool all = touches_.touches_no_other(item.group, i, item.number);
      const int64_t found =
          all ? points : touches_.list(item.group, first, points, item.number, scratch.list.get() + listed);
      if (found >= points * most_of_a_block) {
        scratch.points.read(coordinates_of<A>(problem_, item.group, first), points);
        read(scratch, item, first, points);
        add(scratch, item, points);
        continue;
      }
      listed += found;
      if (listed < block<N>) continue;
      add_listed(scratch, item, block<N>);
      listed -= block<N>;
      std::copy_n(scratch.list.get() + block<N>, listed, scratch.list.get());
    }
    add_listed(scratch, item, listed);
    write(scratch, item);
  }

  // The gradients of points that follow one another: rows, or planes.
  void read(Scratch& scratch, const Item& item, int64_t first, int64_t points) const {
    A* const grads = scratch.grads.get();
    if (item.in_rows()) return read_turned(Map(grad_output_), 0, item.channel, item.channels, first, points, grads);
    read_rows(grad_output_, item.channel * problem_.points + first, problem_.points, item.channels, points, grads,
              block<N>);
  }

  void add_listed(Scratch& scratch, const Item& item, int64_t points) const {
    scratch.points.read(coordinates_of<A>(problem_, item.group), scratch.list.get(), points);
    dispatch_dtype(grad_output_.scalar_type(), [&]<typename T>() {
      const T* const from = static_cast<const T*>(grad_output_.data_ptr()) + item.channel * problem_.points;
      const int64_t pitch = item.in_rows() ? few_channels : 1, plane = item.in_rows() ? 1 : block<N>;
      for (int64_t c = 0; c < item.channels; ++c)
        for (int64_t i = 0; i < points; ++i)
          scratch.grads[i * pitch + c * plane] = load<A>(from[c * problem_.points + scratch.list[i]]);
    });
    add(scratch, item, points);
  }

  void add(Scratch& scratch, const Item& item, int64_t points) const {
    const int64_t positions = item.window.positions(), width = item.in_rows() ? few_channels : 1;
    scratch.points.locate(problem_, item.window, points, width, static_cast<Index>(positions * width));
    if (item.in_rows()) {
      Walk<A, N, LaidOut> walked{};
      walked.grad_field.first = scratch.sums.get();
      walked.grad_columns = scratch.grads.get(), walked.pitch = walked.channels = few_channels;
      return walk(scratch.points.cells, points, static_cast<const A*>(nullptr), walked);
    }
    for (int64_t c = 0; c < item.channels; ++c)
      scatter_plane(scratch.points.cells, points, scratch.grads.get() + c * block<N>,
                    scratch.sums.get() + c * (positions + 1), problem_.corners());
  }

  void write(const Scratch& scratch, const Item& item) const {
    const int64_t positions = item.window.positions(), plane = problem_.positions();
    if (item.in_rows())
      return unpack(scratch.sums.get(), few_channels, item.window, grad_input_, item.channel * plane, false);
    for (int64_t c = 0; c < item.channels; ++c)
      grad_input_.write((item.channel + c) * plane + item.window.first * item.window.inner(),
                        scratch.sums.get() + c * (positions + 1), positions);
  }

  const Problem<N>& problem_;
  const Tensor& grad_output_;
  const Sink& grad_input_;
  int64_t width_, of_group_;
  Windows<N> windows_;
  Touches<A, N, Index> touches_;
};

// Of the groups that are not done.
template <typename A, int N>
void backward_by_input(const Problem<N>& problem, const Tensor& grad_output, const Sink& grad_input,
                       const std::vector<char>& done) {
  problem.is_wide(few_channels) ? FieldBackward<A, N, int64_t>(problem, grad_output, grad_input).run(done)
                                : FieldBackward<A, N, int32_t>(problem, grad_output, grad_input).run(done);
}

}  // namespace deformkit::sampling
