// Deformable convolution on the CPU: gather the samples of a block of positions into columns that stay in cache, then
// one matrix product per block. The formula is in op.py, the sampler in sample/.
//
//   K taps   P positions of a block   S channels of a slice   columns [P, K, S] (one such part for each group in the
//   slice)

#include <string>
#include <thread>
#include <tuple>

#include "sample/field.h"

namespace deformkit {
namespace {

constexpr int64_t mib = 1 << 20;
constexpr int64_t column_bytes = 5 * mib / 2;  // of one block: what stays in cache
constexpr int64_t field_bytes = 16 * mib;      // of the laid-out field that one round of work uses
constexpr int64_t grad_field_bytes = 8 * mib;  // of one slice of it in the backward, of which a thread holds two
constexpr int64_t slice_channels = 32;         // that one item of the backward owns
constexpr int64_t weight_shares = 8;           // into which the sum for the weight's gradient is cut, at most
constexpr int64_t narrow = 8;                  // with fewer channels a group, no matrix product

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

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

  int64_t positions() const { return end - begin; }
};

// Calls f(packed, row) for every run of a slice's weights that stays together: row is [channels, taps] of the weight
// from element `row` on, and packed is where its transpose, [taps, channels], starts among the slice's. Every part is
// [rows, taps, channels], one after the other: rows are the output channels of its group, and of each channel's own
// group when the groups are narrow.
template <int N, typename F>
void for_weight(const Problem<N>& problem, const Slice& slice, const F& f) {
  const int64_t rows = problem.group_rows(), depth = problem.group_channels;
  int64_t packed = 0;
  for (const Part& part : slice.parts)
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = part.begin, next; c < part.begin + part.channels; c = next) {
        next = std::min(part.begin + part.channels, (c / depth + 1) * depth);
        f(packed + c - part.begin, ((c / depth * rows + r) * depth + c % depth) * problem.taps, next - c,
          part.channels);
      }
      packed += problem.taps * part.channels;
    }
}

