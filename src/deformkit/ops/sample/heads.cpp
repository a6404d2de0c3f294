// The kernels behind heads.h, compiled once for the operators that share them.
#include "sample/heads.h"

#include "sample/query_points.h"
#include "sample/touched.h"

namespace deformkit {
namespace {

// Measured by `python benchmarks/run.py attn aggregate` with other values in their place:
constexpr int64_t plane_bytes = 16 * mib;  // of a head's field that a thread lays out: twice that with its gradient
constexpr int64_t joined_bytes = 4 * mib;  // of levels that share an item of work, so that they stay in the caches
constexpr int64_t far_bytes = 4 * mib;     // of a span, with its gradient in the backward pass, that is far

// Positions to a sample up to which a field is laid out. In place, an element in half precision is converted whenever
// it is read, and its gradient at the end. `deformkit bench --op ms_deform_attn` with other `--set queries=` measures
// it.
int64_t seldom(ScalarType dtype) {
  return sum_dtype(dtype) == dtype ? 1 : 2;
}

// A row that is laid out is so wide that registers divide it.
int64_t padded(int64_t channels) {
  return channels <= 4 ? 4 : ceil_div(channels, 8) * 8;
}

template <int N>
int64_t bytes_of(const Heads<N>& call, const Span& span) {
  const int64_t element = sum_dtype(call.value.dtype()) == ScalarType::Double ? 8 : 4;
  return (span.positions + 1) * padded(call.channels) * element;
}

// Whether a span of a head's field is laid out: it must fit, and be read often. The batch has no say, so that it cannot
// change a sample's bits.
template <int N>
bool is_laid_out(const Heads<N>& call, const Span& span, int64_t positions_to_a_sample) {
  return bytes_of(call, span) <= plane_bytes && call.queries * span.points * positions_to_a_sample > span.positions;
}

template <int N>
Span whole(const Heads<N>& call) {
  return {0, call.points, 0, call.positions};
}

struct Spans {
  std::vector<Span> in_place, laid_out;
};

// Levels are not held alike where points are dense on small ones alone. Levels side by side share an item of work,
// unless samples and heads are few.
template <int N>
Spans spans_of(const Heads<N>& call, int64_t positions_to_a_sample) {
  const bool all = is_laid_out(call, whole(call), positions_to_a_sample), joined = call.batch * call.heads >= 8;
  Spans spans;
  for (const Level<N>& level : call.levels) {
    const Span own{level.first_point, level.points, level.start, level.positions()};
    const bool laid_out = all || is_laid_out(call, own, positions_to_a_sample);
    std::vector<Span>& alike = laid_out ? spans.laid_out : spans.in_place;
    if (joined && !alike.empty() && alike.back().start + alike.back().positions == own.start) {
      const Span& last = alike.back();
      const Span both{last.first, last.points + own.points, last.start, last.positions + own.positions};
      if (!laid_out || bytes_of(call, both) <= joined_bytes) {
        alike.back() = both;
        continue;
      }
    }
    alike.push_back(own);
  }
  return spans;
}

// Whether points, or the elements of a field whose positions are `pitch` apart, take 64-bit indices.
template <int N>
bool is_wide(const Heads<N>& call, int64_t pitch) {
  int64_t reach = (call.positions + 1) * std::max<int64_t>(pitch, 4);
  for (int axis = 0; axis < N; ++axis)
    reach = std::max(reach, 4 * (call.out_size[axis] * call.stride[axis] + std::abs(call.padding[axis])));
  return reach >= (int64_t(1) << 31);
}

// Rows of `width` for the positions of a head, padded with zeros, and a row of zeros after them.
template <typename A>
void lay_out(const Map& field, int64_t b, int64_t positions, int64_t channels, int64_t width, A* rows) {
  dispatch_dtype(field.dtype(), [&]<typename T>() {
    const T* source = field.at<T>(b);
    for (int64_t p = 0; p < positions; ++p, source += field.position_stride, rows += width) {
      ask_for_row<false, true>(source + rows_ahead * field.position_stride, channels);
      load_run(source, channels, rows);
      std::fill(rows + channels, rows + width, A(0));
    }
  });
  std::fill_n(rows, width, A(0));
}

// The dtype of a gradient that starts at zero: the value's own where the touched rows fit beside it, else that of sums.
template <int N>
ScalarType grad_dtype(const Heads<N>& call) {
  const int64_t touched = std::min(call.positions, call.queries * call.points << N);
  const ScalarType dtype = call.value.dtype(), sum = sum_dtype(dtype);
  return touched * call.channels * 4 <= plane_bytes ? dtype : sum;
}

// Sets the gradient by a span of every sample to 0.
template <int N>
void clear(const Heads<N>& call, const Span& span, const Tensor& grad_value) {
  const int64_t row = call.heads * call.channels * grad_value.element_size();
  const int64_t run = ceil_div(mib, row), runs = ceil_div(span.positions, run);
  each(call.batch * runs, [&](int64_t item) {
    const int64_t first = item % runs * run, place = item / runs * call.positions + span.start + first;
    std::memset(static_cast<char*>(grad_value.data_ptr()) + place * row, 0,
                static_cast<size_t>(std::min(run, span.positions - first) * row));
  });
}

// Forward: an item is a head of a sample, or some of its queries where it reads the field in place.
template <template <typename> typename kHeld, typename T, int N, typename Index>
void attend(const Heads<N>& call, const Sink& output) {
  using A = Sum<T>;
  constexpr bool kLaidOut = !kHeld<A>::in_place;
  const int64_t block = block_of(call), channels = call.channels, width = kLaidOut ? padded(channels) : channels;
  const int64_t run = kLaidOut ? call.queries : 8 * block, runs = ceil_div(call.queries, std::max<int64_t>(run, 1));
  const Plan<A, N, Index> plan(call, whole(call), kLaidOut ? width : call.value.position_stride);
  struct Scratch {
    QueryPoints<A, N, Index> points;
    Buffer<A> sums, rows;
  };
  const auto make = [&] {
    return Scratch{QueryPoints<A, N, Index>(call, plan.capacity()), Buffer<A>(block * width),
                   Buffer<A>(kLaidOut ? (call.positions + 1) * width : 0)};
  };
  const std::vector<T> zeros(channels, T(0));
  each(call.batch * runs * call.heads, make, [&](Scratch& scratch, int64_t item) {
    const int64_t head = item % call.heads, b = item / call.heads / runs, begin = item / call.heads % runs * run;
    const Map value = call.value.of_head(head, 0);
    kHeld<const T> field;
    if constexpr (kLaidOut) {
      lay_out(value, b, call.positions, channels, width, scratch.rows.get());
      field = {scratch.rows.get(), bytes_of(call, whole(call)) > far_bytes};
    } else {
      field = {value.template at<T>(b), zeros.data()};
    }
    const auto outside = static_cast<Index>(kLaidOut ? call.positions * width : -1);
    for (int64_t first = begin; first < std::min(begin + run, call.queries); first += block) {
      const int64_t queries = std::min(block, call.queries - first);
      scratch.points.locate(call, plan, b, head, first, queries, outside);
      gather<false>(scratch.points.cells, queries, call.points, field, width, scratch.sums.get(), width);
      write_rows(output, call.place(b, first, head, channels), call.heads * channels, scratch.sums.get(), width,
                 queries, channels);
    }
  });
}

// The gradients by value [B, S, H, D], coordinates and weights, and the sums themselves; an absent one is not asked
// for. In place, the gradient by value starts at zero. The sums are only asked for where a head has one span.
struct HeadResults {
  std::optional<Sink> value, coordinates, weights, sums;
};

// Backward: an item is a span of a head of a sample, and owns its part of every gradient. Held LaidOut, a thread lays
// out the field, of any dtype, and its gradient for itself. Held InPlace, both are used where they are; the rows of a
// gradient of a dtype narrower than that of sums are Touched.
template <template <typename> typename kHeld, typename T, int N, typename Index>
class Backward {
  using A = Sum<T>;
  static constexpr bool kLaidOut = !kHeld<A>::in_place;

