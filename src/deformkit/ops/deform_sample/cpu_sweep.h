// Both gradients of a field of few channels, in one walk over the points. An item of work is a run of points: it adds
// up the gradient by the field in rows of its own, and adds these to the rows of the runs before it.
#pragma once

#include "deform_sample/cpu_backward.h"

namespace deformkit::sampling {

// Of the gradient by the field, to a run of points, at most: runs are a multiple of `least_items`, so that the threads
// share them evenly. Measured by `python benchmarks/run.py sample --case "one channel"` with other values in its place.
constexpr int64_t run_bytes = 2 * mib;
constexpr int64_t run_blocks = 16;  // the fewest blocks of points of a run

// Of the rows that a thread holds, at most: if its points lie near those before them, and if they lie anywhere. In 8
// MiB with points anywhere, the windows of FieldBackward were faster. Measured again, with other shapes, by `deformkit
// bench --op deform_sample --shape 1x1x128x128x128`.
constexpr int64_t near_bytes = 16 * mib, anywhere_bytes = 4 * mib;
constexpr int64_t most_overlap = 16;  // of the rows of as many of the longest runs as there are, in times the field's

// Of those groups of points whose runs reach few rows. A group is divided alike in any batch, so that its bits stay.
template <int N>
class Sweep {
  using Slopes = PointsInPlace<float, N, int32_t>;
  using Run = Cells<float, N, int32_t>;
  using Reals = typename Run::Reals;

 public:
  Sweep(const Problem<N>& problem, const Map& input, const Tensor& grad_output)
      : problem_(problem),
        slopes_(problem, input, grad_output),
        grad_(grad_output),
        rounds_(input.dtype() != ScalarType::Float),
        of_group_(std::min(
            ceil_div(problem.positions() * problem.group_channels() * int64_t(sizeof(float)), run_bytes * least_items) *
                least_items,
            ceil_div(problem.blocks(), run_blocks))),
        parts_(problem.batch * problem.groups * of_group_),
        swept_(problem.batch * problem.groups) {
    each(static_cast<int64_t>(parts_.size()), [&](int64_t part) { find_rows(part); });
    for (size_t group = 0; group < swept_.size(); ++group) look_at(group);
  }

  // By group.
  const std::vector<char>& swept() const { return swept_; }
  bool are_all_swept() const { return std::find(swept_.begin(), swept_.end(), 0) == swept_.end(); }

  // The gradient by the points may be null.
  void run(const Sink& grad_input, const Sink* grad_points) const {
    Turns turns(static_cast<int64_t>(items_.size()));
    // By group, of a gradient in half precision: the sums of rows that later runs still add to.
    std::vector<Buffer<float>> open(rounds_ ? swept_.size() : 0);
    each(
        static_cast<int64_t>(items_.size()), [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t item) {
          const int64_t group = items_[item] / of_group_;
          const Part& part = parts_[items_[item]];
          std::fill_n(scratch.sums.get(), problem_.group_channels() * pitch(part), 0.0f);
          for (int64_t i = part.begin; i < part.end; i += block<N>)
            add_block(scratch, group, part, i, std::min(block<N>, part.end - i), grad_points);
          if (items_[item] % of_group_ > 0) turns.wait(item, 0);
          rounds_ ? close_rows(scratch, group, part, open[group], grad_input)
                  : add_rows(scratch, group, part, grad_input.data<float>());
          turns.finish(item, 0);
        },
        &turns);
  }

 private:
  // The points [begin, end) of a group, whose corners lie in the rows [first, past) of the field: a run. The runs
  // before have reached the gradient's rows up to `written`; from this run on, none reaches those before `opened`, and
  // after it none those before `closed`.
  struct Part {
    int64_t begin, end, first, past, written = 0, opened = 0, closed = 0;
    bool is_near;  // whether its first block reaches less than half of the field

    int64_t open_past() const { return std::max({written, past, closed}); }
  };

  struct Scratch : Slopes::Scratch {
    Buffer<float> sums;

    explicit Scratch(const Sweep& work)
        : sums(work.problem_.group_channels() * (work.most_rows_ * work.problem_.whole().inner() + 1)) {}
  };

  // After the rows of a plane, an element for what lies outside.
  int64_t pitch(const Part& part) const { return (part.past - part.first) * problem_.whole().inner() + 1; }

