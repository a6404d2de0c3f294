// What a call of deformable convolution is made of, as the CPU kernels see it, and how its work is cut: samples into
// units of positions, channels into slices.
#pragma once

#include <string>

#include "sample/field.h"

namespace deformkit::conv {

constexpr int64_t column_bytes = 5 * mib / 2;  // of one block: what stays in cache
constexpr int64_t field_bytes = 16 * mib;      // of the laid-out field that one round of work uses
constexpr int64_t grad_field_bytes = 8 * mib;  // of one slice of it in the backward, of which a thread holds two
constexpr int64_t slice_channels = 32;         // that one item of the backward owns
constexpr int64_t weight_shares = 8;           // into which the sum for the weight's gradient is cut, at most
constexpr int64_t narrow = 8;                  // with fewer channels a group, no matrix product

// Everything that the shapes say.
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
      STD_TORCH_CHECK(k > 0 && s > 0 && stride_[axis] > 0 && padding_[axis] >= 0 && dilation[axis] > 0,
                      "sizes, stride and dilation must be positive, padding not negative");
      size[axis] = s, stride[axis] = stride_[axis], padding[axis] = padding_[axis];
      out_size[axis] = map[axis + 2];
      const int64_t room = s + 2 * padding[axis] - dilation[axis] * (k - 1) - 1;
      STD_TORCH_CHECK(room >= 0 && out_size[axis] == room / stride[axis] + 1,
                      "offset's spatial size does not fit the input, kernel, stride, padding and dilation");
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

  int64_t channels_per_offset_group() const { return channels / offset_groups; }
  int64_t group_rows() const { return out_channels / groups; }
  bool is_narrow() const { return group_channels < narrow; }
  // One channel a group, each with offsets of its own or nearly so: then positions, not channels, fill the registers.
  bool is_planar() const { return group_channels == 1 && channels_per_offset_group() < 4 && !wide; }
};

// Channels of one convolution group inside a slice, or all of the slice's when the groups are narrow. Their columns
// [P, taps, channels] start at P * taps * (begin - slice).
struct Part {
  int64_t group, begin, channels;
};

// Channels that share both their columns and their offsets; whether they are the slice's first and last with them.
struct Piece {
  int64_t part, offset_group, begin, channels;
  bool first, last;
};

// A range of channels that is worked on at a time.
struct Slice {
  int64_t begin, end;
  std::vector<Part> parts;
  std::vector<Piece> pieces;

  int64_t channels() const { return end - begin; }
};

template <int N>
Slice make_slice(const Problem<N>& problem, int64_t begin, int64_t end) {
  Slice slice{begin, end, {}, {}};
  const int64_t per_group = problem.group_channels, per_offset = problem.channels_per_offset_group();
  for (int64_t c = begin; c < end;) {
    const int64_t group = c / per_group, past = problem.is_narrow() ? end : std::min(end, (group + 1) * per_group);
    slice.parts.push_back({group, c, past - c});
    for (; c < past;) {
      const int64_t next = std::min(past, (c / per_offset + 1) * per_offset);
      const int64_t part_index = static_cast<int64_t>(slice.parts.size()) - 1;
      slice.pieces.push_back({part_index, c / per_offset, c, next - c, c == begin || c % per_offset == 0,
                              next == end || next % per_offset == 0});
      c = next;
    }
  }
  return slice;
}

// All channels, in slices of about `width`; a group smaller than that is not cut.
template <int N>
std::vector<Slice> make_slices(const Problem<N>& problem, int64_t width) {
  std::vector<Slice> slices;
  const int64_t per_group = problem.group_channels;
  if (width < per_group) {
    const int64_t cuts = ceil_div(per_group, width), each_width = ceil_div(per_group, cuts);
    for (int64_t c = 0; c < problem.channels; c += per_group)
      for (int64_t d = 0; d < per_group; d += each_width)
        slices.push_back(make_slice(problem, c + d, c + std::min(d + each_width, per_group)));
  } else {
    const int64_t step = width / per_group * per_group;
    for (int64_t c = 0; c < problem.channels; c += step)
      slices.push_back(make_slice(problem, c, std::min(c + step, problem.channels)));
  }
  return slices;
}