 public:
  Backward(const Heads<N>& call, const Tensor& grad_output, const std::vector<Span>& spans, const HeadResults& results)
      : call_(call),
        grad_output_(grad_output),
        results_(results),
        width_(kLaidOut ? padded(call.channels) : call.channels),
        apart_(results.value && !kLaidOut && results.value->dtype() != sum_dtype(results.value->dtype())) {
    for (const Span& span : spans) {
      plans_.emplace_back(call, span, kLaidOut ? width_ : apart_ ? 1 : call.value.position_stride);
      positions_ = std::max(positions_, span.positions);
      capacity_ = std::max(capacity_, plans_.back().capacity());
    }
  }

  int64_t items() const { return call_.batch * call_.heads * spans(); }
  auto make() const { return Scratch(*this); }

  void run(auto& scratch, int64_t item) const {
    const int64_t place = item / spans();
    const Item at{plans_[item % spans()], place / call_.heads, place % call_.heads};
    Walk<A, N, kHeld, T> walk = open(scratch, at);
    for (int64_t first = 0; first < call_.queries; first += at.plan.block)
      queries(scratch, at, walk, first, std::min(at.plan.block, call_.queries - first));
    close(scratch, at);
  }

 private:
  struct Item {
    const Plan<A, N, Index>& plan;
    int64_t b, head;
  };

