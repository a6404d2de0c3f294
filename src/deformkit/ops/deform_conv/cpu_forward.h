// The output of deformable convolution: a block of positions is sampled, a chunk of taps and channels at a time, and
// multiplied at once by weights that were packed once, while its samples lie in the core's cache.
#pragma once

#include "deform_conv/cpu_products.h"
#include "deform_conv/cpu_samples.h"

namespace deformkit::conv {

constexpr int64_t field_bytes = 16 * mib;  // of the windows that are laid out at a time, for all threads together

// Positions of a block and columns of a chunk. More positions, and deeper chunks, pay better for reading weights and
// sums; samples and sums of a block stay in a core's second-level cache. `benchmarks/run.py conv --rivals plain`
// measures them again. Tiles of two axes instead of runs of positions find their rows in the cache more often, and lost
// as much again when they read offsets.
constexpr int64_t forward_depth = 384, forward_block = 192, sum_bytes = 512 * 1024;

template <typename A, int N>
int64_t forward_positions(const Problem<N>& problem) {
  const int64_t room = sum_bytes / (problem.out_channels * static_cast<int64_t>(sizeof(A)));
  return std::min({forward_block, whole_vectors<A>(std::max<int64_t>(room, 24)), problem.positions});
}

// Lays out the windows of units[first, last), piece by piece, each followed by its row of zeros; returns where each
// window starts.
template <typename A, int N>
std::vector<int64_t> pack_units(const Map& input, const std::vector<Unit<N>>& units, size_t first, size_t last,
                                const Plan<N>& plan, Buffer<A>& rows) {
  constexpr int64_t run = 1024;
  std::vector<int64_t> place{0};
  std::vector<std::pair<size_t, int64_t>> runs;
  for (size_t u = first; u < last; ++u) {
    const int64_t positions = units[u].window.positions();
    place.push_back(place.back() + (positions + 1) * plan.channels());
    for (int64_t p = 0; p < positions; p += run) runs.emplace_back(u, p);
  }
  rows = Buffer<A>(place.back());
  each(static_cast<int64_t>(runs.size()), [&](int64_t i) {
    const auto [u, p] = runs[i];
    const Window<N>& window = units[u].window;
    for (const Piece& piece : plan.pieces)
      pack(input, units[u].batch, piece.begin, piece.channels, window, p, std::min(p + run, window.positions()),
           rows.get() + place[u - first] + (piece.begin - plan.begin) * (window.positions() + 1));
  });
  return place;
}

// One slice of channels of a run of units; `add` adds to the output of the slices before.
template <typename A, int N>
class Forward {
 public:
  Forward(const Call<N>& call, const Cut& cut, const Plan<N>& plan, const std::vector<A>& bias, const Sink& output)
      : call_(call),
        problem_(call.problem),
        cut_(cut),
        plan_(plan),
        bias_(bias),
        output_(output),
        paired_(is_paired(problem_, call.weight.scalar_type())),
        samples_pairs_(paired_ && std::all_of(plan.products.begin(), plan.products.end(),
                                              [](const Product& product) { return product.depth % 2 == 0; })),
        weights_(problem_, plan, call.weight),
        rows_(problem_.group_rows()),
        pitch_(problem_.is_narrow() ? plan.channels() : whole_vectors<A>(rows_)),
        block_(forward_positions<A>(problem_)),
        pairs_pitch_(column_pitch<A>(ceil_div(plan.widest, 2))) {}

  void run(const std::vector<Unit<N>>& units, size_t first, size_t last) const {
    Buffer<A> field;
    std::vector<int64_t> place(last - first + 1);
    if (cut_.lays_out()) place = pack_units(call_.input, units, first, last, plan_, field);
    // Of all units together an even number, so that two threads have the same to do.
    std::vector<std::pair<size_t, Block>> blocks;
    for (size_t u = first; u < last; ++u)
      for (const Block& block : cut_into_blocks<A>(units[u], block_, (last - first) % 2 != 0))
        blocks.emplace_back(u, block);
    const auto make = [&] { return Scratch(*this); };
    each(static_cast<int64_t>(blocks.size()), make, [&](Scratch& scratch, int64_t item) {
      const auto& [u, block] = blocks[item];
      const auto [begin, points] = block;
      scratch.samples.start(units[u], field.get() + place[u - first], plan_, begin, points);
      start(scratch, points);
      for (const Chunk& chunk : plan_.chunks) {
        sample(scratch, chunk);
        problem_.is_narrow() ? multiply_narrow(scratch, chunk, points) : multiply(scratch, chunk, points);
      }
      const int64_t batch = units[u].batch;
      problem_.is_narrow() ? finish_narrow(scratch, batch, begin, points)
                           : write_products(problem_, plan_, scratch.sums.get(), pitch_, batch, begin, points, output_);
    });
  }

 private:
  // sums: [groups, points, rows], or [rows, points, channels] when groups are narrow.
  struct Scratch {
    Samples<A, N> samples;
    Buffer<A> columns, sums, line;
    Buffer<Pair> pairs;
    int64_t pitch;

