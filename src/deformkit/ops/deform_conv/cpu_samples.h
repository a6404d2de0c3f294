// The samples of a block of output positions, tap by tap: most of them in the window that is laid out, and strays,
// whose corners are read, and added to, where they are.
#pragma once

#include <numeric>

#include "deform_conv/cpu_plan.h"

namespace deformkit::conv {

// The points of a tap that leave the window, as a list, and their corners alone as a field of their own.
template <typename A, int N>
class Strays {
 public:
  static constexpr int corners = 1 << N;

  Strays(int64_t block, int64_t channels, bool gradients)
      : points_(block),
        list_(block),
        where_(block * corners),
        rows_(block * corners * channels),
        grad_rows_(gradients ? block * corners * channels : 0),
        samples_(block * channels),
        grads_(gradients ? block * channels : 0),
        by_point_(gradients ? (N + 1) * block : 0),
        channels_(channels) {}

  int64_t count() const { return count_; }
  void clear() { count_ = 0; }
  const int64_t* list() const { return list_.get(); }

  // Takes those of the points that have a corner in the field and not in the window.
  template <typename Index>
  void find(const Problem<N>& problem, const Window<N>& window, const Points<A, N, Index>& all, int64_t tap,
            const A* factor, int64_t points) {
    const int64_t size = problem.size[0];
    const bool reflects = problem.boundary == Boundary::reflect;
    const A far = static_cast<A>(reflects ? furthest_reflected(size) : int64_t(1) << 40);
    const auto is_stray = [&](int64_t row) {
      if (problem.boundary == Boundary::border) row = std::clamp<int64_t>(row, 0, size - 1);
      if (reflects) row = reflected(row, size);
      return row >= 0 && row < size && (row < window.first || row >= window.last);
    };
    count_ = 0;
    for (int64_t i = 0; i < points; ++i) {
      const A shift = all.shift[0][i], within = shift == shift ? std::clamp(shift, -far, far) : -far;
      const int64_t row = all.origin[0][i] + problem.tap[tap][0] + static_cast<int64_t>(std::floor(within));
      list_[count_] = i;
      count_ += is_stray(row) || is_stray(row + 1);
    }
    for (int64_t n = 0; n < count_; ++n) {
      const int64_t i = list_[n];
      for (int axis = 0; axis < N; ++axis) {
        points_.origins[axis * points_.capacity + n] = all.origin[axis][i];
        own_shift(axis)[n] = all.shift[axis][i];
      }
      if (factor) points_.factors[n] = factor[i];
    }
    locate(problem, tap, factor != nullptr);
  }

  // Takes all points.
  const A* take(const Problem<N>& problem, int64_t batch, const Map& offset, const std::optional<Map>& mask,
                int64_t offset_group, int64_t tap, int64_t begin, int64_t points) {
    const A* const factor = points_.read(problem, batch, offset, mask, offset_group, tap, begin, points);
    for (int axis = 0; axis < N; ++axis)
      if (points_.shift[axis] != own_shift(axis)) std::copy_n(points_.shift[axis], points, own_shift(axis));
    if (factor && factor != points_.factors.get()) std::copy_n(factor, points, points_.factors.get());
    count_ = points;
    std::iota(list_.get(), list_.get() + points, 0);
    locate(problem, tap, factor != nullptr);
    return factor;
  }

  void start(const Problem<N>& problem, int64_t begin, int64_t points) { points_.start(problem, begin, points); }

  // The samples of a segment, into their rows of `columns`.
  template <typename U>
  void gather(const Map& input, int64_t batch, const Segment& segment, U* columns, int64_t pitch) {
    read(input, batch, segment);
    deformkit::gather<true>(points_.cells, count_, 1, LaidOut<const A>{rows_.get()}, segment.channels, samples_.get(),
                            segment.channels);
    for (int64_t n = 0; n < count_; ++n)
      store_run(samples_.get() + n * segment.channels, segment.channels, columns + list_[n] * pitch);
  }

