// The gradients of deformable convolution, and its output beside them where a caller needs both. An item of work owns a
// slice of the channels for a share of the batch, and with it their part of the gradient of the field, so that no
// element is written by two threads.
#pragma once

#include "deform_conv/cpu_products.h"
#include "deform_conv/cpu_samples.h"

namespace deformkit::conv {

constexpr int64_t grad_field_bytes = 8 * mib;   // of a window, of which a thread holds two: the field and its gradient
constexpr int64_t slice_channels = 32;          // that an item owns
constexpr int64_t weight_shares = 8;            // into which the sum for the weight's gradient is cut, at most
constexpr int64_t weight_sum_bytes = 16 * mib;  // of all these sums

// Positions of a block and columns of a chunk. Samples, their gradients, and the output's gradient of a block stay in
// a core's second-level cache. `benchmarks/run.py conv --rivals plain` measures them again.
constexpr int64_t backward_block = 144, backward_depth = 64;

// Positions of a block for matrix registers, which read and write the gradient by the weight once for each block:
// convolutions took 0.82 to 1.00 of the time with blocks of 144. `benchmarks/run.py half --case conv` measures it
// again.
constexpr int64_t backward_matrix_block = 256;

// How many rows of the output's gradient are asked for before they are read, into the first cache: into the second, 48
// rows ahead as in sample/rows.h, the backward pass took 1 % longer. The same command measures it.
constexpr int64_t grads_ahead = 16;

// Blocks whose part of the weight's gradient is summed before it is added to the rest: one sum over the blocks of a
// large image would lose digits.
constexpr int64_t blocks_of_part = 64;

// The output is computed beside the gradients if the weight of a slice has at most so many bytes. The products read two
// copies of it and write its gradient, which then leave the second-level cache: with 256 KiB the gradients of a
// transposed convolution took 0.94 to 0.97 of the time of two walks, with 512 KiB 1.00 to 1.08. `benchmarks/run.py
// transpose --rivals plain` measures it.
constexpr int64_t output_weight_bytes = 384 * 1024;

// The width of a slice, which depends on the shape only; few channels still give work to two threads.
template <int N>
int64_t backward_width(const Problem<N>& problem) {
  int64_t width = std::min(slice_channels, problem.channels);
  while (width > 8 && problem.channels < 2 * width) width /= 2;
  return width;
}

// Whether Backward can compute the output, and is not slower for it.
template <typename A, int N>
bool computes_output(const Problem<N>& problem) {
  const int64_t columns = backward_width(problem) * problem.taps;
  return !problem.is_narrow() && !problem.is_planar() &&
         columns * problem.group_rows() * static_cast<int64_t>(sizeof(A)) <= output_weight_bytes;
}

template <typename A, int N>
class Backward {
 public:
  // The output is computed if there is a place for it.
  Backward(const Call<N>& call, const Cut& cut, const Map& grad_output, const Gradients& gradients,
           const std::optional<Sink>& output)
      : call_(call),
        problem_(call.problem),
        cut_(cut),
        grad_output_(grad_output),
        gradients_(gradients),
        output_(output),
        units_(make_units(problem_, cut)),
        rows_(problem_.group_rows()),
        by_columns_(gradients.input || gradients.by_point()),
        samples_(gradients.weight || output),
        paired_(is_paired(problem_, call.weight.scalar_type())),
        turns_pairs_(paired_ && amx::is_there()),
        pitch_(whole_vectors<A>(rows_)),
        block_(std::min(turns_pairs_ ? backward_matrix_block : backward_block, problem_.positions)),
        pair_rows_(ceil_div(rows_, 2)),
        pair_pitch_(whole_vectors<A>(ceil_div(block_, 2))),
        turned_pitch_(whole_vectors<A>(pair_rows_) + Tile<A>::lanes),
        pairs_of_rows_(turns_pairs_ ? block_ * turned_pitch_ : pair_rows_ * block_) {
    for (const auto& [begin, end] : slices_of(problem_, cut.channels))
      plans_.emplace_back(problem_, begin, end, backward_depth);
    const int64_t weight_bytes =
        problem_.out_channels * problem_.group_channels * problem_.taps * static_cast<int64_t>(sizeof(A));
    shares_ = std::clamp<int64_t>(
        std::min({ceil_div(weight_shares, slices()), problem_.batch, weight_sum_bytes / weight_bytes}), 1,
        weight_shares);
    for (const Plan<N>& plan : plans_) {
      if (by_columns_) weights_.emplace_back(problem_, plan, call.weight, true);
      if (output_) output_weights_.emplace_back(problem_, plan, call.weight);
      widest_ = std::max(widest_, column_pitch<A>(plan.widest));
      channels_ = std::max(channels_, plan.channels());
      grads_ = std::max(grads_, problem_.is_narrow() ? plan.channels() : plan.groups());
      groups_ = std::max(groups_, plan.groups());
      sums_.push_back(WeightSums<A, N>(problem_, plan));
      if (gradients.weight) part_ = std::max(part_, sums_.back().size());
    }
    for (const Unit<N>& unit : units_) window_ = std::max(window_, unit.window.positions() + 1);
  }