// A run of output positions of one sample, and the rows of the field that they reach.
template <int N>
struct Unit {
  int64_t batch, begin, end;
  Window<N> window;
};

// Calls f(packed, own, channels, pitch) for every run of channels that the slice's weights of output row r hold
// together: [channels, taps] of the weight, from element `own` on, whose transpose [taps, channels] has lines `pitch`
// apart and starts at `packed`. Every part is [rows, taps, channels], one after the other: rows are the output channels
// of its group, and of each channel's own group when the groups are narrow.
template <int N, typename F>
void for_weight(const Problem<N>& problem, const Slice& slice, int64_t r, const F& f) {
  const int64_t rows = problem.group_rows(), depth = problem.group_channels;
  int64_t packed = 0;
  for (const Part& part : slice.parts) {
    const int64_t line = packed + r * problem.taps * part.channels;
    for (int64_t c = part.begin, next; c < part.begin + part.channels; c = next) {
      next = std::min(part.begin + part.channels, (c / depth + 1) * depth);
      f(line + c - part.begin, ((c / depth * rows + r) * depth + c % depth) * problem.taps, next - c, part.channels);
    }
    packed += rows * problem.taps * part.channels;
  }
}

template <typename A, int N>
Buffer<A> pack_weight(const Problem<N>& problem, const Tensor& weight, const Slice& slice) {
  Buffer<A> result(problem.group_rows() * problem.taps * slice.channels());
  dispatch_dtype(weight.scalar_type(), [&]<typename T>() {
    const T* source = static_cast<const T*>(weight.data_ptr());
    each(problem.group_rows(), [&](int64_t r) {
      for_weight(problem, slice, r, [&](int64_t packed, int64_t own, int64_t channels, int64_t pitch) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < problem.taps; ++k)
            result[packed + k * pitch + c] = load<A>(source[own + c * problem.taps + k]);
      });
    });
  });
  return result;
}

// What one thread needs to gather a block.
template <typename A, int N, typename Index>
struct Points {
  Cells<A, N, Index> cells;
  Buffer<Index> origins;
  Buffer<A> shifts, factors;
  Buffer<int64_t> where;
  Buffer<A> corners;
  int64_t capacity;
  const Index* origin[N];

  explicit Points(int64_t block)
      : cells(block),
        origins(N * block),
        shifts(N * block),
        factors(block),
        where(sizeof(Index) == 8 ? block << N : 1),
        corners(sizeof(Index) == 8 ? 2 * (block << N) : 1),
        capacity(block) {
    for (int axis = 0; axis < N; ++axis) origin[axis] = origins.get() + axis * block;
  }

  void start(const Problem<N>& problem, int64_t begin, int64_t points) {
    Index* own[N];
    for (int axis = 0; axis < N; ++axis) own[axis] = origins.get() + axis * capacity;
    fill_origins<N>(problem.out_size, problem.stride, problem.padding, begin, points, 1, own);
  }

  // Locates the cells of one tap; returns its factors, if there are any.
  const A* locate(const Problem<N>& problem, const Unit<N>& unit, const Map& offset, const std::optional<Map>& mask,
                  int64_t offset_group, int64_t tap, int64_t begin, int64_t points, int64_t width, Index outside) {
    const int64_t channel = offset_group * problem.taps + tap;
    const A* shift[N];
    for (int axis = 0; axis < N; ++axis)
      shift[axis] = view_run(offset, unit.batch, channel * N + axis, begin, points, shifts.get() + axis * capacity);
    const A* factor = mask ? view_run(*mask, unit.batch, channel, begin, points, factors.get()) : nullptr;
    cells.locate(unit.window, problem.boundary, points, origin, problem.tap[tap], shift, factor, width, outside);
    return factor;
  }
};