    explicit Scratch(const Forward& f)
        : samples(f.call_, f.cut_, f.block_, f.plan_.channels(), false),
          columns(f.samples_pairs_ ? 0 : f.block_ * column_pitch<A>(f.plan_.widest)),
          sums(f.block_ * f.pitch_ * (f.problem_.is_narrow() ? f.rows_ : f.plan_.groups())),
          line(f.block_),
          pairs(f.paired_ ? f.block_ * f.pairs_pitch_ : 0),
          pitch(column_pitch<A>(f.plan_.widest)) {}
  };

  void start(Scratch& scratch, int64_t points) const {
    const int64_t outer = problem_.is_narrow() ? rows_ : plan_.groups();
    std::fill_n(scratch.sums.get(), outer * points * pitch_, A(0));
    if (bias_.empty() || problem_.is_narrow()) return;
    for (int64_t g = 0; g < plan_.groups(); ++g) {
      const int64_t group = plan_.first_group() + g;
      for (int64_t i = 0; plan_.starts_group(group) && i < points; ++i)
        std::copy_n(bias_.data() + group * rows_, rows_, scratch.sums.get() + (g * points + i) * pitch_);
    }
  }

  void sample(Scratch& scratch, const Chunk& chunk) const {
    for (size_t s = chunk.first_segment; s < chunk.last_segment; ++s) {
      const Segment& segment = plan_.segments[s];
      if constexpr (has_pairs<A>) {
        if (samples_pairs_) {
          scratch.samples.gather(segment, &scratch.pairs.get()->first + segment.column, 2 * pairs_pitch_);
          continue;
        }
      }
      scratch.samples.gather(segment, scratch.columns.get() + segment.column, scratch.pitch);
    }
  }

  void multiply(Scratch& scratch, const Chunk& chunk, int64_t points) const {
    const Columns<A> columns{samples_pairs_ ? nullptr : scratch.columns.get(), scratch.pitch,
                             paired_ ? scratch.pairs.get() : nullptr, pairs_pitch_};
    add_products(plan_, chunk, weights_, rows_, points, columns, scratch.sums.get(), pitch_);
  }

  void multiply_narrow(Scratch& scratch, const Chunk& chunk, int64_t points) const {
    const Segment& segment = plan_.segments[chunk.first_segment];
    for (int64_t r = 0; r < rows_; ++r) {
      const A* const w = weights_.narrow(r, segment);
      for (int64_t i = 0; i < points; ++i) {
        A* const sum = scratch.sums.get() + (r * points + i) * pitch_ + segment.begin - plan_.begin;
        const A* const column = scratch.columns.get() + i * scratch.pitch;
#pragma omp simd
        for (int64_t c = 0; c < segment.channels; ++c) sum[c] += w[c] * column[c];
      }
    }
  }

  int64_t place(int64_t batch, int64_t out_channel, int64_t position) const {
    return (batch * problem_.out_channels + out_channel) * problem_.positions + position;
  }

  void finish_narrow(Scratch& scratch, int64_t batch, int64_t begin, int64_t points) const {
    A* const line = scratch.line.get();
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = plan_.begin, next; c < plan_.end; c = next) {
        const int64_t group = c / problem_.group_channels, o = group * rows_ + r;
        next = std::min(plan_.end, (group + 1) * problem_.group_channels);
        const bool starts = plan_.starts_group(group);
        std::fill_n(line, points, starts && !bias_.empty() ? bias_[o] : A(0));
        for (int64_t i = 0; i < points; ++i)
          for (int64_t own = c - plan_.begin; own < next - plan_.begin; ++own)
            line[i] += scratch.sums[(r * points + i) * pitch_ + own];
        output_.write(place(batch, o, begin), line, points, !starts);
      }
  }

  const Call<N>& call_;
  const Problem<N>& problem_;
  const Cut& cut_;
  const Plan<N>& plan_;
  const std::vector<A>& bias_;
  const Sink& output_;
  // Samples are written as pairs at once where no product has an odd column, which has a zero beside it.
  bool paired_, samples_pairs_;
  Weights<A, N> weights_;
  int64_t rows_, pitch_, block_, pairs_pitch_;
};

// All slices, over as many units at a time as their windows fit.
template <typename A, int N>
void forward(const Call<N>& call, const Cut& cut, const std::vector<A>& bias, const Sink& output) {
  const Problem<N>& problem = call.problem;
  const std::vector<Unit<N>> units = make_units(problem, cut);
  for (const auto& [begin, end] : slices_of(problem, cut.channels)) {
    const Plan<N> plan(problem, begin, end, forward_depth);
    const Forward<A, N> slice(call, cut, plan, bias, output);
    for (size_t first = 0, last; first < units.size(); first = last) {
      int64_t positions = 0;
      for (last = first; last < units.size(); ++last) {
        positions += units[last].window.positions() + 1;
        if (last > first && positions * (end - begin) * static_cast<int64_t>(sizeof(A)) > field_bytes) break;
      }
      slice.run(units, first, last);
    }
  }
}

}  // namespace deformkit::conv