  // As deformkit::walk(), into the places that `all` names; the field's gradient is added to the plane of the segment's
  // first channel.
  void walk(const Map& input, int64_t batch, const Segment& segment, const Walk<A, N, LaidOut>& all, A* grad_plane,
            int64_t positions) {
    read(input, batch, segment);
    const int64_t channels = segment.channels;
    Walk<A, N, LaidOut> own = all;
    own.field.first = rows_.get(), own.pitch = channels;
    own.columns = all.columns ? samples_.get() : nullptr;
    own.grad_field.first = grad_plane ? grad_rows_.get() : nullptr;
    if (grad_plane) std::fill_n(grad_rows_.get(), count_ * corners * channels_, A(0));
    if (all.grad_columns) {
      for (int64_t n = 0; n < count_; ++n)
        std::copy_n(all.grad_columns + list_[n] * all.pitch, channels, grads_.get() + n * channels);
      own.grad_columns = grads_.get();
    }
    for (int axis = 0; axis < N; ++axis)
      if (all.grad_shift[axis]) own.grad_shift[axis] = by_point_.get() + axis * points_.capacity;
    if (all.grad_factor) own.grad_factor = by_point_.get() + N * points_.capacity;
    deformkit::walk(points_.cells, count_, factor_, own);

    for (int64_t n = 0; n < count_; ++n) {
      const int64_t i = list_[n];
      if (all.columns) std::copy_n(samples_.get() + n * channels, channels, all.columns + i * all.pitch);
      for (int axis = 0; axis < N; ++axis)
        if (all.grad_shift[axis]) all.grad_shift[axis][i] = own.grad_shift[axis][n];
      if (all.grad_factor) all.grad_factor[i] = own.grad_factor[n];
    }
    if (grad_plane) add(segment, grad_plane, positions);
  }

 private:
  A* own_shift(int axis) const { return points_.shifts.get() + axis * points_.capacity; }

  void locate(const Problem<N>& problem, int64_t tap, bool factors) {
    factor_ = factors ? points_.factors.get() : nullptr;
    for (int axis = 0; axis < N; ++axis) points_.shift[axis] = own_shift(axis);
    points_.locate(problem, {problem.size, 0, problem.size[0]}, tap, factor_, count_, 1, -1);
    for (int corner = 0; corner < corners; ++corner)
      for (int64_t n = 0; n < count_; ++n) {
        int64_t& index = points_.cells.index(corner)[n];
        where_[n * corners + corner] = index;
        index = (n * corners + corner) * channels_;
      }
  }

  void read(const Map& input, int64_t batch, const Segment& segment) {
    dispatch_dtype(input.dtype(), [&]<typename T>() {
      for (int64_t c = 0; c < segment.channels; ++c) {
        const T* const plane = input.at<T>(batch, segment.begin + c);
        for (int64_t n = 0; n < count_ * corners; ++n)
          rows_[n * channels_ + c] = where_[n] < 0 ? A(0) : load<A>(plane[where_[n] * input.position_stride]);
      }
    });
  }

  void add(const Segment& segment, A* grad_plane, int64_t positions) {
    for (int64_t c = 0; c < segment.channels; ++c)
      for (int64_t n = 0; n < count_ * corners; ++n)
        if (where_[n] >= 0) grad_plane[c * positions + where_[n]] += grad_rows_[n * channels_ + c];
  }

  Points<A, N, int64_t> points_;
  Buffer<int64_t> list_, where_;
  Buffer<A> rows_, grad_rows_, samples_, grads_, by_point_;
  const A* factor_ = nullptr;
  int64_t channels_, count_ = 0;
};

// The memory of a thread that samples blocks of at most `block` positions and `channels` channels at a time.
template <typename A, int N>
class Samples {
 public:
  Samples(const Call<N>& call, const Cut& cut, int64_t block, int64_t channels, bool gradients)
      : call_(call), points_(cut.lays_out() ? block : 1), lays_out_(cut.lays_out()) {
    if (!lays_out_ || cut.margin < call.problem.size[0]) strays_.emplace(block, channels, gradients);
  }