  void run() {
    std::vector<Buffer<A>> weight_sums;
    for (int64_t item = 0; gradients_.weight && item < shares_ * slices(); ++item) {
      const int64_t size = sums_[item % slices()].size();
      weight_sums.emplace_back(size);
      std::fill_n(weight_sums.back().get(), size, A(0));
    }
    Turns turns(shares_ * slices());
    each(
        shares_ * slices(), [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t item) {
          const int64_t share = item / slices(), per_sample = static_cast<int64_t>(units_.size()) / problem_.batch;
          const int64_t last = problem_.batch * (share + 1) / shares_ * per_sample;
          scratch.slice = item % slices();
          A* const total = gradients_.weight ? weight_sums[item].get() : nullptr;
          int64_t step = 0;
          for (int64_t u = problem_.batch * share / shares_ * per_sample; u < last; ++u) {
            open(scratch, units_[u]);
            for (const auto [begin, points] : cut_into_blocks<A>(units_[u], block_, false)) {
              block(scratch, units_[u], begin, points);
              if (adds_output(plan(scratch)) || adds_by_point(plan(scratch))) turns.wait(item, step);
              add_to_others(scratch, units_[u].batch, begin, points);
              turns.finish(item, step);
              if (++step % blocks_of_part == 0) add_part(scratch, total);
            }
            close(scratch, units_[u]);
          }
          add_part(scratch, total);
        },
        &turns);
    if (gradients_.weight) write_weight(weight_sums);
  }

 private:
  struct Scratch {
    Samples<A, N> samples;
    Buffer<A> field, grad_field, columns, grad_columns, grads, line, narrow_sum;
    Buffer<A> by_point, more_by_point;
    Buffer<A> shared_by_point;  // of all taps of the offset group that an earlier slice has, too
    Buffer<Pair> pairs, pairs_of_rows, pairs_of_points;
    Buffer<A> weight_part, sums;
    int64_t slice = 0;

    explicit Scratch(const Backward& b)
        : samples(b.call_, b.cut_, b.block_, b.channels_, true),
          field(b.cut_.lays_out() ? b.window_ * b.channels_ : 0),
          grad_field(b.cut_.lays_out() ? b.window_ * b.channels_ : 0),
          columns(b.block_ * b.widest_),
          grad_columns(b.block_ * b.widest_),
          grads(b.paired_ ? 0 : b.block_ * b.rows_ * b.grads_ + Tile<A>::lanes),
          line(b.block_),
          narrow_sum(b.channels_),
          by_point((N + 1) * b.block_),
          more_by_point((N + 1) * b.block_),
          shared_by_point(b.gradients_.by_point() ? b.problem_.taps * (N + 1) * b.block_ : 0),
          pairs(b.paired_ ? b.block_ * b.widest_ : 0),
          pairs_of_rows(b.paired_ ? b.grads_ * b.pairs_of_rows_ + Tile<A>::lanes : 0),
          pairs_of_points(b.paired_ ? 2 * b.pair_rows_ * b.grads_ * b.pair_pitch_ : 0),
          weight_part(b.part_),
          sums(b.output_ ? b.groups_ * b.block_ * b.pitch_ : 0) {
      std::fill_n(weight_part.get(), b.part_, A(0));
      // An odd number of rows has one more, which stays zero.
      if (b.paired_) std::fill_n(pairs_of_points.get(), 2 * b.pair_rows_ * b.grads_ * b.pair_pitch_, Pair{});
    }
  };

  int64_t slices() const { return static_cast<int64_t>(plans_.size()); }
  const Plan<N>& plan(const Scratch& scratch) const { return plans_[scratch.slice]; }

