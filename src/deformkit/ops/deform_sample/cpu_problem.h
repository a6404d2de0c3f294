// What a call of deformable sampling is made of, as the CPU kernels see it: sizes, runs of points, and the slices of
// channels that are laid out.
#pragma once

#include "sample/field.h"
#include "sample/rows.h"

namespace deformkit::sampling {

// Measured by `python benchmarks/run.py sample` with other values in their place:
constexpr int64_t field_bytes = 16 * mib;  // of a slice that is laid out, at most
constexpr int64_t slice_bytes = 4 * mib;   // of the slices that are laid out at a time, if they have some channels
constexpr int64_t far_bytes = 4 * mib;     // of a slice that is far
constexpr int64_t slice_channels = 64;     // of one slice, at most
constexpr int64_t few_channels = 8;        // the fewest that are laid out, and whose gradient is summed row by row
constexpr int64_t some_channels = 16;      // the fewest that are laid out where points could be sampled in registers
constexpr int64_t planes_together = 4;     // sampled at one register of points, before the next points
constexpr int64_t least_runs = 32, longest_run = 16;  // of blocks of points
constexpr int64_t seldom = 2;                         // positions to a point up to which a field is laid out

// Points worked on at a time: what is known of them stays in a core's first cache.
template <int N>
constexpr int64_t block = N == 3 ? 256 : 512;

template <int N>
struct Problem {
  int64_t batch, channels, groups, points;
  Axes<N> size;
  Boundary boundary;
  bool nearest;
  bool by_axis;        // whether the coordinates along an axis lie side by side, not those of a point
  Tensor coordinates;  // [B, G, *out, N]
  Sizes output_sizes;  // [B, C, *out]

  Problem(const Tensor& input, const Tensor& points_, int64_t boundary_, int64_t mode)
      : boundary(boundary_of(boundary_)),
        nearest(mode == 1),
        by_axis(lie_by_axis(points_)),
        coordinates(by_axis ? points_ : contiguous(points_)) {
    const auto sizes = sizes_of(input), shape = sizes_of(points_);
    STD_TORCH_CHECK(mode == 0 || mode == 1, "mode must be 0 (linear) or 1 (nearest)");
    STD_TORCH_CHECK(sizes.size() == N + 2 && shape.size() >= 4 && shape.back() == N,
                    "input must be [B, C, *S] and points [B, G, *out, N], with N axes S and at least one axis out");
    batch = sizes[0], channels = sizes[1], groups = shape[1];
    STD_TORCH_CHECK(shape[0] == batch, "points' batch size must be input's");
    STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0,
                    "input's channels must be a multiple of points' groups");
    // The product of the axes out, which may overflow where another axis is empty.
    points = points_.numel() == 0 ? 0 : points_.numel() / (batch * groups * N);
    output_sizes = {batch, channels};
    output_sizes.insert(output_sizes.end(), shape.begin() + 2, shape.end() - 1);
    STD_TORCH_CHECK(points_.scalar_type() == sum_dtype(input.scalar_type()),
                    "points must be float32, or float64 if input is");
    for (int axis = 0; axis < N; ++axis) {
      size[axis] = sizes[axis + 2];
      STD_TORCH_CHECK(size[axis] > 0 && size[axis] <= farthest, "every size must be from 1 to 2^40");
    }
  }

  // Whether the axes out are contiguous by themselves, as in a displacement [B, N, *out] whose axes were moved.
  static bool lie_by_axis(const Tensor& points) {
    int64_t expected = 1;
    for (size_t axis = points.dim() - 1; axis-- > 2; expected *= points.sizes()[axis])
      if (points.sizes()[axis] != 1 && points.strides()[axis] != expected) return false;
    return N > 1 && expected > 1;
  }

  int64_t positions() const { return count<N>(size); }
  int64_t group_channels() const { return channels / groups; }
  double work() const {
    return work_of<N>(static_cast<double>(batch * groups) * static_cast<double>(points), group_channels());
  }
  int64_t blocks() const { return ceil_div(points, block<N>); }
  int corners() const { return nearest ? 1 : 1 << N; }
  Window<N> whole() const { return {size, 0, size[0]}; }

  // Whether fields whose positions are `pitch` apart take 64-bit indices.
  bool is_wide(int64_t pitch) const {
    return (positions() + 1) >= (int64_t(1) << 31) / pitch || *std::max_element(size.begin(), size.end()) >= int64_t(1)
                                                                                                                 << 29;
  }

  // Whether a field that is not laid out is sampled with a register of points at a time.
  bool is_in_registers(const Map& input) const {
    return input.dtype() != ScalarType::Double && input.position_stride == 1 && !nearest;
  }

  // Whether the field is laid out: a row must be worth it, some channels must fit, and points must read them often. The
  // batch has no say, so that it cannot change a sample's bits.
  bool is_laid_out(const Map& input, int64_t element) const {
    return group_channels() >= (is_in_registers(input) ? some_channels : few_channels) &&
           positions() * few_channels * element <= field_bytes && points * seldom >= positions();
  }
};

// The coordinates of points that follow one another.
template <typename A>
struct Coordinates {
  const A* first;
  int64_t point_stride, axis_stride;

  const A* along(int axis) const { return first + axis * axis_stride; }
};

// A run of points, located.
template <typename A, int N, typename Index>
class Points {
 public:
  explicit Points(int64_t capacity) : cells(capacity), capacity_(capacity), shifts_(N * capacity) {}

