// Deformable convolution by columns: gather the samples of a block of positions into columns that stay in cache, then
// one matrix product per block.
//
//   K taps   P positions of a block   S channels of a slice
//   columns [P, K, S], one such part for each group in the slice
#pragma once

#include "deform_conv/cpu_problem.h"

namespace deformkit::conv {

// Calls f(tap, piece, factor, rows) with the cells of one block located, for every tap and every piece of the slice;
// `rows` is the field to sample. A field too large to lay out comes channel by channel,
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
        const auto outside = static_cast<Index>(unit.window.positions() * slice.channels());
        const A* factor =
            scratch.locate(problem, unit, call.offset, call.mask, group, tap, begin, points, slice.channels(), outside);
        for (size_t i = first; i < next; ++i)
          f(tap, slice.pieces[i], factor, rows + slice.pieces[i].begin - slice.begin);
      } else {
        for (size_t i = first; i < next; ++i) {
          for (int64_t c = 0; c < slice.pieces[i].channels; ++c) {
            const Piece& piece = slice.pieces[i];
            const Piece one{
                piece.part, group, piece.begin + c, 1, piece.first && c == 0, piece.last && c + 1 == piece.channels};
            const A* factor = scratch.locate(problem, unit, call.offset, call.mask, group, tap, begin, points, 1, -1);
            compact(call.input, unit.batch, one.begin, points, scratch.cells, scratch.where.get(),
                    scratch.corners.get());
            f(tap, one, factor, scratch.corners.get());
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
                  [&](int64_t tap, const Piece& piece, const A*, const A* field) {
                    gather<true>(scratch.points.cells, points, 1, LaidOut<const A>{field}, piece.channels,
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
  each(
      sums * slice_count, make,
      [&](BackwardScratch<A, N, Index>& scratch, int64_t item) {
        const int64_t own = item % slice_count, share_of_batch = item / slice_count;
        const Slice& slice = slices[own];
        const int64_t width = slice.channels();
        // An offset group that begins in an earlier slice: its gradients by offset and mask are added up slice by
        // slice.
        const bool follows = gradients.by_point() && slice.begin % per_offset != 0;
        int64_t step = 0;
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
                      [&](int64_t tap, const Piece& piece, const A* factor, const A* field_rows) {
                        const Part& part = slice.parts[piece.part];
                        const int64_t in_part = tap * part.channels + piece.begin - part.begin;
                        A* const by_point = (piece.first ? scratch.by_point : scratch.more_by_point).get();
                        A* const corners = scratch.points.corners.get() + (direct ? block << N : 0);
                        Walk<A, N, LaidOut> walked{};
                        walked.field.first = field_rows;
                        walked.channels = piece.channels;
                        walked.pitch = problem.taps * part.channels;
                        if (by_columns) walked.grad_columns = by_part[piece.part] + in_part;
                        if (gradients.weight)
                          walked.columns = scratch.columns.get() + column_of(problem, slice, piece, tap, points);
                        if (gradients.input)
                          walked.grad_field.first =
                              direct ? corners : scratch.grad_rows.get() + piece.begin - slice.begin;
                        if (gradients.offset)
                          for (int axis = 0; axis < N; ++axis) walked.grad_shift[axis] = by_point + axis * block;
                        if (gradients.mask) walked.grad_factor = by_point + N * block;
                        if (direct && gradients.input) std::fill_n(corners, points << N, A(0));
                        walk(scratch.points.cells, points, factor, walked);

                        if (direct && gradients.input) {
                          A* plane = gradients.input->template data<A>() +
                                     (unit.batch * problem.channels + piece.begin) * field;
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
                                scratch.columns.get() + points * problem.taps * (part.begin - slice.begin), points,
                                sum);
                grad += rows * points * (problem.is_narrow() ? part.channels : 1);
                sum += rows * problem.taps * part.channels;
              }
            }
          }
          if (gradients.input && !direct)
            unpack(scratch.grad_rows.get(), width, unit.window, *gradients.input,
                   (unit.batch * problem.channels + slice.begin) * field, !whole);
        }
      },
      &turns);

  if (gradients.weight) {
    each(slice_count, [&](int64_t own) {
      A* total = weight_sums[own].get();
      const int64_t size = rows * problem.taps * slices[own].channels();
      for (int64_t share_of_batch = 1; share_of_batch < sums; ++share_of_batch)
        for (int64_t i = 0; i < size; ++i) total[i] += weight_sums[share_of_batch * slice_count + own][i];
      dispatch_dtype(gradients.weight->dtype(), [&]<typename T>() {
        T* out = gradients.weight->template data<T>();
        for (int64_t r = 0; r < rows; ++r)
          for_weight(problem, slices[own], r, [&](int64_t packed, int64_t at, int64_t channels, int64_t pitch) {
            for (int64_t c = 0; c < channels; ++c)
              for (int64_t k = 0; k < problem.taps; ++k)
                out[at + c * problem.taps + k] = store<T>(total[packed + k * pitch + c]);
          });
      });
    });
  }
}

}  // namespace deformkit::conv