  // The next block: `points` positions from `begin` on. The pieces of the plan are laid out in `rows`, one after the
  // other, each with its row of zeros.
  void start(const Unit<N>& unit, const A* rows, const Plan<N>& plan, int64_t begin, int64_t points) {
    unit_ = &unit, rows_ = rows, plan_ = &plan, begin_ = begin, count_ = points;
    group_ = tap_ = -1;
    is_whole_ = unit.window.positions() == call_.problem.field();
    lays_out_ ? points_.start(call_.problem, begin, points) : strays_->start(call_.problem, begin, points);
  }

  // The samples of a segment, one row of `columns` for each position.
  template <typename U>
  void gather(const Segment& segment, U* columns, int64_t pitch) {
    locate(segment);
    if (lays_out_)
      deformkit::gather<true>(points_.cells, count_, 1, LaidOut<const A>{rows_ + place(segment)}, segment.channels,
                              columns, pitch);
    if (has_strays()) strays_->gather(call_.input, unit_->batch, segment, columns, pitch);
  }

  // As deformkit::walk(), with the gradient by the field going to `grad_rows`, laid out as the window, and that of
  // strays to `grad_input`, [B, C, *size]; null if it is not asked for.
  void walk(const Segment& segment, Walk<A, N, LaidOut> walked, A* grad_rows, A* grad_input) {
    locate(segment);
    const Problem<N>& problem = call_.problem;
    walked.channels = segment.channels;
    if (lays_out_) {
      walked.field.first = rows_ + place(segment);
      walked.grad_field.first = grad_input ? grad_rows + place(segment) : nullptr;
      deformkit::walk(points_.cells, count_, factor_, walked);
    }
    if (has_strays()) {
      const int64_t plane = (unit_->batch * problem.channels + segment.begin) * problem.field();
      strays_->walk(call_.input, unit_->batch, segment, walked, grad_input ? grad_input + plane : nullptr,
                    problem.field());
    }
  }

 private:
  int64_t place(const Segment& segment) const {
    const int64_t first = plan_->piece_of(segment).begin;
    return (first - plan_->begin) * (unit_->window.positions() + 1) + segment.begin - first;
  }
  bool has_strays() const { return strays_ && strays_->count() > 0; }

  void locate(const Segment& segment) {
    if (segment.offset_group == group_ && segment.tap == tap_) return;
    group_ = segment.offset_group, tap_ = segment.tap;
    const Problem<N>& problem = call_.problem;
    if (!lays_out_) {
      factor_ = strays_->take(problem, unit_->batch, call_.offset, call_.mask, group_, tap_, begin_, count_);
      return;
    }
    const int64_t width = plan_->piece_of(segment).channels;
    const auto outside = static_cast<int32_t>(unit_->window.positions() * width);
    factor_ = points_.read(problem, unit_->batch, call_.offset, call_.mask, group_, tap_, begin_, count_);
    points_.ask_for_next(problem, unit_->batch, call_.offset, call_.mask, group_, tap_, begin_, count_);
    points_.locate(problem, unit_->window, tap_, factor_, count_, width, outside);
    if (is_whole_) {
      if (strays_) strays_->clear();
      return;
    }
    strays_->find(problem, unit_->window, points_, tap_, factor_, count_);
    for (int64_t n = 0; n < strays_->count(); ++n)
      for (int corner = 0; corner < 1 << N; ++corner) {
        const int64_t i = strays_->list()[n];
        points_.cells.weight(corner)[i] = 0, points_.cells.index(corner)[i] = outside;
      }
  }

  const Call<N>& call_;
  Points<A, N, int32_t> points_;
  std::optional<Strays<A, N>> strays_;
  bool lays_out_, is_whole_ = false;
  const Unit<N>* unit_ = nullptr;
  const Plan<N>* plan_ = nullptr;
  const A *rows_ = nullptr, *factor_ = nullptr;
  int64_t begin_ = 0, count_ = 0, group_ = -1, tap_ = -1;
};

}  // namespace deformkit::conv