  struct Scratch {
    QueryPoints<A, N, Index> points;
    Buffer<T> rows;
    Buffer<A> grad_rows, grads, sums, by_point, stored;
    std::optional<Touched<A>> touched;
    Buffer<Index> targets;

    explicit Scratch(const Backward& work)
        : points(work.call_, work.capacity_),
          rows(work.plane()),
          grad_rows(work.plane()),
          grads(block_of(work.call_) * work.width_),
          sums(work.results_.sums ? block_of(work.call_) * work.width_ : 0),
          by_point((N + 1) * work.capacity_),
          stored(N * work.capacity_) {
      std::fill_n(rows.get(), work.width_, T(0));
      std::fill_n(grad_rows.get(), work.width_, A(0));
      if (!work.apart_) return;
      touched.emplace(work.most_touched(), work.width_);
      targets = Buffer<Index>(work.corners * work.capacity_);
    }
  };

  static constexpr int corners = 1 << N;

  int64_t spans() const { return static_cast<int64_t>(plans_.size()); }
  int64_t plane() const { return kLaidOut ? (positions_ + 1) * width_ : width_; }
  int64_t most_touched() const { return std::min(positions_, call_.queries * capacity_ / block_of(call_) * corners); }
  int64_t grad_place(const Item& at) const {
    return ((at.b * call_.positions + at.plan.span.start) * call_.heads + at.head) * call_.channels;
  }

  // The field of an item and its gradient, as they are held.
  Walk<A, N, kHeld, T> open(Scratch& scratch, const Item& at) const {
    const Span& span = at.plan.span;
    const Map field = call_.value.of_head(at.head, span.start);
    Walk<A, N, kHeld, T> walk{};
    walk.per = span.points, walk.channels = walk.pitch = width_;
    walk.grad_columns = scratch.grads.get();
    for (int axis = 0; axis < N && results_.coordinates; ++axis)
      walk.grad_shift[axis] = scratch.by_point.get() + axis * capacity_;
    if (results_.weights) walk.grad_factor = scratch.by_point.get() + N * capacity_;
    if (results_.sums) walk.columns = scratch.sums.get();
    if constexpr (kLaidOut) {
      if (walk.by_point() || walk.columns)
        lay_out(field, at.b, span.positions, call_.channels, width_, scratch.rows.get());
      walk.field = {scratch.rows.get(), 2 * bytes_of(call_, span) > far_bytes};
      if (!results_.value) return walk;
      std::fill_n(scratch.grad_rows.get(), (span.positions + 1) * width_, A(0));
      walk.grad_field.first = scratch.grad_rows.get();
    } else {
      walk.field = {field.template at<T>(at.b), scratch.rows.get()};
      if (results_.value && !apart_)
        walk.grad_field = {results_.value->template data<A>() + grad_place(at), scratch.grad_rows.get()};
    }
    return walk;
  }

  // The gradients of a run of queries.
  void queries(Scratch& scratch, const Item& at, Walk<A, N, kHeld, T>& walk_on, int64_t first, int64_t queries) const {
    const int64_t points = queries * at.plan.span.points;
    const auto outside = static_cast<Index>(kLaidOut ? at.plan.span.positions * width_ : -1);
    scratch.points.locate(call_, at.plan, at.b, at.head, first, queries, outside);
    read_rows(grad_output_, call_.place(at.b, first, at.head, call_.channels), call_.heads * call_.channels, queries,
              call_.channels, scratch.grads.get(), width_);
    if constexpr (!kLaidOut && !std::is_same_v<T, A>) {
      if (apart_) find_rows(scratch, points);
    }
    walk(scratch.points.cells, points, scratch.points.factors.get(), walk_on);
    if constexpr (!kLaidOut && !std::is_same_v<T, A>) {
      if (apart_) add_to_rows(scratch, at, points);
    }
    write_by_point(scratch, at, walk_on, first, queries);
    if (results_.sums)
      write_rows(*results_.sums, call_.place(at.b, first, at.head, call_.channels), call_.heads * call_.channels,
                 scratch.sums.get(), width_, queries, call_.channels);
  }