  // Where a field is reflected, points outside of it may lie in any row: such a run has all.
  void find_rows(int64_t item) {
    Part& part = parts_[item];
    const int64_t blocks = ceil_div(problem_.blocks(), of_group_), group = item / of_group_;
    part.begin = std::min(item % of_group_ * blocks * block<N>, problem_.points);
    part.end = std::min(part.begin + blocks * block<N>, problem_.points);
    const Coordinates<float> from = coordinates_of<float>(problem_, group, part.begin);
    const auto [least, most] = reach(from, part.end - part.begin)[0];
    part.is_near = 2 * volume(reach(from, std::min(block<N>, part.end - part.begin))) < problem_.positions();
    const int64_t rows = problem_.size[0];
    const auto lower_row = [&](float coordinate) {
      return static_cast<int64_t>(
          std::clamp(std::floor(double(coordinate)), 0.0, double(std::max<int64_t>(rows - 2, 0))));
    };
    const bool mirrored = problem_.boundary == Boundary::reflect && (least < 0 || most > float(rows - 1));
    part.first = mirrored ? 0 : lower_row(least);
    part.past = mirrored ? rows : std::min(lower_row(most) + 2, rows);
    if (part.begin == part.end) part.first = part.past = rows;
  }

  // Whether the runs of a group reach few rows.
  void look_at(size_t group) {
    Part* const parts = parts_.data() + group * of_group_;
    int64_t most_rows = 0, most_open = 0;
    parts[of_group_ - 1].closed = problem_.size[0];
    for (int64_t i = of_group_ - 1; i-- > 0;) parts[i].closed = std::min(parts[i + 1].first, parts[i + 1].closed);
    for (int64_t i = 0; i < of_group_; ++i) {
      Part& part = parts[i];
      if (i > 0) part.written = std::max(parts[i - 1].written, parts[i - 1].past), part.opened = parts[i - 1].closed;
      most_rows = std::max(most_rows, part.past - part.first);
      if (rounds_) most_open = std::max(most_open, part.open_past() - part.opened);
    }
    const int64_t held = most_rows + most_open;
    const int64_t bytes = held * problem_.whole().inner() * problem_.group_channels() * int64_t(sizeof(float));
    const bool are_near = std::all_of(parts, parts + of_group_, [](const Part& part) { return part.is_near; });
    swept_[group] =
        most_rows * of_group_ <= most_overlap * problem_.size[0] && bytes <= (are_near ? near_bytes : anywhere_bytes);
    if (!swept_[group]) return;
    most_rows_ = std::max(most_rows_, most_rows), most_open_ = std::max(most_open_, most_open);
    for (int64_t i = 0; i < of_group_; ++i) items_.push_back(static_cast<int64_t>(group) * of_group_ + i);
  }

  using Reach = std::array<std::pair<float, float>, N>;

  // The least and the largest coordinates of some points; 0 if none is a number.
  static Reach reach(const Coordinates<float>& from, int64_t points) {
    Reach found;
    if (from.point_stride == N) {
      found = extremes<N>(from.first, points);
    } else {
      for (int axis = 0; axis < N; ++axis) found[axis] = extremes<1>(from.along(axis), points)[0];
    }
    for (auto& [low, high] : found)
      if (!(low <= high)) low = high = 0;
    return found;
  }

  // The least and the largest of some numbers, of every kCount-th from each of the first kCount on.
  template <int kCount>
  static std::array<std::pair<float, float>, kCount> extremes(const float* from, int64_t times) {
    constexpr float far = std::numeric_limits<float>::infinity();
    Reals least[kCount], most[kCount];
    for (int k = 0; k < kCount; ++k) least[k] = Reals{} + far, most[k] = Reals{} - far;
    int64_t i = 0;
    for (; i + Run::lanes <= times; i += Run::lanes)
#pragma GCC unroll 3
      for (int k = 0; k < kCount; ++k) {
        const Reals some = read_lanes<Reals>(from + i * kCount + k * Run::lanes);
        least[k] = some < least[k] ? some : least[k], most[k] = some > most[k] ? some : most[k];
      }
    std::array<std::pair<float, float>, kCount> found;
    found.fill({far, -far});
    const auto include = [&](int64_t at, float low, float high) {
      auto& [lowest, highest] = found[at % kCount];
      lowest = std::min(lowest, low), highest = std::max(highest, high);
    };
    for (int at = 0; at < kCount * Run::lanes; ++at)
      include(at, least[at / Run::lanes][at % Run::lanes], most[at / Run::lanes][at % Run::lanes]);
    for (int64_t at = i * kCount; at < times * kCount; ++at) include(at, from[at], from[at]);
    return found;
  }

  // The positions of the field between the least and the largest coordinates.
  int64_t volume(const Reach& reach) const {
    int64_t positions = 1;
    const auto inside = [&](float coordinate, int axis) {
      return static_cast<int64_t>(std::clamp<double>(coordinate, 0, problem_.size[axis]));
    };
    for (int axis = 0; axis < N; ++axis)
      positions *= 2 + inside(reach[axis].second, axis) - inside(reach[axis].first, axis);
    return positions;
  }