  // Whether what the slice computes is added to what earlier ones have.
  bool adds_output(const Plan<N>& plan) const { return output_ && !plan.starts_group(plan.first_group()); }
  bool adds_by_point(const Plan<N>& plan) const {
    return gradients_.by_point() && !plan.starts_offset_group(plan.first_offset_group());
  }

  void open(Scratch& scratch, const Unit<N>& unit) const {
    if (!cut_.lays_out()) return;
    const int64_t positions = unit.window.positions();
    if (samples_ || gradients_.by_point())
      for (const Piece& piece : plan(scratch).pieces)
        pack(call_.input, unit.batch, piece.begin, piece.channels, unit.window, 0, positions,
             scratch.field.get() + (piece.begin - plan(scratch).begin) * (positions + 1));
    if (gradients_.input) std::fill_n(scratch.grad_field.get(), (positions + 1) * plan(scratch).channels(), A(0));
  }

  void close(Scratch& scratch, const Unit<N>& unit) const {
    if (!gradients_.input || !cut_.lays_out()) return;
    const int64_t positions = unit.window.positions();
    for (const Piece& piece : plan(scratch).pieces)
      unpack(scratch.grad_field.get() + (piece.begin - plan(scratch).begin) * (positions + 1), piece.channels,
             unit.window, *gradients_.input, (unit.batch * problem_.channels + piece.begin) * problem_.field(),
             positions < problem_.field());
  }

  void block(Scratch& scratch, const Unit<N>& unit, int64_t begin, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    scratch.samples.start(unit, scratch.field.get(), plan, begin, points);
    read_grads(scratch, unit.batch, begin, points);
    if (output_) std::fill_n(scratch.sums.get(), plan.groups() * points * pitch_, A(0));
    for (const Chunk& chunk : plan.chunks) {
      if (by_columns_) find_grad_columns(scratch, chunk, points);
      for (size_t s = chunk.first_segment; s < chunk.last_segment; ++s)
        walk(scratch, plan.segments[s], unit.batch, begin, points);
      if (gradients_.weight) add_grad_weight(scratch, chunk, points);
      if (output_) {
        const Columns<A> columns{scratch.columns.get(), widest_, paired_ ? scratch.pairs.get() : nullptr, widest_};
        add_products(plan, chunk, output_weights_[scratch.slice], rows_, points, columns, scratch.sums.get(), pitch_);
      }
    }
  }

  // Stores what earlier slices may have added to, when it is the slice's turn.
  void add_to_others(Scratch& scratch, int64_t batch, int64_t begin, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    if (output_) write_products(problem_, plan, scratch.sums.get(), pitch_, batch, begin, points, *output_);
    for (int64_t tap = 0; adds_by_point(plan) && tap < problem_.taps; ++tap)
      write_by_point(problem_, batch, plan.first_offset_group(), tap, begin, points, shared_by_point(scratch, tap),
                     block_, true, gradients_);
  }

  A* shared_by_point(const Scratch& scratch, int64_t tap) const {
    return scratch.shared_by_point.get() + tap * (N + 1) * block_;
  }

  // The output's gradient: [groups, rows, points], or [rows, points, channels] when groups are narrow.
  void read_grads(Scratch& scratch, int64_t batch, int64_t begin, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    A* const grads = scratch.grads.get();
    if (paired_) return read_pairs(scratch, batch, begin, points);
    if (!problem_.is_narrow()) {
      for (int64_t o = 0; o < plan.groups() * rows_; ++o) {
        const int64_t row = plan.first_group() * rows_ + o;
        ask_for_run(grad_output_, batch, row + grads_ahead, begin, points);
        read_run(grad_output_, batch, row, begin, points, grads + o * points);
      }
      return;
    }
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < plan.channels(); ++c) {
        const int64_t group = (plan.begin + c) / problem_.group_channels;
        read_run(grad_output_, batch, group * rows_ + r, begin, points, scratch.line.get());
        for (int64_t i = 0; i < points; ++i) grads[(r * points + i) * plan.channels() + c] = scratch.line[i];
      }
  }