  // From positions to elements of the field, and to those of touched rows.
  void find_rows(Scratch& scratch, int64_t points) const {
    const auto pitch = static_cast<Index>(call_.value.position_stride);
    for (int corner = 0; corner < corners; ++corner) {
      Index *const index = scratch.points.cells.index(corner), *const target =
                                                                   scratch.targets.get() + corner * capacity_;
      std::copy_n(index, points, target);
      scratch.touched->find(points, target);
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) index[i] = index[i] < 0 ? -1 : index[i] * pitch;
    }
  }

  void add_to_rows(Scratch& scratch, const Item& at, int64_t points) const {
    for (int corner = 0; corner < corners; ++corner)
      std::copy_n(scratch.targets.get() + corner * capacity_, points, scratch.points.cells.index(corner));
    Walk<A, N, LaidOut> by_field{};
    by_field.per = at.plan.span.points, by_field.channels = by_field.pitch = width_;
    by_field.grad_columns = scratch.grads.get();
    by_field.grad_field.first = scratch.touched->rows();
    walk(scratch.points.cells, points, scratch.points.factors.get(), by_field);
  }

  void write_by_point(Scratch& scratch, const Item& at, const Walk<A, N, kHeld, T>& walked, int64_t first,
                      int64_t queries) const {
    const Span& span = at.plan.span;
    const int64_t points = queries * span.points, pitch = call_.heads * call_.points;
    const int64_t place = call_.place(at.b, first, at.head, call_.points) + span.first;
    if (results_.weights)
      write_rows(*results_.weights, place, pitch, walked.grad_factor, span.points, queries, span.points);
    if (!results_.coordinates) return;
    if (call_.nearest) scratch.points.cells.no_slopes(points, walked.grad_shift);
    for (int axis = 0; axis < N; ++axis) {
      A* const to = scratch.stored.get() + (call_.x_first ? N - 1 - axis : axis);
      const A* const from = walked.grad_shift[axis];
      const A* const scale = at.plan.scale.get() + axis * at.plan.capacity();
#pragma omp simd
      for (int64_t i = 0; i < points; ++i) to[i * N] = from[i] * scale[i];
    }
    write_rows(*results_.coordinates, place * N, pitch * N, scratch.stored.get(), span.points * N, queries,
               span.points * N);
  }

  void close(Scratch& scratch, const Item& at) const {
    const int64_t pitch = call_.heads * call_.channels;
    if (apart_) {
      Touched<A>& touched = *scratch.touched;
      for (int64_t row = 1; row <= touched.count(); ++row)
        write_rows(*results_.value, grad_place(at) + touched.position(row) * pitch, 0, touched.rows() + row * width_,
                   width_, 1, call_.channels);
      touched.forget();
    }
    if (kLaidOut && results_.value)
      write_rows(*results_.value, grad_place(at), pitch, scratch.grad_rows.get(), width_, at.plan.span.positions,
                 call_.channels);
  }

  const Heads<N>& call_;
  const Tensor& grad_output_;
  const HeadResults& results_;
  const int64_t width_;
  const bool apart_;
  std::vector<Plan<A, N, Index>> plans_;
  int64_t positions_ = 0, capacity_ = 1;
};

// Calls f<kHeld, T>(): laid out as sums, or where it is as it is.
template <typename F>
void dispatch_held(bool laid_out, ScalarType dtype, const F& f) {
  if (!laid_out) return dispatch_dtype(dtype, [&]<typename T>() { f.template operator()<InPlace, T>(); });
  dtype == ScalarType::Double ? f.template operator()<LaidOut, double>() : f.template operator()<LaidOut, float>();
}

template <typename F>
void dispatch_index(bool wide, const F& f) {
  wide ? f.template operator()<int64_t>() : f.template operator()<int32_t>();
}

// The items of both, among the same threads.
void run(const auto& first, const auto& second) {
  const auto make = [&] { return std::pair(first.make(), second.make()); };
  each(first.items() + second.items(), make, [&](auto& scratch, int64_t item) {
    const int64_t rest = item - first.items();
    rest < 0 ? first.run(scratch.first, item) : second.run(scratch.second, rest);
  });
}

}  // namespace