template <typename A, int N>
Buffer<A> pack_weight(const Problem<N>& problem, const Tensor& weight, const Slice& slice) {
  Buffer<A> result(problem.group_rows() * problem.taps * slice.channels());
  dispatch_dtype(weight.scalar_type(), [&]<typename T>() {
    const T* source = static_cast<const T*>(weight.data_ptr());
    for_weight(problem, slice, [&](int64_t packed, int64_t row, int64_t channels, int64_t pitch) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < problem.taps; ++k)
          result[packed + k * pitch + c] = load<A>(source[row + c * problem.taps + k]);
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

  // Locates the cells of one tap; returns its factors, if there are any.
  const A* locate(const Problem<N>& problem, const Unit<N>& unit, const Map& offset, const std::optional<Map>& mask,
                  int64_t offset_group, int64_t tap, int64_t begin, int64_t points, Index outside) {
    const int64_t channel = offset_group * problem.taps + tap;
    const A* shift[N];
    for (int axis = 0; axis < N; ++axis)
      shift[axis] = view_run(offset, unit.batch, channel * N + axis, begin, points, shifts.get() + axis * capacity);
    const A* factor = mask ? view_run(*mask, unit.batch, channel, begin, points, factors.get()) : nullptr;
    cells.locate(unit.window, problem.border, points, origin, problem.tap[tap], shift, factor, outside);
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

// How many positions to take at a time, so that their columns stay in cache.
int64_t block_positions(int64_t bytes_per_position, int64_t most) {
  const int64_t block = column_bytes / bytes_per_position / 16 * 16;
  return std::min(std::clamp<int64_t>(block, 32, 512), most);
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

// Calls f(tap, piece, factor, rows, width) with the cells of one block located, for every tap and every piece of the
// slice; `rows` is the field to sample, with `width` channels. A field too large to lay out comes channel by channel,
// as the corners of these points alone.
template <typename A, int N, typename Index, typename F>
void for_cells(const Call<N>& call, const Unit<N>& unit, const Slice& slice, const A* rows, int64_t begin,
               int64_t points, Points<A, N, Index>& scratch, const F& f) {
  const Problem<N>& problem = call.problem;
  scratch.start(problem, begin, points);
  int64_t group = -1;
  for (size_t first = 0, next = 0; first < slice.pieces.size(); first = next) {
    group = slice.pieces[first].offset_group;
    while (next < slice.pieces.size() && slice.pieces[next].offset_group == group) ++next;
    for (int64_t tap = 0; tap < problem.taps; ++tap) {
      if constexpr (sizeof(Index) == 4) {
        const auto outside = static_cast<Index>(unit.window.positions());
        const A* factor = scratch.locate(problem, unit, call.offset, call.mask, group, tap, begin, points, outside);
        for (size_t i = first; i < next; ++i)
          f(tap, slice.pieces[i], factor, rows + slice.pieces[i].begin - slice.begin, slice.channels());
      } else {
        for (size_t i = first; i < next; ++i) {
          for (int64_t c = 0; c < slice.pieces[i].channels; ++c) {
            const Piece& piece = slice.pieces[i];
            const Piece one{
                piece.part, group, piece.begin + c, 1, piece.first && c == 0, piece.last && c + 1 == piece.channels};
            const A* factor = scratch.locate(problem, unit, call.offset, call.mask, group, tap, begin, points, -1);
            compact(call.input, unit.batch, one.begin, points, scratch.cells, scratch.where.get(),
                    scratch.corners.get());
            f(tap, one, factor, scratch.corners.get(), 1);
          }
        }
      }
    }
  }
}

// Where the columns of a piece and tap start in those of a block.
template <int N>
int64_t column_of(const Problem<N>& problem, const Slice& slice, const Piece& piece, int64_t tap, int64_t points) {
  const Part& part = slice.parts[piece.part];
  return points * problem.taps * (part.begin - slice.begin) + tap * part.channels + piece.begin - part.begin;
}

// Lays out the windows of units[first, last), each followed by its row of zeros; returns where each starts.
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

// The output of one block, for one part: f(output channel, its values), the bias not yet added.
template <typename A, int N, typename F>
void multiply(const Problem<N>& problem, const Part& part, const A* weight, const A* columns, int64_t points,
              const F& f) {
  const int64_t rows = problem.group_rows(), depth = problem.taps * part.channels;
  if (!problem.is_narrow()) {
    const Tensor result =
        product(Matrix<A>{weight, rows, depth, depth}, Matrix<A>{columns, points, depth, depth}.transposed());
    A* values = static_cast<A*>(result.mutable_data_ptr());
    for (int64_t r = 0; r < rows; ++r) f(part.group * rows + r, values + r * points);
    return;
  }
  const int64_t channels = part.channels, per_group = problem.group_channels;
  Buffer<A> sums(points * channels), line(points);
  for (int64_t r = 0; r < rows; ++r) {
    const A* w = weight + r * depth;
    for (int64_t i = 0; i < points; ++i) {
      A* sum = sums.get() + i * channels;
      const A* column = columns + i * depth;
      std::fill_n(sum, channels, A(0));
      for (int64_t k = 0; k < problem.taps; ++k) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) sum[c] += w[k * channels + c] * column[k * channels + c];
      }
    }
    for (int64_t c = 0; c < channels;) {
      const int64_t group = (part.begin + c) / per_group,
                    next = std::min(channels, (group + 1) * per_group - part.begin);
      std::fill_n(line.get(), points, A(0));
      for (; c < next; ++c)
        for (int64_t i = 0; i < points; ++i) line[i] += sums[i * channels + c];
      f(group * rows + r, line.get());
    }
  }
}

template <typename A, int N, typename Index>
void forward(const Call<N>& call, const std::vector<Unit<N>>& units, const std::vector<A>& bias, const Sink& output) {
  const Problem<N>& problem = call.problem;
  constexpr bool direct = sizeof(Index) == 8;
  for (size_t first = 0, last; first < units.size(); first = last) {
    // As many units as their fields fit; if not even one does, it goes in slices of channels.
    int64_t positions = 0;
    for (last = first; last < units.size(); ++last) {
      const int64_t more = direct ? 1 : units[last].window.positions() + 1;
      if (last > first && (positions + more) * problem.channels * int64_t(sizeof(A)) > field_bytes) break;
      positions += more;
    }
    const int64_t room = 2 * field_bytes / (positions * static_cast<int64_t>(sizeof(A)));
    for (const Slice& slice : make_slices(problem, std::clamp<int64_t>(room, 1, problem.channels))) {
      const Buffer<A> weight = pack_weight<A>(problem, call.weight, slice);
      Buffer<A> rows;
      std::vector<int64_t> place(last - first);
      if (!direct) place = pack_units(call.input, units, first, last, slice, rows);
      const int64_t depth = problem.taps * slice.channels();
      const int64_t block = block_positions(depth * static_cast<int64_t>(sizeof(A)), problem.positions);
      std::vector<std::pair<size_t, int64_t>> blocks;
      for (size_t u = first; u < last; ++u)
        for (int64_t p = units[u].begin; p < units[u].end; p += block) blocks.emplace_back(u, p);

      struct Scratch {
        Points<A, N, Index> points;
        Buffer<A> columns;
      };
      const auto make = [&] { return Scratch{Points<A, N, Index>(block), Buffer<A>(block * depth)}; };
      each(static_cast<int64_t>(blocks.size()), make, [&](Scratch& scratch, int64_t item) {
        const auto [u, begin] = blocks[item];
        const Unit<N>& unit = units[u];
        const int64_t points = std::min(block, unit.end - begin);
        A* const columns = scratch.columns.get();
        for_cells(call, unit, slice, rows.get() + place[u - first], begin, points, scratch.points,
                  [&](int64_t tap, const Piece& piece, const A*, const A* field, int64_t width) {
                    gather(scratch.points.cells, points, field, width, piece.channels,
                           columns + column_of(problem, slice, piece, tap, points),
                           problem.taps * slice.parts[piece.part].channels);
                  });
        const A* w = weight.get();
        for (const Part& part : slice.parts) {
          const bool start = part.begin % problem.group_channels == 0;
          multiply(problem, part, w, columns + points * problem.taps * (part.begin - slice.begin), points,
                   [&](int64_t o, A* values) {
                     if (start && !bias.empty())
                       for (int64_t i = 0; i < points; ++i) values[i] += bias[o];
                     output.write((unit.batch * problem.out_channels + o) * problem.positions + begin, values, points,
                                  !start);
                   });
          w += problem.group_rows() * problem.taps * part.channels;
        }
      });
    }
  }
}

// What the backward is asked for and where it goes; an absent one is not asked for.
struct Gradients {
  std::optional<Sink> input, offset, weight, bias, mask;

  bool by_point() const { return offset || mask; }
};

// How far each item of work is, for those that must follow another: an item adds to what the one before it has stored.
class Turns {
 public:
  explicit Turns(int64_t items) : done_(items) {}

  // Returns when item - 1 has finished this step. It has been begun: items are handed out in order.
  void wait(int64_t item, int64_t step) const {
    while (done_[item - 1].load(std::memory_order_acquire) <= step) std::this_thread::yield();
  }
  void finish(int64_t item, int64_t step) { done_[item].store(step + 1, std::memory_order_release); }

 private:
  std::vector<std::atomic<int64_t>> done_;
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

template <typename A, int N, typename Index>
struct BackwardScratch {
  Points<A, N, Index> points;
  Buffer<A> rows, grad_rows, columns, grad_output, turned, by_point, more_by_point;
};

// The gradient by the columns of one part of one block: weight transposed times the output's.
template <typename A, int N>
Tensor grad_columns_of(const Call<N>& call, const Part& part, const A* weight, const A* grad_output, int64_t points,
                       Buffer<A>& turned) {
  const Problem<N>& problem = call.problem;
  const int64_t rows = problem.group_rows(), depth = problem.taps * part.channels, channels = part.channels;
  if (!problem.is_narrow()) {
    transpose(grad_output, rows, points, points, turned.get(), rows);
    return product(Matrix<A>{turned.get(), points, rows, rows}, Matrix<A>{weight, rows, depth, depth});
  }
  const std::array<int64_t, 2> size{points, depth};
  Tensor result =
      torch::stable::empty({size.data(), 2}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* out = static_cast<A*>(result.mutable_data_ptr());
  std::fill_n(out, points * depth, A(0));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < points; ++i) {
      const A* grad = grad_output + (r * points + i) * channels;
      for (int64_t k = 0; k < problem.taps; ++k) {
        const A* w = weight + r * depth + k * channels;
        A* column = out + i * depth + k * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) column[c] += w[c] * grad[c];
      }
    }
  return result;
}

// sum += the gradient by the weight of one part, from one block.
template <typename A, int N>
void add_grad_weight(const Problem<N>& problem, const Part& part, const A* grad_output, const A* columns,
                     int64_t points, A* sum) {
  const int64_t rows = problem.group_rows(), depth = problem.taps * part.channels, channels = part.channels;
  if (!problem.is_narrow()) {
    const Tensor result =
        product(Matrix<A>{grad_output, rows, points, points}, Matrix<A>{columns, points, depth, depth});
    const A* values = static_cast<const A*>(result.data_ptr());
    for (int64_t i = 0; i < rows * depth; ++i) sum[i] += values[i];
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < points; ++i) {
      const A* grad = grad_output + (r * points + i) * channels;
      for (int64_t k = 0; k < problem.taps; ++k) {
        const A* column = columns + i * depth + k * channels;
        A* out = sum + r * depth + k * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) out[c] += grad[c] * column[c];
      }
    }
}

// The output's gradient for one part and block: [rows, points], or [rows, points, channels] when the groups are narrow.
template <typename A, int N>
void read_grad_output(const Call<N>& call, const Map& grad_output, const Part& part, int64_t batch, int64_t begin,
                      int64_t points, A* out, Buffer<A>& line) {
  const Problem<N>& problem = call.problem;
  const int64_t rows = problem.group_rows();
  for (int64_t r = 0; r < rows; ++r) {
    if (!problem.is_narrow()) {
      read_run(grad_output, batch, part.group * rows + r, begin, points, out + r * points);
      continue;
    }
    for (int64_t c = 0; c < part.channels; ++c) {
      const int64_t group = (part.begin + c) / problem.group_channels;
      read_run(grad_output, batch, group * rows + r, begin, points, line.get());
      for (int64_t i = 0; i < points; ++i) out[(r * points + i) * part.channels + c] = line[i];
    }
  }
}

template <typename A, int N, typename Index>
void backward(const Call<N>& call, const Map& grad_output, const std::vector<Unit<N>>& units,
              const std::vector<Slice>& slices, bool whole, const Gradients& gradients) {
  const Problem<N>& problem = call.problem;
  constexpr bool direct = sizeof(Index) == 8;
  const int64_t rows = problem.group_rows(), field = count<N>(problem.size), slice_count = slices.size();
  const bool by_columns = gradients.input || gradients.by_point();
  const int64_t per_offset = problem.channels_per_offset_group(), cuts = units.size() / problem.batch;

  int64_t widest = 0, parts = 1, window = 0;
  for (const Slice& slice : slices) {
    widest = std::max(widest, slice.channels());
    parts = std::max<int64_t>(parts, slice.parts.size());
  }
  for (const Unit<N>& unit : units) window = std::max(window, unit.window.positions() + 1);
  const int64_t depth = widest * problem.taps;
  const int64_t block = block_positions(2 * depth * static_cast<int64_t>(sizeof(A)), problem.positions);
  const int64_t grad_values = (problem.is_narrow() ? rows * widest : rows * parts) * block;

  std::vector<Buffer<A>> weights;
  if (by_columns)
    for (const Slice& slice : slices) weights.push_back(pack_weight<A>(problem, call.weight, slice));
  const int64_t weight_size = problem.out_channels * problem.group_channels * problem.taps;
  const int64_t sums = std::clamp<int64_t>(std::min({ceil_div(weight_shares, slice_count), problem.batch,
                                                     field_bytes / (weight_size * static_cast<int64_t>(sizeof(A)))}),
                                           1, weight_shares);
  std::vector<Buffer<A>> weight_sums;
  if (gradients.weight) {
    for (int64_t i = 0; i < sums * slice_count; ++i) {
      const int64_t size = rows * problem.taps * slices[i % slice_count].channels();
      weight_sums.emplace_back(size);
      std::fill_n(weight_sums.back().get(), size, A(0));
    }
  }

  const auto make = [&] {
    using Values = Buffer<A>;
    return BackwardScratch<A, N, Index>{Points<A, N, Index>(block),
                                        Values(direct ? 1 : window * widest),
                                        Values(direct ? 1 : window * widest),
                                        Values(block * depth),
                                        Values(grad_values),
                                        Values(problem.is_narrow() ? block : rows * block),
                                        Values((N + 1) * block),
                                        Values((N + 1) * block)};
  };

  Turns turns(sums * slice_count);
  each(sums * slice_count, make, [&](BackwardScratch<A, N, Index>& scratch, int64_t item) {
    const int64_t own = item % slice_count, share_of_batch = item / slice_count;
    const Slice& slice = slices[own];
    const int64_t width = slice.channels();
    // An offset group that begins in an earlier slice: its gradients by offset and mask are added up slice by slice.
    const bool follows = gradients.by_point() && slice.begin % per_offset != 0;
    int64_t step = 0;
    try {
      for (int64_t u = problem.batch * share_of_batch / sums * cuts;
           u < problem.batch * (share_of_batch + 1) / sums * cuts; ++u) {
        const Unit<N>& unit = units[u];
        if (!direct) {
          if (gradients.weight || gradients.by_point())
            pack(call.input, unit.batch, slice.begin, width, unit.window, 0, unit.window.positions(),
                 scratch.rows.get());
          if (gradients.input) std::fill_n(scratch.grad_rows.get(), (unit.window.positions() + 1) * width, A(0));
        }
        for (int64_t begin = unit.begin; begin < unit.end; begin += block) {
          const int64_t points = std::min(block, unit.end - begin);
          std::vector<Tensor> grad_columns;
          std::vector<const A*> by_part;
          A* grads = scratch.grad_output.get();
          const A* w = by_columns ? weights[own].get() : nullptr;
          for (const Part& part : slice.parts) {
            read_grad_output(call, grad_output, part, unit.batch, begin, points, grads, scratch.turned);
            if (by_columns) {
              grad_columns.push_back(grad_columns_of(call, part, w, grads, points, scratch.turned));
              by_part.push_back(static_cast<const A*>(grad_columns.back().data_ptr()));
              w += rows * problem.taps * part.channels;
            }
            grads += rows * points * (problem.is_narrow() ? part.channels : 1);
          }

          if (follows) turns.wait(item, step);
          for_cells(call, unit, slice, scratch.rows.get(), begin, points, scratch.points,
                    [&](int64_t tap, const Piece& piece, const A* factor, const A* field_rows, int64_t field_width) {
                      const Part& part = slice.parts[piece.part];
                      const int64_t in_part = tap * part.channels + piece.begin - part.begin;
                      A* const by_point = (piece.first ? scratch.by_point : scratch.more_by_point).get();
                      A* const corners = scratch.points.corners.get() + (direct ? block << N : 0);
                      Walk<A, N> walked{};
                      walked.rows = field_rows;
                      walked.width = field_width;
                      walked.channels = piece.channels;
                      walked.pitch = problem.taps * part.channels;
                      if (by_columns) walked.grad_columns = by_part[piece.part] + in_part;
                      if (gradients.weight)
                        walked.columns = scratch.columns.get() + column_of(problem, slice, piece, tap, points);
                      if (gradients.input)
                        walked.grad_rows = direct ? corners : scratch.grad_rows.get() + piece.begin - slice.begin;
                      if (gradients.offset)
                        for (int axis = 0; axis < N; ++axis) walked.grad_shift[axis] = by_point + axis * block;
                      if (gradients.mask) walked.grad_factor = by_point + N * block;
                      if (direct && gradients.input) std::fill_n(corners, points << N, A(0));
                      walk(scratch.points.cells, points, factor, walked);

                      if (direct && gradients.input) {
                        A* plane =
                            gradients.input->template data<A>() + (unit.batch * problem.channels + piece.begin) * field;
                        for (int64_t i = 0; i < points << N; ++i)
                          if (scratch.points.where[i] >= 0) plane[scratch.points.where[i]] += corners[i];
                      }
                      if (!gradients.by_point()) return;
                      A* const total = scratch.by_point.get();
                      if (!piece.first)
                        for (int64_t i = 0; i < (N + 1) * block; ++i) total[i] += by_point[i];
                      if (!piece.last) return;
                      const int64_t group = piece.offset_group;
                      write_by_point(problem, unit.batch, group, tap, begin, points, total, block,
                                     group * per_offset < slice.begin, gradients);
                    });
          turns.finish(item, step++);

          if (gradients.weight) {
            const A* grad = scratch.grad_output.get();
            A* sum = weight_sums[share_of_batch * slice_count + own].get();
            for (const Part& part : slice.parts) {
              add_grad_weight(problem, part, grad,
                              scratch.columns.get() + points * problem.taps * (part.begin - slice.begin), points, sum);
              grad += rows * points * (problem.is_narrow() ? part.channels : 1);
              sum += rows * problem.taps * part.channels;
            }
          }
        }
        if (gradients.input && !direct)
          unpack(scratch.grad_rows.get(), width, unit.window, *gradients.input,
                 (unit.batch * problem.channels + slice.begin) * field, !whole);
      }
    } catch (...) {
      turns.finish(item, std::numeric_limits<int64_t>::max() - 1);  // nobody waits for what will not come
      throw;
    }
  });

  if (gradients.weight) {
    each(slice_count, [&](int64_t own) {
      A* total = weight_sums[own].get();
      const int64_t size = rows * problem.taps * slices[own].channels();
      for (int64_t share_of_batch = 1; share_of_batch < sums; ++share_of_batch)
        for (int64_t i = 0; i < size; ++i) total[i] += weight_sums[share_of_batch * slice_count + own][i];
      dispatch_dtype(gradients.weight->dtype(), [&]<typename T>() {
        T* out = gradients.weight->template data<T>();
        for_weight(problem, slices[own], [&](int64_t packed, int64_t row, int64_t channels, int64_t pitch) {
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t k = 0; k < problem.taps; ++k)
              out[row + c * problem.taps + k] = store<T>(total[packed + k * pitch + c]);
        });
      });
    });
  }
}

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

// Samples of one plane at the located cells.
template <typename A, int N>
void sample_plane(const Cells<A, N, int32_t>& cells, int64_t points, const A* plane, A* samples) {
  std::fill_n(samples, points, A(0));
  for (int corner = 0; corner < 1 << N; ++corner) {
    const A* const weight = cells.weight(corner);
    const int32_t* const index = cells.index(corner);
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) samples[i] += weight[i] * plane[index[i]];
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

// Calls f(unit, channel, begin, points, plane) for every channel and block of some samples, with the origins set.
template <typename A, int N, typename F>
void for_planes(const Call<N>& call, int64_t batch, int64_t first, int64_t last, PlanarScratch<A, N>& scratch,
                const F& f) {
  const Problem<N>& problem = call.problem;
  const int64_t pitch = count<N>(problem.size) + 1;
  const Unit<N> unit{batch, 0, problem.positions, {problem.size, 0, problem.size[0]}};
  for (int64_t c = first; c < last; ++c)
    pack(call.input, batch, c, 1, unit.window, 0, pitch - 1, scratch.planes.get() + (c - first) * pitch);
  for (int64_t begin = 0; begin < problem.positions; begin += planar_block) {
    const int64_t points = std::min(planar_block, problem.positions - begin);
    scratch.points.start(problem, begin, points);
    for (int64_t c = first; c < last; ++c) f(unit, c, begin, points, scratch.planes.get() + (c - first) * pitch);
  }
}

template <typename A, int N>
void forward_planar(const Call<N>& call, const std::vector<A>& bias, const Sink& output) {
  const Problem<N>& problem = call.problem;
  const int64_t field = count<N>(problem.size), width = planar_channels<A>(problem), rows = problem.group_rows();
  const int64_t items = ceil_div(problem.channels, width);
  const Buffer<A> weight = pack_weight<A>(problem, call.weight, make_slice(problem, 0, problem.channels));
  const auto make = [&] {
    return PlanarScratch<A, N>{
        Points<A, N, int32_t>(planar_block), Buffer<A>(width * (field + 1)), {}, Buffer<A>((rows + 1) * planar_block)};
  };
  each(problem.batch * items, make, [&](PlanarScratch<A, N>& scratch, int64_t item) {
    const int64_t first = item % items * width, last = std::min(first + width, problem.channels);
    for_planes(call, item / items, first, last, scratch,
               [&](const Unit<N>& unit, int64_t c, int64_t begin, int64_t points, const A* plane) {
                 const int64_t group = c / problem.channels_per_offset_group();
                 A* const samples = scratch.lines.get() + rows * planar_block;
                 for (int64_t r = 0; r < rows; ++r)
                   std::fill_n(scratch.lines.get() + r * planar_block, points,
                               bias.empty() ? A(0) : bias[c * rows + r]);
                 for (int64_t tap = 0; tap < problem.taps; ++tap) {
                   scratch.points.locate(problem, unit, call.offset, call.mask, group, tap, begin, points,
                                         static_cast<int32_t>(field));
                   sample_plane(scratch.points.cells, points, plane, samples);
                   for (int64_t r = 0; r < rows; ++r) {
                     const A w = weight[(r * problem.taps + tap) * problem.channels + c];
                     A* const line = scratch.lines.get() + r * planar_block;
#pragma omp simd
                     for (int64_t i = 0; i < points; ++i) line[i] += w * samples[i];
                   }
                 }
                 for (int64_t r = 0; r < rows; ++r)
                   output.write((unit.batch * problem.out_channels + c * rows + r) * problem.positions + begin,
                                scratch.lines.get() + r * planar_block, points);
               });
  });
}

template <typename A, int N>
void backward_planar(const Call<N>& call, const Map& grad_output, const Gradients& gradients) {
  const Problem<N>& problem = call.problem;
  constexpr int corners = 1 << N;
  const int64_t field = count<N>(problem.size), rows = problem.group_rows(), taps = problem.taps;
  const int64_t together = problem.channels_per_offset_group();
  // Channels with the same offsets stay in one item, which adds up their gradients by offset.
  const int64_t width = ceil_div(planar_channels<A>(problem), together) * together;
  const int64_t items = ceil_div(problem.channels, width), weight_size = problem.out_channels * taps;
  const int64_t sums = std::min(problem.batch, weight_shares);
  const Buffer<A> weight = pack_weight<A>(problem, call.weight, make_slice(problem, 0, problem.channels));
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
      for_planes(call, batch, first, last, scratch,
                 [&](const Unit<N>& unit, int64_t c, int64_t begin, int64_t points, const A* plane) {
                   const int64_t group = c / together;
                   A* const grad_plane = scratch.grad_planes.get() + (c - first) * (field + 1);
                   for (int64_t r = 0; r < rows; ++r)
                     read_run(grad_output, batch, c * rows + r, begin, points, grads + r * planar_block);
                   for (int64_t tap = 0; tap < taps; ++tap) {
                     const A* factor = scratch.points.locate(problem, unit, call.offset, call.mask, group, tap, begin,
                                                             points, static_cast<int32_t>(field));
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
                       const A w = weight[(r * taps + tap) * problem.channels + c];
                       const A* const grad = grads + r * planar_block;
#pragma omp simd
                       for (int64_t i = 0; i < points; ++i) grad_column[i] += w * grad[i];
                     }
                     if (gradients.by_point()) {
                       A* const dots = cells.dots();
                       for (int corner = 0; corner < corners; ++corner) {
                         const int32_t* const index = cells.index(corner);
#pragma omp simd
                         for (int64_t i = 0; i < points; ++i)
                           dots[i * corners + corner] = grad_column[i] * plane[index[i]];
                       }
                       A* const lines = c % together == 0 ? totals + tap * (N + 1) * planar_block : more;
                       A* grad_shift[N];
                       for (int axis = 0; axis < N; ++axis)
                         grad_shift[axis] = gradients.offset ? lines + axis * planar_block : nullptr;
                       cells.slopes(points, factor, grad_shift, gradients.mask ? lines + N * planar_block : nullptr);
                       A* const total = totals + tap * (N + 1) * planar_block;
                       if (lines == more)
                         for (int64_t i = 0; i < (N + 1) * planar_block; ++i) total[i] += more[i];
                       if ((c + 1) % together == 0)
                         write_by_point(problem, batch, group, tap, begin, points, total, planar_block, false,
                                        gradients);
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

// sum over batch and positions, for every output channel.
template <typename A>
void sum_bias(const Map& grad_output, int64_t batch, int64_t out_channels, const Sink& out) {
  each(out_channels, [&](int64_t o) {
    constexpr int64_t run = 1024;
    A values[run];
    double total = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t p = 0; p < grad_output.positions; p += run) {
        const int64_t points = std::min(run, grad_output.positions - p);
        read_run(grad_output, b, o, p, points, values);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < points; ++i) sum += values[i];
        total += static_cast<double>(sum);
      }
    out.write(o, &total, 1);
  });
}

template <int N>
int64_t largest_window(const std::vector<Unit<N>>& units) {
  int64_t result = 0;
  for (const Unit<N>& unit : units) result = std::max(result, unit.window.positions());
  return result;
}

Tensor deform_conv(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
                   const std::string& boundary) {
  Tensor output;
  const auto run = [&]<typename A, int N>() {
    const Call<N> call({input, offset, weight, bias, stride, padding, dilation, mask, boundary}, input, offset, weight,
                       mask);
    const Problem<N>& problem = call.problem;
    std::vector<int64_t> size{problem.batch, problem.out_channels};
    size.insert(size.end(), problem.out_size.begin(), problem.out_size.end());
    output = torch::stable::new_empty(input, size);
    if (problem.batch == 0) return;
    std::vector<A> values;
    if (bias) {
      values.resize(problem.out_channels);
      const Tensor dense = torch::stable::contiguous(*bias);
      dispatch_dtype(dense.scalar_type(), [&]<typename T>() {
        for (size_t o = 0; o < values.size(); ++o) values[o] = load<A>(static_cast<const T*>(dense.data_ptr())[o]);
      });
    }
    const int64_t bytes = sizeof(A);
    if (problem.is_planar() && count<N>(problem.size) * bytes <= field_bytes)
      return forward_planar(call, values, Sink(output));
    const auto units = make_units<A>(problem, call.offset, problem.channels * bytes, field_bytes);
    const int64_t window = largest_window(units) * bytes;
    // Sums over slices of the channels do not pass through a half output.
    const bool sliced = problem.wide || window * problem.channels > 2 * field_bytes;
    const auto sum_dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const bool apart = sliced && input.scalar_type() != sum_dtype;
    const Tensor sums = apart ? torch::stable::new_empty(input, size, sum_dtype) : output;
    if (problem.wide || window > 2 * field_bytes) {
      forward<A, N, int64_t>(call, whole_units(problem), values, Sink(sums));
    } else {
      forward<A, N, int32_t>(call, units, values, Sink(sums));
    }
    if (apart) torch::stable::copy_(output, sums);
  };
  dispatch_axes(input.dim() - 2, [&]<int N>() {
    input.scalar_type() == ScalarType::Double ? run.template operator()<double, N>()
                                              : run.template operator()<float, N>();
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask, const std::string& boundary,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask must have 5 values");
  std::array<Tensor, 5> results;
  const std::array<std::optional<Tensor>, 5> like{input, offset, weight, bias, mask};
  const auto run = [&]<typename A, int N>() {
    const Call<N> call({input, offset, weight, bias, stride, padding, dilation, mask, boundary}, input, offset, weight,
                       mask);
    const Problem<N>& problem = call.problem;
    const auto size = sizes_of(grad_output);
    STD_TORCH_CHECK(grad_output.dim() == N + 2 && size[0] == problem.batch && size[1] == problem.out_channels &&
                        std::equal(problem.out_size.begin(), problem.out_size.end(), size.begin() + 2),
                    "grad_output must have the output's shape");
    STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output must have input's dtype");

    for (int i = 0; i < 5; ++i) {
      const std::vector<int64_t> shape = output_mask[i] && like[i] ? sizes_of(*like[i]) : std::vector<int64_t>{0};
      results[i] = torch::stable::new_empty(like[i] ? *like[i] : input, shape);
    }
    if (problem.batch == 0) {
      for (Tensor& result : results) torch::stable::zero_(result);
      return;
    }
    const Map grad_map(grad_output);
    const bool input_wanted = output_mask[0], offset_wanted = output_mask[1], weight_wanted = output_mask[2];
    const bool mask_wanted = output_mask[4] && mask;
    if (output_mask[3] && bias) sum_bias<A>(grad_map, problem.batch, problem.out_channels, Sink(results[3]));
    if (!(input_wanted || offset_wanted || weight_wanted || mask_wanted)) return;

    Gradients gradients;
    if (offset_wanted) gradients.offset.emplace(results[1]);
    if (weight_wanted) gradients.weight.emplace(results[2]);
    if (mask_wanted) gradients.mask.emplace(results[4]);
    if (problem.is_planar() && count<N>(problem.size) * int64_t(sizeof(A)) <= grad_field_bytes) {
      if (input_wanted) gradients.input.emplace(results[0]);
      return backward_planar<A>(call, grad_map, gradients);
    }

    // Windows of the field of bounded size.
    const int64_t bytes = sizeof(A), narrowest = std::min<int64_t>(slice_channels, problem.channels);
    auto units = make_units<A>(problem, call.offset, narrowest * bytes, grad_field_bytes);
    const int64_t window = largest_window(units) * bytes;
    const bool direct = problem.wide || window > grad_field_bytes;
    if (direct) units = whole_units(problem);
    const bool whole = static_cast<int64_t>(units.size()) == problem.batch && !direct;
    int64_t width = slice_channels;
    while (!direct && width > 1 && width * window > grad_field_bytes) width /= 2;

    const auto slices = make_slices(problem, width);
    const bool split = std::any_of(slices.begin(), slices.end(), [&](const Slice& slice) {
      return slice.begin % problem.channels_per_offset_group() != 0;
    });
    // What comes from several windows or slices adds up in A, not in a half gradient.
    const auto sum_dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    std::array<Tensor, 5> sums = results;
    if (input_wanted && !whole) sums[0] = torch::stable::new_zeros(input, sizes_of(input), sum_dtype);
    for (int i : {1, 4})
      if (split && output_mask[i] && like[i] && like[i]->scalar_type() != sum_dtype)
        sums[i] = torch::stable::new_empty(*like[i], sizes_of(*like[i]), sum_dtype);
    if (input_wanted) gradients.input.emplace(sums[0]);
    if (offset_wanted) gradients.offset.emplace(sums[1]);
    if (mask_wanted) gradients.mask.emplace(sums[4]);
    if (direct) {
      backward<A, N, int64_t>(call, grad_map, units, slices, whole, gradients);
    } else {
      backward<A, N, int32_t>(call, grad_map, units, slices, whole, gradients);
    }
    for (int i : {0, 1, 4}) {
      if (sums[i].scalar_type() == results[i].scalar_type()) {
        results[i] = sums[i];
      } else {
        torch::stable::copy_(results[i], sums[i]);
      }
    }
  };
  dispatch_axes(input.dim() - 2, [&]<int N>() {
    input.scalar_type() == ScalarType::Double ? run.template operator()<double, N>()
                                              : run.template operator()<float, N>();
  });
  return {results[0], results[1], results[2], results[3], results[4]};
}

}  // namespace
}  // namespace deformkit

STABLE_TORCH_LIBRARY_IMPL(deformkit, CPU, m) {
  m.impl("deform_conv", TORCH_BOX(&deformkit::deform_conv));
  m.impl("deform_conv_backward", TORCH_BOX(&deformkit::deform_conv_backward));
}