  // The same in pairs: of neighbouring points, as they lie, and of neighbouring rows. What an odd last point or row has
  // beside it is zero.
  void read_pairs(Scratch& scratch, int64_t batch, int64_t begin, int64_t points) const {
    if constexpr (has_pairs<A>) {
      const Plan<N>& plan = plans_[scratch.slice];
      for (int64_t g = 0; g < plan.groups(); ++g) {
        const auto row = [&](int64_t r) { return &pairs_of_points(scratch, g)[r * pair_pitch_].first; };
        for (int64_t r = 0; r < rows_; ++r) {
          const int64_t of_output = (plan.first_group() + g) * rows_ + r;
          ask_for_run(grad_output_, batch, of_output + grads_ahead, begin, points);
          copy_run(grad_output_, batch, of_output, begin, points, row(r));
          if (points % 2 != 0) row(r)[points] = {};
        }
        Pair* const pairs = scratch.pairs_of_rows.get() + g * pairs_of_rows_;
        if (turns_pairs_) {
          pair_and_turn_rows(row(0), 2 * pair_rows_, points, 2 * pair_pitch_, pairs, turned_pitch_);
        } else {
          pair_rows(row(0), 2 * pair_rows_, points, 2 * pair_pitch_, pairs, points);
        }
      }
    }
  }

  Pair* pairs_of_points(Scratch& scratch, int64_t group) const {
    return scratch.pairs_of_points.get() + group * 2 * pair_rows_ * pair_pitch_;
  }
  Left<Pair> pairs_of_rows(const Scratch& scratch, int64_t group, int64_t points) const {
    const Pair* const pairs = scratch.pairs_of_rows.get() + group * pairs_of_rows_;
    return turns_pairs_ ? Left<Pair>{pairs, turned_pitch_, 1} : Left<Pair>{pairs, 1, points};
  }

  // Computes the gradient by the columns of a chunk: the gradient of the output times the weight.
  void find_grad_columns(Scratch& scratch, const Chunk& chunk, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    const Weights<A, N>& weights = weights_[scratch.slice];
    if (problem_.is_narrow()) return find_narrow(scratch, plan.segments[chunk.first_segment], points);
    for (size_t p = chunk.first_product; p < chunk.last_product; ++p) {
      const Product& product = plan.products[p];
      const A* const grads = scratch.grads.get() + (product.group - plan.first_group()) * rows_ * points;
      A* const to = scratch.grad_columns.get() + product.column;
      if constexpr (has_pairs<A>) {
        if (paired_) {
          const Left<Pair> left = pairs_of_rows(scratch, product.group - plan.first_group(), points);
          multiply(points, product.depth, pair_rows_, left, weights.template of<Pair>(p), to, widest_, false);
          continue;
        }
      }
      multiply(points, product.depth, rows_, Left<A>{grads, 1, points}, weights.template of<A>(p), to, widest_, false);
    }
  }

  void find_narrow(Scratch& scratch, const Segment& segment, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    for (int64_t i = 0; i < points; ++i) {
      A* const column = scratch.grad_columns.get() + i * widest_;
      std::fill_n(column, segment.channels, A(0));
      for (int64_t r = 0; r < rows_; ++r) {
        const A* const w = weights_[scratch.slice].narrow(r, segment);
        const A* const grad = scratch.grads.get() + (r * points + i) * plan.channels() + segment.begin - plan.begin;
#pragma omp simd
        for (int64_t c = 0; c < segment.channels; ++c) column[c] += w[c] * grad[c];
      }
    }
  }

  // Samples a segment again, and computes its gradients by field, offset and mask.
  void walk(Scratch& scratch, const Segment& segment, int64_t batch, int64_t begin, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    const bool adds = !plan.starts_offset_group(segment.offset_group);
    A* const total = adds ? shared_by_point(scratch, segment.tap) : scratch.by_point.get();
    A* const by_point = segment.first ? total : scratch.more_by_point.get();
    Walk<A, N, LaidOut> walked{};
    walked.pitch = widest_;
    if (by_columns_) walked.grad_columns = scratch.grad_columns.get() + segment.column;
    if (samples_) walked.columns = scratch.columns.get() + segment.column;
    if (gradients_.offset)
      for (int axis = 0; axis < N; ++axis) walked.grad_shift[axis] = by_point + axis * block_;
    if (gradients_.mask) walked.grad_factor = by_point + N * block_;
    scratch.samples.walk(segment, walked, scratch.grad_field.get(),
                         gradients_.input ? gradients_.input->template data<A>() : nullptr);
    if (!gradients_.by_point()) return;
    if (!segment.first)
      for (int64_t i = 0; i < (N + 1) * block_; ++i) total[i] += by_point[i];
    if (segment.last && !adds)
      write_by_point(problem_, batch, segment.offset_group, segment.tap, begin, points, total, block_, false,
                     gradients_);
  }