  void add_block(Scratch& scratch, int64_t group, const Part& part, int64_t first, int64_t points,
                 const Sink* grad_points) const {
    const int64_t b = group / problem_.groups, owner = group % problem_.groups;
    const int64_t channels = problem_.group_channels(), channel = owner * channels, plane = pitch(part);
    const Window<N> window{problem_.size, part.first, part.past};
    float* const sums = scratch.sums.get();
    scratch.points.read(coordinates_of<float>(problem_, group, first), points);
    dispatch_summed_as<float>(grad_.dtype(), [&]<typename T>() {
      const T* const grads = grad_.at<T>(b, channel, first);
      const auto add = [&](const InnerCells<N>* cells, int64_t i, int64_t some) {
        const auto grad = [&](int64_t c) { return load_lanes<Reals>(grads + c * problem_.points + i); };
        if (cells) return cells->scatter(sums - part.first * window.inner(), plane, channels, grad);
        scratch.points.locate(problem_, window, some, 1, static_cast<int32_t>(plane - 1), i);
        for (int64_t c = 0; c < channels; ++c)
          scatter_plane(scratch.points.cells, some,
                        view_run(grad_, b, channel + c, first + i, some, scratch.grads.get()), sums + c * plane);
      };
      slopes_.template by_registers<T>(scratch, b, channel, first, points, grad_points != nullptr, add);
    });
    if (grad_points) scratch.write(problem_, b, owner, first, points, false, *grad_points);
  }

  // Adds the rows of a run to the gradient; the first to reach a row writes it.
  void add_rows(const Scratch& scratch, int64_t group, const Part& part, float* grad_input) const {
    const int64_t inner = problem_.whole().inner(), first = part.first * inner, past = part.past * inner;
    const int64_t both = std::clamp(part.written, part.first, part.past) * inner;
    for (int64_t c = 0; c < problem_.group_channels(); ++c) {
      const float* const sums = scratch.sums.get() + c * pitch(part) - first;
      float* const to = grad_input + (group * problem_.group_channels() + c) * problem_.positions();
      if (part.written < part.first) std::fill(to + part.written * inner, to + first, 0.0f);
#pragma omp simd
      for (int64_t i = first; i < both; ++i) to[i] += sums[i];
      std::copy(sums + both, sums + past, to + both);
      const int64_t done = std::max(part.written, part.past) * inner;
      if (&part == &parts_[(group + 1) * of_group_ - 1]) std::fill(to + done, to + problem_.positions(), 0.0f);
    }
  }

  // The same for a gradient in half precision, whose rows are rounded once: the rows of a run are added to those that
  // are open, and those that no later run reaches are written, which closes them.
  void close_rows(const Scratch& scratch, int64_t group, const Part& part, Buffer<float>& open,
                  const Sink& grad_input) const {
    const int64_t inner = problem_.whole().inner(), channels = problem_.group_channels(), plane = most_open_ * inner;
    const int64_t opened = part.opened * inner, closed = part.closed * inner, past = part.open_past() * inner;
    if (!open.get()) open = Buffer<float>(channels * plane);
    for (int64_t c = 0; c < channels; ++c) {
      float* const rows = open.get() + c * plane - opened;
      const float* const sums = scratch.sums.get() + c * pitch(part) - part.first * inner;
      std::fill(rows + std::max(part.written * inner, opened), rows + past, 0.0f);
#pragma omp simd
      for (int64_t i = part.first * inner; i < part.past * inner; ++i) rows[i] += sums[i];
      grad_input.write((group * channels + c) * problem_.positions() + opened, rows + opened, closed - opened);
      std::copy(rows + closed, rows + past, rows + opened);
    }
    if (part.closed == problem_.size[0]) open = {};
  }

  const Problem<N>& problem_;
  const Slopes slopes_;
  const Map grad_;
  const bool rounds_;  // whether the gradient by the field is in half precision
  int64_t of_group_, most_rows_ = 0, most_open_ = 0;
  std::vector<Part> parts_;
  std::vector<char> swept_;
  std::vector<int64_t> items_;  // the parts of the groups that are swept
};

// The gradients that are asked for.
template <typename A, int N>
void backward(const Problem<N>& problem, const Tensor& input, const Tensor& grad_output,
              const std::optional<Sink>& grad_input, const std::optional<Sink>& grad_points) {
  if (problem.batch == 0) return;
  std::vector<char> done(problem.batch * problem.groups);
  if constexpr (std::is_same_v<A, float>) {
    const bool may_sweep = !problem.nearest && !problem.is_wide(1);
    const bool often = problem.points > 0 && problem.points * seldom >= problem.positions();
    if (grad_input && may_sweep && often && problem.group_channels() < few_channels) {
      const Map field(input);
      const Sweep<N> sweep(problem, field, grad_output);
      const bool all = sweep.are_all_swept() && (!grad_points || problem.is_in_registers(field));
      sweep.run(*grad_input, all && grad_points ? &*grad_points : nullptr);
      if (all) return;
      done = sweep.swept();
    }
  }
  if (grad_input) backward_by_input<A>(problem, grad_output, *grad_input, done);
  // The gradient by the input alone does not read it.
  if (grad_points) backward_by_points<A>(problem, Map(input), grad_output, *grad_points);
}

}  // namespace deformkit::sampling
