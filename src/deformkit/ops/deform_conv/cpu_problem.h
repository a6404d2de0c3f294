// The parts of a call of deformable convolution for the CPU kernels: sizes, tensors, and the windows of the
// field into which its work is divided.
#pragma once

#include "sample/field.h"

namespace deformkit::conv {

// Groups of fewer channels than this are summed up channel by channel: a product would mostly multiply padding.
constexpr int64_t narrow_channels = 8;

// Consecutive channels with the same offsets.
struct Piece {
  int64_t begin, channels;
};

// Everything that follows from the shapes.
template <int N>
struct Problem {
  int64_t batch, channels, out_channels, group_channels, groups, offset_groups, taps, positions;
  Axes<N> size, out_size, stride, padding;
  std::vector<Axes<N>> tap;  // dilation * k of each tap
  Boundary boundary;
  bool wide;  // 64-bit indices

  Problem(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
          const std::vector<int64_t>& stride_, const std::vector<int64_t>& padding_,
          const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask, int64_t boundary_) {
    const auto sizes = sizes_of(input), kernel = sizes_of(weight), map = sizes_of(offset);
    STD_TORCH_CHECK(input.dim() == N + 2 && weight.dim() == N + 2 && offset.dim() == N + 2,
                    "input, offset and weight must have ", N + 2, " axes");
    STD_TORCH_CHECK(stride_.size() == N && padding_.size() == N && dilation.size() == N,
                    "stride, padding and dilation must have ", N, " values");
    boundary = boundary_of(boundary_);
    batch = sizes[0], channels = sizes[1], out_channels = kernel[0], group_channels = kernel[1];
    taps = positions = 1;
    int64_t reach = 1;
    for (int axis = 0; axis < N; ++axis) {
      const int64_t k = kernel[axis + 2], s = sizes[axis + 2];
      check_window(s, k, stride_[axis], padding_[axis], dilation[axis], map[axis + 2]);
      size[axis] = s, stride[axis] = stride_[axis], padding[axis] = padding_[axis];
      out_size[axis] = map[axis + 2];
      taps *= k, positions *= out_size[axis];
      reach = std::max(reach, s + 2 * padding[axis]);
    }
    STD_TORCH_CHECK(group_channels > 0 && channels > 0 && channels % group_channels == 0,
                    "input's channels must be a multiple of weight's");
    groups = channels / group_channels;
    STD_TORCH_CHECK(out_channels > 0 && out_channels % groups == 0, "weight's output channels must divide into groups");
    offset_groups = map[1] / (taps * N);
    STD_TORCH_CHECK(
        map[0] == batch && offset_groups > 0 && map[1] == offset_groups * taps * N && channels % offset_groups == 0,
        "offset's batch or channels do not fit");
    if (mask) {
      const auto factors = sizes_of(*mask);
      STD_TORCH_CHECK(mask->dim() == N + 2 && factors[0] == batch && factors[1] == offset_groups * taps &&
                          std::equal(out_size.begin(), out_size.end(), factors.begin() + 2),
                      "mask's shape does not fit offset's");
      STD_TORCH_CHECK(mask->scalar_type() == input.scalar_type(), "mask must have input's dtype");
    }
    if (bias) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, "bias must have weight's output channels");
      STD_TORCH_CHECK(bias->scalar_type() == input.scalar_type(), "bias must have input's dtype");
    }
    STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight must have input's dtype");
    const bool doubles = input.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(doubles == (offset.scalar_type() == ScalarType::Double), "offset's dtype does not fit input's");