  // The coordinates of points that follow one another, or of those of them in a list. Those that follow are asked for.
  void read(const Coordinates<A>& from, int64_t points) {
    if (from.point_stride == N) ask_for_lines(from.first + points * N, points * N);
    for (int axis = 0; axis < N; ++axis) {
      const A* const along = from.along(axis);
      A* const to = shifts_.get() + axis * capacity_;
      if (from.point_stride != N) {
        ask_for_lines(along + points, points);
        std::copy_n(along, points, to);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < points; ++i) to[i] = along[i * N];
      }
    }
  }
  void read(const Coordinates<A>& from, const int64_t* list, int64_t points) {
    for (int64_t i = 0; i < points; ++i)
      for (int axis = 0; axis < N; ++axis)
        shifts_[axis * capacity_ + i] = from.along(axis)[list[i] * from.point_stride];
  }

  // Locates the points [begin, begin + points) of those that were read.
  void locate(const Problem<N>& problem, const Window<N>& window, int64_t points, int64_t width, Index outside,
              int64_t begin = 0) {
    const A* from[N];
    for (int axis = 0; axis < N; ++axis) from[axis] = shift(axis) + begin;
    cells.locate(window, problem.boundary, problem.nearest, points, {}, {}, from, nullptr, width, outside);
  }

  const A* shift(int axis) const { return shifts_.get() + axis * capacity_; }

  Cells<A, N, Index> cells;

 private:
  int64_t capacity_;
  Buffer<A> shifts_;
};

// Of a group, counted in all batches, from a point on.
template <typename A, int N>
Coordinates<A> coordinates_of(const Problem<N>& problem, int64_t group, int64_t point = 0) {
  const A* const data = static_cast<const A*>(problem.coordinates.data_ptr());
  if (!problem.by_axis) return {data + (group * problem.points + point) * N, N, 1};
  const auto strides = problem.coordinates.strides();
  const int64_t place = group / problem.groups * strides[0] + group % problem.groups * strides[1];
  return {data + place + point, 1, strides.back()};
}

// Like each(), for items that a thread takes some at a time: those that follow one another read the same rows of a
// field, which then stay in a core's cache.
template <typename M, typename F>
void each_in_runs(int64_t items, const M& make, const F& f) {
  const int64_t run = std::clamp<int64_t>(items / least_runs, 1, longest_run);
  each(ceil_div(items, run), make, [&](auto& scratch, int64_t r) {
    for (int64_t item = r * run; item < std::min((r + 1) * run, items); ++item) f(scratch, item);
  });
}

// Calls f(scratch, batch, group, first, points) for each block of points of each group, an item of work each, when
// scratch.points has read it. Each thread has a Scratch.
template <typename Scratch, typename A, int N, typename F>
void for_blocks(const Problem<N>& problem, const F& f) {
  const int64_t blocks = problem.blocks();
  each_in_runs(
      problem.batch * problem.groups * blocks, [] { return Scratch(); },
      [&](Scratch& scratch, int64_t item) {
        const int64_t group = item / blocks % problem.groups, b = item / blocks / problem.groups;
        const int64_t first = item % blocks * block<N>, points = std::min(block<N>, problem.points - first);
        scratch.points.read(coordinates_of<A>(problem, b * problem.groups + group, first), points);
        f(scratch, b, group, first, points);
      });
}

// Some channels of a group, and where they are laid out.
struct Slice {
  int64_t batch, group, channel, channels, place;
  bool first;  // of its group

  template <typename A, int N>
  LaidOut<const A> field(const Problem<N>& problem, const A* rows) const {
    return {rows + place, problem.positions() * channels * int64_t(sizeof(A)) > far_bytes};
  }
};

// Calls f(rows, slices, groups) with the field laid out, as much at a time as fits: groups[i] to groups[i + 1] are the
// slices of one group.
template <typename A, int N, typename F>
void for_slices(const Problem<N>& problem, const Map& input, const F& f) {
  const int64_t rows = problem.positions() + 1, plane = problem.positions() * int64_t(sizeof(A));
  const int64_t fit = std::max(slice_bytes / plane, some_channels);
  const int64_t width = std::min({slice_channels, fit / some_channels * some_channels,
                                  field_bytes / plane / few_channels * few_channels, problem.group_channels()});
  const int64_t of_group = ceil_div(problem.group_channels(), width), all = problem.batch * problem.groups * of_group;
  const int64_t together = std::clamp<int64_t>(fit / width, 1, std::max<int64_t>(all, 1));
  const Buffer<A> laid_out(together * width * rows);
  for (int64_t first = 0; first < all; first += together) {
    std::vector<Slice> slices;
    std::vector<int64_t> groups;
    int64_t place = 0;
    for (int64_t s = first; s < std::min(first + together, all); ++s) {
      const int64_t begin = s % of_group * width, group = s / of_group % problem.groups;
      const int64_t channels = std::min(width, problem.group_channels() - begin);
      if (s == first || begin == 0) groups.push_back(static_cast<int64_t>(slices.size()));
      slices.push_back({s / of_group / problem.groups, group, group * problem.group_channels() + begin, channels, place,
                        begin == 0});
      place += channels * rows;
    }
    groups.push_back(static_cast<int64_t>(slices.size()));
    constexpr int64_t run = 1024;
    const int64_t runs = ceil_div(problem.positions(), run);
    each(static_cast<int64_t>(slices.size()) * runs, [&](int64_t item) {
      const Slice& slice = slices[item / runs];
      const int64_t begin = item % runs * run;
      pack(input, slice.batch, slice.channel, slice.channels, problem.whole(), begin,
           std::min(begin + run, problem.positions()), laid_out.get() + slice.place);
    });
    f(laid_out.get(), slices, groups);
  }
}

}  // namespace deformkit::sampling