  // Adds the output's gradient times the columns of a chunk to the gradient by the weight.
  void add_grad_weight(Scratch& scratch, const Chunk& chunk, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    const WeightSums<A, N>& sums = sums_[scratch.slice];
    if (problem_.is_narrow()) return add_narrow(scratch, plan.segments[chunk.first_segment], points);
    for (size_t p = chunk.first_product; p < chunk.last_product; ++p) {
      const Product& product = plan.products[p];
      const A* const grads = scratch.grads.get() + (product.group - plan.first_group()) * rows_ * points;
      const A* const columns = scratch.columns.get() + product.column;
      A* const to = scratch.weight_part.get() + sums.of(p);
      if constexpr (has_pairs<A>) {
        if (paired_) {
          const int64_t depth = ceil_div(points, 2);
          const Pair* const left = pairs_of_points(scratch, product.group - plan.first_group());
          pair_rows(columns, points, product.depth, widest_, scratch.pairs.get(), widest_);
          multiply(rows_, product.depth, depth, Left<Pair>{left, pair_pitch_, 1},
                   Panels<Pair>::of_matrix(scratch.pairs.get(), widest_), to, whole_vectors<A>(product.depth), true);
          continue;
        }
      }
      multiply(rows_, product.depth, points, Left<A>{grads, points, 1}, Panels<A>::of_matrix(columns, widest_), to,
               whole_vectors<A>(product.depth), true);
    }
  }

  void add_narrow(Scratch& scratch, const Segment& segment, int64_t points) const {
    const Plan<N>& plan = plans_[scratch.slice];
    for (int64_t r = 0; r < rows_; ++r) {
      // Each block has its own sum, because one sum over all positions would lose digits.
      A* const sum = scratch.narrow_sum.get();
      std::fill_n(sum, segment.channels, A(0));
      for (int64_t i = 0; i < points; ++i) {
        const A* const grad = scratch.grads.get() + (r * points + i) * plan.channels() + segment.begin - plan.begin;
        const A* const column = scratch.columns.get() + i * widest_;
#pragma omp simd
        for (int64_t c = 0; c < segment.channels; ++c) sum[c] += grad[c] * column[c];
      }
      A* const to = scratch.weight_part.get() + sums_[scratch.slice].narrow(r, segment);
      for (int64_t c = 0; c < segment.channels; ++c) to[c] += sum[c];
    }
  }

  // Adds the part of the last blocks to the sum of an item, and starts the next part.
  void add_part(Scratch& scratch, A* total) const {
    A* const part = scratch.weight_part.get();
    for (int64_t i = 0; total && i < sums_[scratch.slice].size(); ++i) total[i] += part[i], part[i] = 0;
  }

  void write_weight(const std::vector<Buffer<A>>& weight_sums) const {
    each(slices(), [&](int64_t slice) {
      A* const total = weight_sums[slice].get();
      for (int64_t share = 1; share < shares_; ++share)
        for (int64_t i = 0; i < sums_[slice].size(); ++i) total[i] += weight_sums[share * slices() + slice][i];
      dispatch_dtype(gradients_.weight->dtype(),
                     [&]<typename T>() { sums_[slice].write(total, gradients_.weight->template data<T>()); });
    });
  }

  const Call<N>& call_;
  const Problem<N>& problem_;
  const Cut& cut_;
  const Map& grad_output_;
  const Gradients& gradients_;
  const std::optional<Sink>& output_;
  std::vector<Unit<N>> units_;
  int64_t rows_;
  bool by_columns_, samples_, paired_;
  bool turns_pairs_;  // matrix registers read the pairs of neighbouring rows of a point beside each other
  int64_t pitch_, block_, shares_ = 1, widest_ = 0, channels_ = 0, grads_ = 0, groups_ = 0, window_ = 0, part_ = 0;
  int64_t pair_rows_, pair_pitch_, turned_pitch_, pairs_of_rows_;
  std::vector<Plan<N>> plans_;
  std::vector<Weights<A, N>> weights_, output_weights_;
  std::vector<WeightSums<A, N>> sums_;
};

}  // namespace deformkit::conv
