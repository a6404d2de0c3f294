// Depthwise deformable convolution whose channels have their own offsets, computed channel by channel.
#pragma once

#include "deform_conv/cpu_weights.h"
#include "sample/inner.h"
#include "sample/plane.h"

namespace deformkit::conv {

// The memory of one thread for the channels of a planar item.
template <typename A, int N>
struct PlanarScratch {
  Points<A, N, int32_t> points;
  Buffer<A> planes, grad_planes, lines;
};

// Points of a run, and shares into which the sum for the weight's gradient is cut, at most.
constexpr int64_t planar_block = 512, planar_shares = 8;

// Channels that share an item: as many as let their planes stay in cache, and no more than spread over the threads.
template <typename A, int N>
int64_t planar_channels(const Problem<N>& problem) {
  return std::clamp<int64_t>(mib / 4 / (count<N>(problem.size) * static_cast<int64_t>(sizeof(A))), 1, 16);
}

// Calls f(channel, begin, points, plane) for every channel and block of some samples, with the origins set.
template <typename A, int N, typename F>
void for_planes(const Call<N>& call, int64_t batch, int64_t first, int64_t last, PlanarScratch<A, N>& scratch,
                const F& f) {
  const Problem<N>& problem = call.problem;
  const int64_t pitch = count<N>(problem.size) + 1;
  const Window<N> window{problem.size, 0, problem.size[0]};
  for (int64_t c = first; c < last; ++c)
    pack(call.input, batch, c, 1, window, 0, pitch - 1, scratch.planes.get() + (c - first) * pitch);
  for (int64_t begin = 0; begin < problem.positions; begin += planar_block) {
    const int64_t points = std::min(planar_block, problem.positions - begin);
    scratch.points.start(problem, begin, points);
    for (int64_t c = first; c < last; ++c) f(c, begin, points, scratch.planes.get() + (c - first) * pitch);
  }
}

// Calls in_registers(cells, i) for each register of the points of a tap, from the point i on, whose cells lie in the
// plane; general(i, some), with some points located, for the others.
template <typename A, int N, typename F, typename G>
void for_registers(const Problem<N>& problem, Points<A, N, int32_t>& points, int64_t tap, const A* factor,
                   int64_t count, const F& in_registers, const G& general) {
  const auto locate = [&](int64_t i, int64_t some) {
    points.locate(problem, {problem.size, 0, problem.size[0]}, tap, factor, some, 1,
                  static_cast<int32_t>(problem.field()), i);
    general(i, some);
  };
  if constexpr (std::is_same_v<A, float>) {
    using Cells = InnerCells<N>;
    using Reals = typename Cells::Reals;
    using Indices = typename Cells::Indices;
    // All are found before the first is used, so that the processor need not wait for one to find the next.
    Cells found[planar_block / Cells::Run::lanes];
    int64_t place[planar_block / Cells::Run::lanes], registers = 0;
    const InnerField<N> field(problem.size, problem.boundary);
    for (int64_t i = 0; i < count; i += Cells::Run::lanes) {
      const int64_t some = std::min<int64_t>(Cells::Run::lanes, count - i);
      Reals shift[N];
      Indices base[N];
      for (int axis = 0; some == Cells::Run::lanes && axis < N; ++axis) {
        shift[axis] = read_lanes<Reals>(points.shift[axis] + i);
        base[axis] = read_lanes<Indices>(points.origin[axis] + i) + static_cast<int32_t>(problem.tap[tap][axis]);
      }
      if (some == Cells::Run::lanes && found[registers].find(field, shift, base)) {
        place[registers++] = i;
      } else {
        locate(i, some);
      }
    }
    for (int64_t r = 0; r < registers; ++r) in_registers(found[r], place[r]);
  } else {
    locate(0, count);
  }
}

// The samples of a tap, times their factors.
template <typename A, int N>
void sample_plane(const Call<N>& call, Points<A, N, int32_t>& points, int64_t batch, int64_t group, int64_t tap,
                  int64_t begin, int64_t count, const A* plane, A* samples) {
  const Problem<N>& problem = call.problem;
  const A* const factor = points.read(problem, batch, call.offset, call.mask, group, tap, begin, count);
  points.ask_for_next(problem, batch, call.offset, call.mask, group, tap, begin, count);
  const auto in_registers = [&](const auto& cells, int64_t i) {
    using Cells = std::remove_cvref_t<decltype(cells)>;
    typename Cells::Reals value[Cells::corners];
    cells.read(plane, value);
    const auto sample = cells.interpolate(value);
    write_lanes(samples + i, factor ? sample * read_lanes<typename Cells::Reals>(factor + i) : sample);
  };
  for_registers(problem, points, tap, factor, count, in_registers,
                [&](int64_t i, int64_t some) { sample_in_place<false>(points.cells, some, plane, samples + i); });
}

template <typename A, int N>
void forward_planar(const Call<N>& call, const std::vector<A>& bias, const Sink& output) {
  const Problem<N>& problem = call.problem;
  const int64_t field = count<N>(problem.size), width = planar_channels<A>(problem), rows = problem.group_rows();
  const int64_t items = ceil_div(problem.channels, width);
  const std::vector<A> weight = values_of<A>(call.weight);
  const auto make = [&] {
    return PlanarScratch<A, N>{
        Points<A, N, int32_t>(planar_block), Buffer<A>(width * (field + 1)), {}, Buffer<A>((rows + 1) * planar_block)};
  };
  each(problem.batch * items, make, [&](PlanarScratch<A, N>& scratch, int64_t item) {
    const int64_t first = item % items * width, last = std::min(first + width, problem.channels);
    for_planes(call, item / items, first, last, scratch, [&](int64_t c, int64_t begin, int64_t points, const A* plane) {
      const int64_t group = c / problem.channels_per_offset_group();
      A* const samples = scratch.lines.get() + rows * planar_block;
      for (int64_t r = 0; r < rows; ++r)
        std::fill_n(scratch.lines.get() + r * planar_block, points, bias.empty() ? A(0) : bias[c * rows + r]);
      for (int64_t tap = 0; tap < problem.taps; ++tap) {
        sample_plane(call, scratch.points, item / items, group, tap, begin, points, plane, samples);
        for (int64_t r = 0; r < rows; ++r) {
          const A w = weight[(c * rows + r) * problem.taps + tap];
          A* const line = scratch.lines.get() + r * planar_block;
#pragma omp simd
          for (int64_t i = 0; i < points; ++i) line[i] += w * samples[i];
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        output.write((item / items * problem.out_channels + c * rows + r) * problem.positions + begin,
                     scratch.lines.get() + r * planar_block, points);
    });
  });
}

// An item of work owns some channels for a share of the batch; channels with the same offsets stay together, so that
// it adds up their gradients by offset and mask.
template <typename A, int N>
class PlanarBackward {
 public:
  PlanarBackward(const Call<N>& call, const Map& grad_output, const Gradients& gradients)
      : call_(call),
        problem_(call.problem),
        grad_output_(grad_output),
        gradients_(gradients),
        field_(problem_.field()),
        rows_(problem_.group_rows()),
        taps_(problem_.taps),
        together_(problem_.channels_per_offset_group()),
        width_(ceil_div(planar_channels<A>(problem_), together_) * together_),
        weight_(values_of<A>(call.weight)) {}

  void run() {
    const int64_t items = ceil_div(problem_.channels, width_), shares = std::min(problem_.batch, planar_shares);
    // In double, because one sum over the blocks of a large image would lose digits.
    std::vector<double> sums(shares * weight_.size(), 0.0);
    each(
        shares * items, [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t item) {
          const int64_t share = item / items, first = item % items * width_;
          const int64_t last = std::min(first + width_, problem_.channels);
          scratch.weight_sum = sums.data() + share * weight_.size();
          for (int64_t b = problem_.batch * share / shares; b < problem_.batch * (share + 1) / shares; ++b)
            differentiate(scratch, b, first, last);
        });
    for (int64_t share = 1; share < shares; ++share)
      for (size_t i = 0; i < weight_.size(); ++i) sums[i] += sums[share * weight_.size() + i];
    const std::vector<A> total(sums.begin(), sums.begin() + static_cast<int64_t>(weight_.size()));
    if (gradients_.weight) gradients_.weight->write(0, total.data(), static_cast<int64_t>(total.size()));
  }

 private:
  static constexpr int64_t block = planar_block;

  // grads: [rows, block]; by_point: [taps, N + 1, block], summed over the channels that share their offsets.
  struct Scratch : PlanarScratch<A, N> {
    Buffer<A> grads, grad_samples{block}, samples{block}, by_point, more_by_point{(N + 1) * block};
    double* weight_sum = nullptr;

    explicit Scratch(const PlanarBackward& b)
        : PlanarScratch<A, N>{Points<A, N, int32_t>(block),
                              Buffer<A>(b.width_ * (b.field_ + 1)),
                              Buffer<A>(b.width_ * (b.field_ + 1)),
                              {}},
          grads(b.rows_ * block),
          by_point(b.taps_ * (N + 1) * block) {}
  };

  void differentiate(Scratch& scratch, int64_t batch, int64_t first, int64_t last) const {
    if (gradients_.input) std::fill_n(scratch.grad_planes.get(), (last - first) * (field_ + 1), A(0));
    for_planes(call_, batch, first, last, scratch, [&](int64_t c, int64_t begin, int64_t points, const A* plane) {
      for (int64_t r = 0; r < rows_; ++r)
        read_run(grad_output_, batch, c * rows_ + r, begin, points, scratch.grads.get() + r * block);
      A* const grad_plane = gradients_.input ? scratch.grad_planes.get() + (c - first) * (field_ + 1) : nullptr;
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t group = c / together_;
        const A* const factor =
            scratch.points.read(problem_, batch, call_.offset, call_.mask, group, tap, begin, points);
        scratch.points.ask_for_next(problem_, batch, call_.offset, call_.mask, group, tap, begin, points);
        A* const total = scratch.by_point.get() + tap * (N + 1) * block;
        A* const lines = c % together_ == 0 ? total : scratch.more_by_point.get();
        find_grad_samples(scratch, c, tap, points);
        walk(scratch, tap, factor, points, plane, lines, grad_plane);
        if (gradients_.weight) add_grad_weight(scratch, c, tap, points);
        if (gradients_.by_point()) {
          add_by_point(scratch, points, lines, total);
          if ((c + 1) % together_ == 0)
            write_by_point(problem_, batch, group, tap, begin, points, total, block, false, gradients_);
        }
      }
    });
    for (int64_t c = first; gradients_.input && c < last; ++c)
      gradients_.input->write((batch * problem_.channels + c) * field_,
                              scratch.grad_planes.get() + (c - first) * (field_ + 1), field_);
  }

  void add_grad_weight(Scratch& scratch, int64_t c, int64_t tap, int64_t points) const {
    const A* const samples = scratch.samples.get();
    for (int64_t r = 0; r < rows_; ++r) {
      const A* const grad = scratch.grads.get() + r * block;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < points; ++i) sum += grad[i] * samples[i];
      scratch.weight_sum[(c * rows_ + r) * taps_ + tap] += sum;
    }
  }

  void find_grad_samples(Scratch& scratch, int64_t c, int64_t tap, int64_t points) const {
    A* const to = scratch.grad_samples.get();
    for (int64_t r = 0; r < rows_; ++r) {
      const A w = weight_[(c * rows_ + r) * taps_ + tap];
      const A* const grad = scratch.grads.get() + r * block;
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) to[i] = (r == 0 ? A(0) : to[i]) + w * grad[i];
    }
  }