// Cuts every sample into units whose window of the field is about `bytes`, and finds their windows.
template <typename A, int N>
std::vector<Unit<N>> make_units(const Problem<N>& problem, const Map& offset, int64_t field_row_bytes, int64_t bytes) {
  const int64_t field = count<N>(problem.size);
  const int64_t cuts = std::clamp<int64_t>(ceil_div(field * field_row_bytes, bytes), 1, problem.positions);
  const int64_t line = problem.positions / problem.out_size[0];
  std::vector<Unit<N>> units;
  for (int64_t b = 0; b < problem.batch; ++b)
    for (int64_t u = 0; u < cuts; ++u)
      units.push_back(
          {b, problem.positions * u / cuts, problem.positions * (u + 1) / cuts, {problem.size, 0, problem.size[0]}});
  if (cuts == 1) return units;

  each(static_cast<int64_t>(units.size()), [&](int64_t index) {
    Unit<N>& unit = units[index];
    constexpr int64_t run = 1024;
    Buffer<A> shift(run);
    int64_t low = problem.size[0], high = -1;
    // Along one line the origin stays as it is; with one axis alone, every position is a line.
    const int64_t step = N == 1 ? problem.stride[0] : 0;
    for (int64_t channel = 0; channel < problem.offset_groups * problem.taps; ++channel)
      for (int64_t p = unit.begin; p < unit.end;) {
        const int64_t points = std::min({run, unit.end - p, N == 1 ? run : line - p % line});
        const A* const by = view_run(offset, unit.batch, channel * N, p, points, shift.get());
        const int64_t origin =
            p / line * problem.stride[0] - problem.padding[0] + problem.tap[channel % problem.taps][0];
        const A least = A(-2 - origin), most = A(problem.size[0] + 1 - origin);
        A smallest = most, largest = least;
#pragma omp simd reduction(min : smallest) reduction(max : largest)
        for (int64_t i = 0; i < points; ++i) {
          const A s = by[i] + A(step * i);
          smallest = s < smallest ? s : smallest;
          largest = s > largest ? s : largest;
        }
        low = std::min(low, origin + static_cast<int64_t>(std::floor(std::max(smallest, least))));
        high = std::max(high, origin + static_cast<int64_t>(std::floor(std::min(largest, most))) + 1);
        p += points;
      }
    // One row to spare on either side: the bounds above were rounded to A.
    low = std::clamp<int64_t>(low - 1, 0, problem.size[0] - 1);
    unit.window.first = low;
    unit.window.last = std::clamp<int64_t>(high + 2, low + 1, problem.size[0]);
  });
  return units;
}

template <int N>
std::vector<Unit<N>> whole_units(const Problem<N>& problem) {
  std::vector<Unit<N>> units;
  for (int64_t b = 0; b < problem.batch; ++b)
    units.push_back({b, 0, problem.positions, {problem.size, 0, problem.size[0]}});
  return units;
}

template <int N>
int64_t largest_window(const std::vector<Unit<N>>& units) {
  int64_t result = 0;
  for (const Unit<N>& unit : units) result = std::max(result, unit.window.positions());
  return result;
}

// How many positions to take at a time, so that their columns stay in cache.
inline int64_t block_positions(int64_t bytes_per_position, int64_t most) {
  const int64_t block = column_bytes / bytes_per_position / 16 * 16;
  return std::min(std::clamp<int64_t>(block, 32, 1024), most);
}

// One call: its tensors as the kernels read them.
template <int N>
struct Call {
  Problem<N> problem;
  Map input, offset;
  Tensor weight;
  std::optional<Map> mask;

  Call(Problem<N> p, const Tensor& input_, const Tensor& offset_, const Tensor& weight_,
       const std::optional<Tensor>& mask_)
      : problem(std::move(p)), input(input_), offset(offset_), weight(torch::stable::contiguous(weight_)) {
    if (mask_) mask.emplace(*mask_);
  }
};

// What the backward is asked for and where it goes; an absent one is not asked for.
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
