// Deformable convolution on the CPU: gather the samples of a block of positions into columns that stay in cache, then one
// matrix product per block. The formula is in op.py, the sampler in sample/.
//
//   K taps   P positions of a block   S channels of a slice   columns [P, K, S] (one such part for each group in the slice)

#include "sample/field.h"

#include <string>
#include <tuple>

namespace deformkit {
namespace {

constexpr int64_t mib = 1 << 20;
constexpr int64_t column_bytes = 640 * 1024;     // of one block: what stays in a core's second-level cache
constexpr int64_t field_bytes = 16 * mib;        // of the laid-out field that one round of work uses
constexpr int64_t grad_field_bytes = 8 * mib;    // of one slice of it in the backward, of which a thread holds two
constexpr int64_t partial_bytes = 16 * mib;      // of gradients that await the other slices' share
constexpr int64_t narrow = 8;                    // with fewer channels a group, no matrix product

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything that the shapes say.
template <int N>
struct Problem {
  int64_t batch, channels, out_channels, group_channels, groups, offset_groups, taps, positions;
  Axes<N> size, out_size, stride, padding;
  std::vector<Axes<N>> tap;  // dilation * k of each tap
  bool border, wide;         // wide: 64-bit indices

  Problem(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
          const std::vector<int64_t>& stride_, const std::vector<int64_t>& padding_,
          const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask, const std::string& boundary) {
    const auto sizes = sizes_of(input), kernel = sizes_of(weight), map = sizes_of(offset);
    STD_TORCH_CHECK(input.dim() == N + 2 && weight.dim() == N + 2 && offset.dim() == N + 2,
                    "input, offset and weight must have ", N + 2, " axes");
    STD_TORCH_CHECK(stride_.size() == N && padding_.size() == N && dilation.size() == N,
                    "stride, padding and dilation must have ", N, " values");
    STD_TORCH_CHECK(boundary == "zeros" || boundary == "border", "boundary must be \"zeros\" or \"border\"");
    border = boundary == "border";
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
    STD_TORCH_CHECK(map[0] == batch && offset_groups > 0 && map[1] == offset_groups * taps * N &&
                        channels % offset_groups == 0,
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
  bool depthwise() const { return group_channels < narrow; }
};

// Channels of one convolution group inside a slice. Their columns [P, taps, channels] start at P * taps * (begin - slice).
struct Part {
  int64_t group, begin, channels;
};

// Channels that share both their columns and their offsets.
struct Piece {
  int64_t part, offset_group, begin, channels;
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
    const int64_t group = c / per_group, past = std::min(end, (group + 1) * per_group);
    slice.parts.push_back({group, c, past - c});
    for (; c < past;) {
      const int64_t next = std::min(past, (c / per_offset + 1) * per_offset);
      slice.pieces.push_back({static_cast<int64_t>(slice.parts.size()) - 1, c / per_offset, c, next - c});
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

  int64_t positions() const { return end - begin; }
};

// [out channels of the group, taps, channels] for every part of the slice, one after the other.
template <typename A, int N>
Buffer<A> pack_weight(const Problem<N>& problem, const Tensor& weight, const Slice& slice) {
  const int64_t rows = problem.out_channels / problem.groups;
  Buffer<A> packed(rows * problem.taps * slice.channels());
  dispatch_dtype(weight.scalar_type(), [&]<typename T>() {
    const T* source = static_cast<const T*>(weight.data_ptr());
    A* out = packed.get();
    for (const Part& part : slice.parts)
      for (int64_t o = part.group * rows; o < (part.group + 1) * rows; ++o)
        for (int64_t k = 0; k < problem.taps; ++k)
          for (int64_t c = 0; c < part.channels; ++c)
            *out++ = load<A>(
                source[(o * problem.group_channels + part.begin % problem.group_channels + c) * problem.taps + k]);
  });
  return packed;
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
  const A* shift[N];

  explicit Points(int64_t block)
      : cells(block), origins(N * block), shifts(N * block), factors(block),
        where(sizeof(Index) == 8 ? block << N : 1), corners(sizeof(Index) == 8 ? 2 * (block << N) : 1), capacity(block) {
    for (int axis = 0; axis < N; ++axis) {
      origin[axis] = origins.get() + axis * block;
      shift[axis] = shifts.get() + axis * block;
    }
  }

  // stride * o - padding of `points` output positions.
  void start(const Problem<N>& problem, int64_t begin, int64_t points) {
    Axes<N> at;
    int64_t rest = begin;
    for (int axis = N; axis-- > 0;) {
      at[axis] = rest % problem.out_size[axis];
      rest /= problem.out_size[axis];
    }
    for (int64_t i = 0; i < points; ++i) {
      for (int axis = 0; axis < N; ++axis)
        origins[axis * capacity + i] = static_cast<Index>(at[axis] * problem.stride[axis] - problem.padding[axis]);
      for (int axis = N; axis-- > 0;) {
        if (++at[axis] < problem.out_size[axis] || axis == 0) break;
        at[axis] = 0;
      }
    }
  }

  void locate(const Problem<N>& problem, const Unit<N>& unit, const Map& offset, int64_t offset_group, int64_t tap,
              int64_t begin, int64_t points, Index outside) {
    const int64_t channel = (offset_group * problem.taps + tap) * N;
    for (int axis = 0; axis < N; ++axis)
      read_run(offset, unit.batch, channel + axis, begin, points, shifts.get() + axis * capacity);
    cells.locate(unit.window, problem.border, points, origin, problem.tap[tap], shift, outside);
  }

  const A* read_factor(const Problem<N>& problem, const Unit<N>& unit, const std::optional<Map>& mask,
                       int64_t offset_group, int64_t tap, int64_t begin, int64_t points) {
    if (!mask) return nullptr;
    read_run(*mask, unit.batch, offset_group * problem.taps + tap, begin, points, factors.get());
    return factors.get();
  }
};

// Cuts every sample into units whose window of the field is about `bytes`, and finds their windows.
template <typename A, int N>
std::vector<Unit<N>> make_units(const Problem<N>& problem, const Map& offset, int64_t field_row_bytes, int64_t bytes,
                                int64_t most_positions) {
  const int64_t field = count<N>(problem.size);
  int64_t cuts = std::max(ceil_div(field * field_row_bytes, bytes), ceil_div(problem.positions, most_positions));
  cuts = std::min(cuts, problem.out_size[0]);
  const int64_t line = problem.positions / problem.out_size[0];
  std::vector<Unit<N>> units;
  for (int64_t b = 0; b < problem.batch; ++b)
    for (int64_t u = 0; u < cuts; ++u)
      units.push_back({b, problem.out_size[0] * u / cuts * line, problem.out_size[0] * (u + 1) / cuts * line,
                       {problem.size, 0, problem.size[0]}});
  if (cuts == 1) return units;

  each(static_cast<int64_t>(units.size()), [&](int64_t index) {
    Unit<N>& unit = units[index];
    constexpr int64_t run = 1024;
    Buffer<A> shift(run);
    int64_t low = problem.size[0], high = -1;
    for (int64_t g = 0; g < problem.offset_groups; ++g)
      for (int64_t t = 0; t < problem.taps; ++t)
        for (int64_t p = unit.begin; p < unit.end;) {
          // Within one line along the first axis the origin is the same.
          const int64_t points = std::min({run, unit.end - p, line - p % line});
          read_run(offset, unit.batch, (g * problem.taps + t) * N, p, points, shift.get());
          const int64_t origin = p / line * problem.stride[0] - problem.padding[0] + problem.tap[t][0];
          const A least = A(-2 - origin), most = A(problem.size[0] + 1 - origin);
          A smallest = most, largest = least;
          for (int64_t i = 0; i < points; ++i) {
            const A s = shift[i];
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

int64_t block_positions(int64_t bytes_per_position, int64_t most) {
  const int64_t block = column_bytes / bytes_per_position / 16 * 16;
  return std::min(std::clamp<int64_t>(block, 32, 512), most);
}

// The columns of one block, for every part of the slice.
template <typename A, int N, typename Index>
void gather_block(const Problem<N>& problem, const Map& input, const Map& offset, const std::optional<Map>& mask,
                  const Unit<N>& unit, const Slice& slice, const A* rows, int64_t begin, int64_t points,
                  Points<A, N, Index>& scratch, A* columns) {
  scratch.start(problem, begin, points);
  const int64_t width = slice.channels();
  int64_t group = -1;
  for (size_t first = 0, next; first < slice.pieces.size(); first = next) {
    group = slice.pieces[first].offset_group;
    for (next = first; next < slice.pieces.size() && slice.pieces[next].offset_group == group;) ++next;
    for (int64_t t = 0; t < problem.taps; ++t) {
      const A* factor = scratch.read_factor(problem, unit, mask, group, t, begin, points);
      const auto place = [&](const Piece& piece) {
        const Part& part = slice.parts[piece.part];
        return columns + points * problem.taps * (part.begin - slice.begin) + t * part.channels + piece.begin - part.begin;
      };
      if constexpr (sizeof(Index) == 4) {
        scratch.locate(problem, unit, offset, group, t, begin, points, static_cast<Index>(unit.window.positions()));
        for (size_t i = first; i < next; ++i) {
          const Piece& piece = slice.pieces[i];
          gather(scratch.cells, points, rows + piece.begin - slice.begin, width, piece.channels, factor, place(piece),
                 problem.taps * slice.parts[piece.part].channels);
        }
      } else {
        for (size_t i = first; i < next; ++i) {
          const Piece& piece = slice.pieces[i];
          for (int64_t c = 0; c < piece.channels; ++c) {
            scratch.locate(problem, unit, offset, group, t, begin, points, -1);
            compact(input, unit.batch, piece.begin + c, points, scratch.cells, scratch.where.get(),
                    scratch.corners.get());
            gather(scratch.cells, points, scratch.corners.get(), 1, 1, factor, place(piece) + c,
                   problem.taps * slice.parts[piece.part].channels);
          }
        }
      }
    }
  }
}

// Lays out the windows of some units, each followed by its row of zeros.
template <typename A, int N>
std::vector<int64_t> pack_units(const Map& input, const std::vector<Unit<N>>& units, size_t first, size_t last,
                                const Slice& slice, Buffer<A>& rows) {
  constexpr int64_t run = 1024;
  std::vector<int64_t> place{0};
  std::vector<std::pair<size_t, int64_t>> runs;
  for (size_t u = first; u < last; ++u) {
    const int64_t positions = units[u].window.positions();
    place.push_back(place.back() + (positions + 1) * slice.channels());
    for (int64_t p = 0; p < positions; p += run) runs.emplace_back(u, p);
  }
  rows = Buffer<A>(place.back());
  each(static_cast<int64_t>(runs.size()), [&](int64_t i) {
    const auto [u, p] = runs[i];
    pack(input, units[u].batch, slice.begin, slice.channels(), units[u].window, p,
         std::min(p + run, units[u].window.positions()), rows.get() + place[u - first]);
  });
  return place;
}

template <typename T, int N, typename Index>
void forward(const Problem<N>& problem, const Map& input, const Map& offset, const Tensor& weight,
             const std::optional<Tensor>& bias, const std::optional<Map>& mask, T* output) {
  using A = Sum<T>;
  const int64_t group_rows = problem.out_channels / problem.groups, channels = problem.channels;
  const bool direct = sizeof(Index) == 8;
  const auto units = make_units<A, N>(problem, offset, direct ? 0 : channels * sizeof(A), field_bytes, problem.positions);

  for (size_t first = 0, last; first < units.size(); first = last) {
    // As many units as their fields fit; if not even one does, it goes in slices of channels.
    int64_t positions = 0;
    for (last = first; last < units.size(); ++last) {
      const int64_t more = direct ? 1 : units[last].window.positions() + 1;
      if (last > first && (positions + more) * channels * int64_t(sizeof(A)) > field_bytes) break;
      positions += more;
    }
    const int64_t width =
        std::clamp<int64_t>(2 * field_bytes / (positions * static_cast<int64_t>(sizeof(A))), 1, channels);
    const auto slices = make_slices(problem, width >= channels ? channels : width);
    // A half output cannot hold the sums of some of the slices.
    const bool sums = slices.size() > 1 && !std::is_same_v<T, A>;
    (void)sums;

    for (size_t s = 0; s < slices.size(); ++s) {
      const Slice& slice = slices[s];
      const Buffer<A> packed_weight = pack_weight<A>(problem, weight, slice);
      Buffer<A> rows;
      std::vector<int64_t> place;
      if (!direct) place = pack_units(input, units, first, last, slice, rows);
      const int64_t block =
          block_positions(problem.taps * slice.channels() * static_cast<int64_t>(sizeof(A)), problem.positions);
      std::vector<std::pair<size_t, int64_t>> blocks;
      for (size_t u = first; u < last; ++u)
        for (int64_t p = units[u].begin; p < units[u].end; p += block) blocks.emplace_back(u, p);

      struct Scratch {
        Points<A, N, Index> points;
        Buffer<A> columns;
      };
      const auto make = [&] {
        return Scratch{Points<A, N, Index>(block), Buffer<A>(block * problem.taps * slice.channels())};
      };
      each(static_cast<int64_t>(blocks.size()), make, [&](Scratch& scratch, int64_t item) {
        const auto [u, begin] = blocks[item];
        const Unit<N>& unit = units[u];
        const int64_t points = std::min(block, unit.end - begin);
        gather_block(problem, input, offset, mask, unit, slice, direct ? nullptr : rows.get() + place[u - first], begin,
                     points, scratch.points, scratch.columns.get());
        const A* w = packed_weight.get();
        for (const Part& part : slice.parts) {
          const int64_t depth = problem.taps * part.channels;
          const A* columns = scratch.columns.get() + points * problem.taps * (part.begin - slice.begin);
          const auto put = [&](int64_t o, const auto& value) {
            T* line = output + (unit.batch * problem.out_channels + part.group * group_rows + o) * problem.positions + begin;
            const bool start = slice.begin == 0 || part.begin % problem.group_channels == 0;
            const A add = start && bias ? load<A>(static_cast<const T*>(bias->data_ptr())[part.group * group_rows + o]) : A(0);
            for (int64_t i = 0; i < points; ++i)
              line[i] = store<T>((start ? add : load<A>(line[i])) + value(i));
          };
          if (problem.depthwise()) {
            for (int64_t o = 0; o < group_rows; ++o) {
              put(o, [&](int64_t i) {
                A sum = 0;
                for (int64_t d = 0; d < depth; ++d) sum += w[o * depth + d] * columns[i * depth + d];
                return sum;
              });
            }
          } else {
            const Tensor block_output =
                product(Matrix<A>{w, group_rows, depth, depth}, Matrix<A>{columns, points, depth, depth}.transposed());
            const A* values = static_cast<const A*>(block_output.data_ptr());
            for (int64_t o = 0; o < group_rows; ++o) put(o, [&](int64_t i) { return values[o * points + i]; });
          }
          w += group_rows * depth;
        }
      });
    }
  }
}

Tensor deform_conv(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
                   const std::string& boundary) {
  Tensor output;
  dispatch_axes(input.dim() - 2, [&]<int N>() {
    const Problem<N> problem(input, offset, weight, bias, stride, padding, dilation, mask, boundary);
    std::vector<int64_t> size{problem.batch, problem.out_channels};
    size.insert(size.end(), problem.out_size.begin(), problem.out_size.end());
    output = torch::stable::new_empty(input, size);
    if (problem.batch == 0) return;
    const Map input_map(input), offset_map(offset);
    const Tensor dense_weight = torch::stable::contiguous(weight);
    const std::optional<Tensor> dense_bias = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    const std::optional<Map> mask_map = mask ? std::optional<Map>(*mask) : std::nullopt;
    dispatch_dtype(input.scalar_type(), [&]<typename T>() {
      T* out = static_cast<T*>(output.data_ptr());
      if (problem.wide) {
        forward<T, N, int64_t>(problem, input_map, offset_map, dense_weight, dense_bias, mask_map, out);
      } else {
        forward<T, N, int32_t>(problem, input_map, offset_map, dense_weight, dense_bias, mask_map, out);
      }
    });
  });
  return output;
}

}  // namespace
}  // namespace deformkit

STABLE_TORCH_LIBRARY_IMPL(deformkit, CPU, m) {
  m.impl("deform_conv", TORCH_BOX(&deformkit::deform_conv));
}