  // The samples of a tap, their slopes and the samples without their factors into `lines`, and the gradients of the
  // samples to the plane's.
  void walk(Scratch& scratch, int64_t tap, const A* factor, int64_t points, const A* plane, A* lines,
            A* grad_plane) const {
    A* const samples = scratch.samples.get();
    const A* const grads = scratch.grad_samples.get();
    const auto in_registers = [&](const auto& cells, int64_t i) {
      using Cells = std::remove_cvref_t<decltype(cells)>;
      using Reals = typename Cells::Reals;
      const Reals factors = factor ? read_lanes<Reals>(factor + i) : Reals{} + 1;
      Reals value[Cells::corners], slope[N];
      cells.read(plane, value);
      const Reals sample = cells.interpolate(value);
      write_lanes(samples + i, sample * factors);
      if (gradients_.mask) write_lanes(lines + N * block + i, sample);
      if (gradients_.offset) {
        cells.slopes_of(value, slope);
        for (int axis = 0; axis < N; ++axis) write_lanes(lines + axis * block + i, slope[axis] * factors);
      }
      if (grad_plane) cells.scatter(grad_plane, 0, 1, [&](int64_t) { return read_lanes<Reals>(grads + i) * factors; });
    };
    for_registers(problem_, scratch.points, tap, factor, points, in_registers, [&](int64_t i, int64_t some) {
      const auto& cells = scratch.points.cells;
      sample_in_place<false, true>(cells, some, plane, samples + i);
      A* grad_shift[N];
      for (int axis = 0; axis < N; ++axis) grad_shift[axis] = gradients_.offset ? lines + axis * block + i : nullptr;
      if (gradients_.by_point())
        cells.slopes_of_values(some, factor ? factor + i : nullptr, grad_shift,
                               gradients_.mask ? lines + N * block + i : nullptr);
      if (grad_plane) scatter_plane(cells, some, grads + i, grad_plane);
    });
  }

  void add_by_point(Scratch& scratch, int64_t points, A* lines, A* total) const {
    const A* const grad = scratch.grad_samples.get();
    for (int line = gradients_.offset ? 0 : N; line < N + (gradients_.mask ? 1 : 0); ++line) {
      A *const own = lines + line * block, *const sum = total + line * block;
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) own[i] *= grad[i];
      for (int64_t i = 0; lines != total && i < points; ++i) sum[i] += own[i];
    }
  }

  const Call<N>& call_;
  const Problem<N>& problem_;
  const Map& grad_output_;
  const Gradients& gradients_;
  int64_t field_, rows_, taps_, together_, width_;
  std::vector<A> weight_;
};

}  // namespace deformkit::conv