    for (int64_t t = 0; t < taps; ++t) {
      Axes<N> at;
      int64_t rest = t;
      for (int axis = N; axis-- > 0;) {
        at[axis] = rest % kernel[axis + 2] * dilation[axis];
        rest /= kernel[axis + 2];
      }
      tap.push_back(at);
    }
    wide = reach >= (int64_t(1) << 29) || count<N>(size) >= (int64_t(1) << 30);
  }

  // Products are the quickest part.
  double work() const {
    const double columns = static_cast<double>(batch * positions) * static_cast<double>(taps);
    return work_of<N>(columns * static_cast<double>(offset_groups), channels_per_offset_group()) +
           columns * static_cast<double>(group_channels) * static_cast<double>(out_channels) / 4;
  }
  std::vector<int64_t> output_sizes() const {
    std::vector<int64_t> sizes{batch, out_channels};
    sizes.insert(sizes.end(), out_size.begin(), out_size.end());
    return sizes;
  }
  int64_t field() const { return count<N>(size); }
  int64_t channels_per_offset_group() const { return channels / offset_groups; }
  int64_t group_rows() const { return out_channels / groups; }
  // The channels [begin, end), divided where their offsets change.
  std::vector<Piece> pieces(int64_t begin, int64_t end) const {
    std::vector<Piece> result;
    for (int64_t c = begin, next; c < end; c = next) {
      next = std::min(end, (c / channels_per_offset_group() + 1) * channels_per_offset_group());
      result.push_back({c, next - c});
    }
    return result;
  }
  // Whether groups have few channels, and no products.
  bool is_narrow() const { return groups > 1 && group_channels < narrow_channels; }
  // Whether each group has one channel with (nearly) its own offsets. Then positions, not channels, fill the registers.
  bool is_planar() const { return group_channels == 1 && channels_per_offset_group() < 4 && !wide; }
};

// A run of output positions of one sample, and the rows of the field that are laid out for it.
template <int N>
struct Unit {
  int64_t batch, begin, end;
  Window<N> window;
};

// How the field of a sample is held, by its shape alone, so that no offset decides about the bits of another's result:
// channels of a slice, output lines of a unit, and the rows of the field that a unit sees beyond those that its taps
// read without offsets. Samples that leave the window are strays, which read their corners where they are. Without
// lines nothing is laid out, and every sample is a stray.
struct Cut {
  int64_t channels, lines, margin;

  bool lays_out() const { return lines > 0; }
};

// The largest window of at most `width` channels in `bytes`.
template <typename A, int N>
Cut cut_field(const Problem<N>& problem, int64_t width, int64_t bytes) {
  // Offsets of a few rows stay inside; along the only axis a row is one position, and as many cost little.
  constexpr int64_t least_margin = N == 1 ? 256 : 8;
  const int64_t all = problem.size[0], inner = problem.field() / all, reach = problem.tap.back()[0] + 2;
  // A field of which few elements are read is not laid out.
  const bool sparse = (problem.positions * problem.taps << N) < problem.field();
  if (problem.wide || sparse) return {width, 0, 0};
  for (;; width = (width + 1) / 2) {
    const int64_t rows = bytes / (inner * width * static_cast<int64_t>(sizeof(A)));
    if (rows > all) return {width, problem.out_size[0], all};
    const int64_t margin = std::max(least_margin, rows / 8),
                  lines = (rows - 1 - reach - 2 * margin) / problem.stride[0];
    if (lines > 0) return {width, lines, margin};
    if (width == 1) return {width, 0, 0};
  }
}

template <int N>
std::vector<Unit<N>> make_units(const Problem<N>& problem, const Cut& cut) {
  const int64_t lines = cut.lays_out() ? cut.lines : problem.out_size[0],
                line = problem.positions / problem.out_size[0];
  std::vector<Unit<N>> units;
  for (int64_t b = 0; b < problem.batch; ++b)
    for (int64_t first = 0; first < problem.out_size[0]; first += lines) {
      const int64_t last = std::min(first + lines, problem.out_size[0]);
      const int64_t low = first * problem.stride[0] - problem.padding[0] - cut.margin;
      const int64_t high = (last - 1) * problem.stride[0] - problem.padding[0] + problem.tap.back()[0] + 2 + cut.margin;
      Unit<N> unit{b, first * line, last * line, {problem.size, 0, 0}};
      if (cut.lays_out()) {
        unit.window.first = std::clamp<int64_t>(low, 0, problem.size[0] - 1);
        unit.window.last = std::clamp<int64_t>(high, unit.window.first + 1, problem.size[0]);
      }
      units.push_back(unit);
    }
  return units;
}

// The points of a block of output positions: where they start, and the cells of one tap.
template <typename A, int N, typename Index>
struct Points {
  Cells<A, N, Index> cells;
  Buffer<Index> origins;
  Buffer<A> shifts, factors;
  int64_t capacity;
  const Index* origin[N];
  const A* shift[N];