template <int N>
Tensor attend(Heads<N> call, const Tensor& value) {
  const Work work(call.work());
  call.coordinates.make_rows();
  call.weights.make_rows();
  const Tensor output = new_result(value, call.output_shape);
  // Where samples and heads are few, the items are runs of queries, in place: that changes no bit of a sum.
  const bool laid_out = is_laid_out(call, whole(call), seldom(value.scalar_type())) && call.batch * call.heads >= 8;
  const bool wide = is_wide(call, laid_out ? padded(call.channels) : call.value.position_stride);
  dispatch_held(laid_out, value.scalar_type(), [&]<template <typename> typename kHeld, typename T>() {
    dispatch_index(wide, [&]<typename Index>() { attend<kHeld, T, N, Index>(call, Sink(output)); });
  });
  return output;
}

template <int N>
std::tuple<Tensor, Tensor, Tensor> attend_backward(Heads<N> call, const Tensor& grad_output, const Tensor& value,
                                                   const Tensor& coordinates, const Tensor& weights,
                                                   const std::vector<bool>& output_mask, Tensor* sums) {
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must have 3 values");
  STD_TORCH_CHECK(sizes_of(grad_output) == call.output_shape && grad_output.scalar_type() == value.scalar_type(),
                  "grad_output must have the output's shape and dtype");
  const Work work(backward_work(call.work(), value));
  call.coordinates.make_rows();
  // The gradient by the weights does not depend on them.
  if (output_mask[0] || output_mask[1] || sums) call.weights.make_rows();
  const Tensor grad = contiguous(grad_output);
  const Spans spans = spans_of(call, seldom(value.scalar_type()));

  const bool adds = output_mask[0] && !spans.in_place.empty();
  const ScalarType dtype = adds ? grad_dtype(call) : value.scalar_type();
  const Tensor grad_value =
      dtype == value.scalar_type() ? empty_like(value, output_mask[0]) : new_scratch(value.sizes(), dtype);
  const Tensor grad_coordinates = empty_like(coordinates, output_mask[1]);
  const Tensor grad_weights = empty_like(weights, output_mask[2]);
  if (adds) {
    for (const Span& span : spans.in_place) clear(call, span, grad_value);
    call.value = Map::with_heads(contiguous(value));
  }
  HeadResults results;
  if (output_mask[0]) results.value.emplace(grad_value);
  if (output_mask[1]) results.coordinates.emplace(grad_coordinates);
  if (output_mask[2]) results.weights.emplace(grad_weights);
  if (sums) {
    // The batch has no say, so that it cannot change a sum's bits.
    const bool one_walk =
        spans.in_place.empty() && spans.laid_out.size() == 1 && (call.levels.size() == 1 || call.heads >= 8);
    *sums = one_walk ? new_result(value, call.output_shape) : attend(call, value);
    if (one_walk) results.sums.emplace(*sums);
  }
  dispatch_dtype(value.scalar_type(), [&]<typename T>() {
    dispatch_index(is_wide(call, call.value.position_stride), [&]<typename Index>() {
      const Backward<InPlace, T, N, Index> in_place(call, grad, spans.in_place, results);
      dispatch_index(is_wide(call, padded(call.channels)), [&]<typename Own>() {
        run(in_place, Backward<LaidOut, Sum<T>, N, Own>(call, grad, spans.laid_out, results));
      });
    });
  });
  return {rounded(grad_value, value.scalar_type()), grad_coordinates, grad_weights};
}

#define DEFORMKIT_INSTANTIATE(N)                                  \
  template Tensor attend<N>(Heads<N>, const Tensor&);             \
  template std::tuple<Tensor, Tensor, Tensor> attend_backward<N>( \
      Heads<N>, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::vector<bool>&, Tensor*);
DEFORMKIT_INSTANTIATE(1)
DEFORMKIT_INSTANTIATE(2)
DEFORMKIT_INSTANTIATE(3)

}  // namespace deformkit