  explicit Points(int64_t block)
      : cells(block), origins(N * block), shifts(N * block), factors(block), capacity(block) {
    for (int axis = 0; axis < N; ++axis) origin[axis] = origins.get() + axis * block;
  }

  void start(const Problem<N>& problem, int64_t begin, int64_t points) {
    Index* own[N];
    for (int axis = 0; axis < N; ++axis) own[axis] = origins.get() + axis * capacity;
    fill_origins<N>(problem.out_size, problem.stride, problem.padding, begin, points, 1, own);
  }

  // Reads the offsets of one tap; returns its factors, if there are any.
  const A* read(const Problem<N>& problem, int64_t batch, const Map& offset, const std::optional<Map>& mask,
                int64_t offset_group, int64_t tap, int64_t begin, int64_t points) {
    const int64_t channel = offset_group * problem.taps + tap;
    for (int axis = 0; axis < N; ++axis)
      shift[axis] = view_run(offset, batch, channel * N + axis, begin, points, shifts.get() + axis * capacity);
    return mask ? view_run(*mask, batch, channel, begin, points, factors.get()) : nullptr;
  }

  // Asks for what read() will read for the next tap: runs of planes far apart are too short for the hardware to
  // foresee.
  __attribute__((always_inline)) static void ask_for_next(const Problem<N>& problem, int64_t batch, const Map& offset,
                                                          const std::optional<Map>& mask, int64_t offset_group,
                                                          int64_t tap, int64_t begin, int64_t points) {
    const int64_t next = offset_group * problem.taps + tap + 1;
    if (next == problem.offset_groups * problem.taps) return;
    for (int axis = 0; axis < N; ++axis) ask_for_run(offset, batch, next * N + axis, begin, points);
    if (mask) ask_for_run(*mask, batch, next, begin, points);
  }

  // Locates the points [begin, begin + points) of those that were read.
  void locate(const Problem<N>& problem, const Window<N>& window, int64_t tap, const A* factor, int64_t points,
              int64_t width, Index outside, int64_t begin = 0) {
    const Index* origins_of[N];
    const A* shifts_of[N];
    for (int axis = 0; axis < N; ++axis) origins_of[axis] = origin[axis] + begin, shifts_of[axis] = shift[axis] + begin;
    cells.locate(window, problem.boundary, false, points, origins_of, problem.tap[tap], shifts_of,
                 factor ? factor + begin : nullptr, width, outside);
  }
};

// One call: its tensors as the kernels read them.
template <int N>
struct Call {
  Problem<N> problem;
  Map input, offset;
  Tensor weight;
  std::optional<Map> mask;

  Call(Problem<N> p, const Tensor& input_, const Tensor& offset_, const Tensor& weight_,
       const std::optional<Tensor>& mask_)
      : problem(std::move(p)), input(input_), offset(offset_), weight(contiguous(weight_)) {
    if (mask_) mask.emplace(*mask_);
  }
};

// All elements of a contiguous tensor, in the type of sums.
template <typename A>
std::vector<A> values_of(const Tensor& tensor) {
  std::vector<A> values(static_cast<size_t>(tensor.numel()));
  dispatch_dtype(tensor.scalar_type(), [&]<typename T>() {
    const T* const source = static_cast<const T*>(tensor.data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = load<A>(source[i]);
  });
  return values;
}

// The requested gradients and their destinations; absent ones are not requested.
struct Gradients {
  std::optional<Sink> input, offset, weight, mask;

  bool by_point() const { return offset || mask; }
};

// The gradients by offset and mask of a run of positions, stored or added: lines of N coordinates and the factor,
// `pitch` apart.
template <typename A, int N>
void write_by_point(const Problem<N>& problem, int64_t batch, int64_t group, int64_t tap, int64_t begin, int64_t points,
                    const A* lines, int64_t pitch, bool add, const Gradients& gradients) {
  const int64_t channel = (batch * problem.offset_groups + group) * problem.taps + tap;
  if (gradients.offset)
    for (int axis = 0; axis < N; ++axis)
      gradients.offset->write((channel * N + axis) * problem.positions + begin, lines + axis * pitch, points, add);
  if (gradients.mask) gradients.mask->write(channel * problem.positions + begin, lines + N * pitch, points, add);
}

}  // namespace deformkit::conv
