// The kernels behind heads.h, compiled once for the operators that share them.
#include "sample/heads.h"

#include "sample/field.h"

namespace deformkit {
namespace {

constexpr int64_t block_points = 512;      // of one head that are worked on at a time
constexpr int64_t plane_bytes = 16 * mib;  // of the field that a thread lays out for itself

// How many queries are worked on at a time.
template <int N>
int64_t block_of(const Heads<N>& call) {
  return std::clamp<int64_t>(block_points / call.points, 1, std::max<int64_t>(call.queries, 1));
}

// Whether the elements of a field whose positions are `pitch` apart take 64-bit indices.
template <int N>
bool is_wide(const Heads<N>& call, int64_t pitch) {
  int64_t reach = (call.positions + 1) * std::max<int64_t>(pitch, 1);
  for (int axis = 0; axis < N; ++axis)
    reach = std::max(reach, 4 * (call.out_size[axis] * call.stride[axis] + std::abs(call.padding[axis])));
  return reach >= (int64_t(1) << 31);
}

// A query's points [first, first + points), which lie on the positions [start, start + positions) of the field.
struct Span {
  int64_t first, points, start, positions;
};

// What is the same for every run of queries: the levels of the points of a span, point by point.
template <typename A, int N, typename Index>
struct Plan {
  Span span;
  int64_t block;
  Buffer<A> scale, bias;
  Buffer<Index> size, stride, start;

  // Indices are of elements in a field with `width` of them for each position.
  Plan(const Heads<N>& call, const Span& span_, int64_t width)
      : span(span_),
        block(block_of(call)),
        scale(N * capacity()),
        bias(N * capacity()),
        size(N * capacity()),
        stride(N * capacity()),
        start(capacity()) {
    for (const Level<N>& level : call.levels)
      for (int64_t p = std::max(level.first_point, span.first);
           p < std::min(level.first_point + level.points, span.first + span.points); ++p)
        for (int64_t i = p - span.first; i < capacity(); i += span.points) {
          int64_t step = width;
          start[i] = static_cast<Index>((level.start - span.start) * width);
          for (int axis = N; axis-- > 0;) {
            scale[axis * capacity() + i] = static_cast<A>(call.affine[p].scale[axis]);
            bias[axis * capacity() + i] = static_cast<A>(call.affine[p].bias[axis]);
            size[axis * capacity() + i] = static_cast<Index>(level.size[axis]);
            stride[axis * capacity() + i] = static_cast<Index>(step);
            step *= level.size[axis];
          }
        }
  }

  int64_t capacity() const { return block * span.points; }

  std::array<Lines<Index>, N> lines() const {
    std::array<Lines<Index>, N> result;
    for (int axis = 0; axis < N; ++axis)
      result[axis] = {size.get() + axis * capacity(), stride.get() + axis * capacity(),
                      axis == N - 1 ? start.get() : nullptr};
    return result;
  }
};

// The points of a run of queries, located.
template <typename A, int N, typename Index>
struct QueryPoints {
  Cells<A, N, Index> cells;
  Buffer<A> stored, shifts, factors;
  Buffer<Index> origins;

  explicit QueryPoints(int64_t capacity)
      : cells(capacity), stored(N * capacity), shifts(N * capacity), factors(capacity), origins(N * capacity) {}

  void locate(const Heads<N>& call, const Plan<A, N, Index>& plan, int64_t b, int64_t head, int64_t first,
              int64_t queries, Index outside) {
    const Span& span = plan.span;
    const int64_t points = queries * span.points, capacity = plan.capacity();
    const int64_t place = call.place(b, first, head, call.points) + span.first, pitch = call.heads * call.points;
    read_rows(call.coordinates, place * N, pitch * N, queries, span.points * N, stored.get());
    read_rows(call.weights, place, pitch, queries, span.points, factors.get());
    Index* own[N];
    const Index* origin[N];
    const A* shift[N];
    const bool moves = std::any_of(call.stride.begin(), call.stride.end(), [](int64_t s) { return s != 0; });
    for (int axis = 0; axis < N; ++axis) {
      own[axis] = origins.get() + axis * capacity;
      origin[axis] = moves ? own[axis] : nullptr;
      shift[axis] = shifts.get() + axis * capacity;
      spread(stored.get() + (call.x_first ? N - 1 - axis : axis), plan.scale.get() + axis * capacity,
             plan.bias.get() + axis * capacity, points, shifts.get() + axis * capacity);
    }
    if (moves) fill_origins<N>(call.out_size, call.stride, call.padding, first, queries, span.points, own);
    cells.locate(plan.lines(), call.boundary, call.nearest, points, origin, shift, factors.get(), outside);
  }

 private:
  static void spread(const A* from, const A* scale, const A* bias, int64_t points, A* to) {
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) to[i] = from[i * N] * scale[i] + bias[i];
  }
};

template <typename A, int N, typename Index>
void attend(const Heads<N>& call, const Sink& output) {
  const int64_t block = block_of(call), channels = call.channels, plane = (call.positions + 1) * channels;
  // A head's field is laid out by the item that reads it, if it reads it often enough; where samples and heads are few,
  // an item is a run of queries.
  const bool laid_out = plane * static_cast<int64_t>(sizeof(A)) <= plane_bytes && call.batch * call.heads >= 8 &&
                        call.queries * call.points > 4 * call.positions;
  const int64_t run = laid_out ? call.queries : 8 * block, runs = ceil_div(call.queries, std::max<int64_t>(run, 1));
  const Plan<A, N, Index> plan(call, {0, call.points, 0, call.positions},
                               laid_out ? channels : call.value.position_stride);
  struct Scratch {
    QueryPoints<A, N, Index> points;
    Buffer<A> sums, rows;
  };
  const auto make = [&] {
    return Scratch{QueryPoints<A, N, Index>(plan.capacity()), Buffer<A>(block * channels),
                   Buffer<A>(laid_out ? plane : 1)};
  };
  const auto outside = static_cast<Index>(laid_out ? call.positions * channels : -1);
  dispatch_dtype(call.value.dtype(), [&]<typename T>() {
    const std::vector<T> zeros(channels, T(0));
    each(call.batch * runs * call.heads, make, [&](Scratch& scratch, int64_t item) {
      const int64_t head = item % call.heads, b = item / call.heads / runs, begin = item / call.heads % runs * run;
      const Map value = call.value.of_head(head, 0);
      if (laid_out) {
        const Window<1> window{{call.positions}, 0, call.positions};
        pack(value, b, 0, channels, window, 0, call.positions, scratch.rows.get());
      }
      A* const sums = scratch.sums.get();
      for (int64_t first = begin; first < std::min(begin + run, call.queries); first += block) {
        const int64_t queries = std::min(block, call.queries - first);
        scratch.points.locate(call, plan, b, head, first, queries, outside);
        if (laid_out) {
          const LaidOut<const A> field{scratch.rows.get()};
          gather<false>(scratch.points.cells, queries, call.points, field, channels, sums, channels);
        } else if constexpr (std::is_same_v<Sum<T>, A>) {
          const InPlace<const T> field{value.template at<T>(b), zeros.data()};
          gather<false>(scratch.points.cells, queries, call.points, field, channels, sums, channels);
        }
        output.write_rows(call.place(b, first, head, channels), call.heads * channels, sums, queries, channels);
      }
    });
  });
}

// The gradients by value [B, S, H, D], coordinates and weights; an absent one is not asked for.
struct HeadGradients {
  std::optional<Sink> value, coordinates, weights;
};

// Held LaidOut, every thread lays out the field, of any type, and its gradient for itself. Held InPlace, both are used
// where they are, which takes a gradient of the dtype of sums that starts at zero, with the field's strides.
template <template <typename> typename kHeld, typename T, typename A, int N, typename Index>
void attend_backward(const Heads<N>& call, const Tensor& grad_output, const std::vector<Span>& spans,
                     const HeadGradients& gradients) {
  constexpr bool kLaidOut = !kHeld<A>::in_place;
  const int64_t block = block_of(call), channels = call.channels, pitch = call.heads * channels;
  const int64_t span_count = spans.size(), width = kLaidOut ? channels : call.value.position_stride;
  const bool by_point = gradients.coordinates || gradients.weights;
  std::vector<Plan<A, N, Index>> plans;
  int64_t largest = 0, capacity = 1;
  for (const Span& span : spans) {
    plans.emplace_back(call, span, width);
    largest = std::max(largest, span.positions);
    capacity = std::max(capacity, plans.back().capacity());
  }

  struct Scratch {
    QueryPoints<A, N, Index> points;
    Buffer<T> rows;
    Buffer<A> grad_rows, grads, by_point, stored;
  };
  const auto make = [&] {
    const int64_t plane = kLaidOut ? (largest + 1) * channels : channels;
    Scratch scratch{
        QueryPoints<A, N, Index>(capacity), Buffer<T>(plane),       Buffer<A>(plane), Buffer<A>(block * channels),
        Buffer<A>((N + 1) * capacity),      Buffer<A>(N * capacity)};
    std::fill_n(scratch.rows.get(), channels, T(0));
    return scratch;
  };
  each(call.batch * call.heads * span_count, make, [&](Scratch& scratch, int64_t item) {
    const Plan<A, N, Index>& plan = plans[item % span_count];
    const Span& span = plan.span;
    const int64_t head = item / span_count % call.heads, b = item / span_count / call.heads;
    const int64_t grad_place = ((b * call.positions + span.start) * call.heads + head) * channels;
    const Map field = call.value.of_head(head, span.start);
    Walk<A, N, kHeld, T> walked{};
    walked.per = span.points, walked.channels = channels, walked.pitch = channels;
    walked.grad_columns = scratch.grads.get();
    if (gradients.coordinates)
      for (int axis = 0; axis < N; ++axis) walked.grad_shift[axis] = scratch.by_point.get() + axis * capacity;
    if (gradients.weights) walked.grad_factor = scratch.by_point.get() + N * capacity;
    if constexpr (kLaidOut) {
      const Window<1> window{{span.positions}, 0, span.positions};
      if (by_point) pack(field, b, 0, channels, window, 0, span.positions, scratch.rows.get());
      walked.field.first = scratch.rows.get();
      if (gradients.value) {
        std::fill_n(scratch.grad_rows.get(), (span.positions + 1) * channels, A(0));
        walked.grad_field.first = scratch.grad_rows.get();
      }
    } else {
      walked.field = {field.template at<T>(b), scratch.rows.get()};
      if (gradients.value)
        walked.grad_field = {gradients.value->template data<A>() + grad_place, scratch.grad_rows.get()};
    }
    const auto outside = static_cast<Index>(kLaidOut ? span.positions * channels : -1);
    for (int64_t first = 0; first < call.queries; first += block) {
      const int64_t queries = std::min(block, call.queries - first), points = queries * span.points;
      scratch.points.locate(call, plan, b, head, first, queries, outside);
      read_rows(grad_output, call.place(b, first, head, channels), pitch, queries, channels, scratch.grads.get());
      walk(scratch.points.cells, points, scratch.points.factors.get(), walked);
      const int64_t place = call.place(b, first, head, call.points) + span.first, stored = call.heads * call.points;
      if (gradients.coordinates) {
        if (call.nearest) scratch.points.cells.no_slopes(points, walked.grad_shift);
        for (int axis = 0; axis < N; ++axis) {
          A* const to = scratch.stored.get() + (call.x_first ? N - 1 - axis : axis);
          const A* const from = walked.grad_shift[axis];
          const A* const scale = plan.scale.get() + axis * plan.capacity();
#pragma omp simd
          for (int64_t i = 0; i < points; ++i) to[i * N] = from[i] * scale[i];
        }
        gradients.coordinates->write_rows(place * N, stored * N, scratch.stored.get(), queries, span.points * N);
      }
      if (gradients.weights) gradients.weights->write_rows(place, stored, walked.grad_factor, queries, span.points);
    }
    if (kLaidOut && gradients.value)
      gradients.value->write_rows(grad_place, pitch, scratch.grad_rows.get(), span.positions, channels);
  });
}

}  // namespace

template <int N>
Tensor attend(const Heads<N>& call, const Tensor& value) {
  const Tensor output = torch::stable::new_empty(value, call.output_shape);
  const bool wide = is_wide(call, call.value.position_stride);
  const auto run = [&]<typename A>() {
    wide ? attend<A, N, int64_t>(call, Sink(output)) : attend<A, N, int32_t>(call, Sink(output));
  };
  value.scalar_type() == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
  return output;
}

template <int N>
std::tuple<Tensor, Tensor, Tensor> attend_backward(Heads<N> call, const Tensor& grad_output, const Tensor& value,
                                                   const Tensor& coordinates, const Tensor& weights,
                                                   const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must have 3 values");
  STD_TORCH_CHECK(sizes_of(grad_output) == call.output_shape && grad_output.scalar_type() == value.scalar_type(),
                  "grad_output must have the output's shape and dtype");
  const Tensor grad = torch::stable::contiguous(grad_output);
  const ScalarType sum = sum_dtype(value.scalar_type());
  // One item of work for each sample and head; for each level of it, where those are few.
  std::vector<Span> spans{{0, call.points, 0, call.positions}};
  if (call.batch * call.heads < 8 && call.levels.size() > 1) {
    spans.clear();
    for (const Level<N>& level : call.levels)
      spans.push_back({level.first_point, level.points, level.start, level.positions()});
  }
  int64_t largest = 0;
  for (const Span& span : spans) largest = std::max(largest, span.positions);
  const bool laid_out = largest * call.channels * (sum == ScalarType::Double ? 8 : 4) <= plane_bytes;

  Tensor grad_value, grad_coordinates = empty_like(coordinates, output_mask[1]);
  Tensor grad_weights = empty_like(weights, output_mask[2]);
  if (laid_out || !output_mask[0]) {
    grad_value = empty_like(value, output_mask[0]);
  } else {
    grad_value = torch::stable::new_zeros(value, sizes_of(value), sum);
    call.value = Map::with_heads(torch::stable::contiguous(value));
  }
  HeadGradients gradients;
  if (output_mask[0]) gradients.value.emplace(grad_value);
  if (output_mask[1]) gradients.coordinates.emplace(grad_coordinates);
  if (output_mask[2]) gradients.weights.emplace(grad_weights);
  const bool wide = is_wide(call, laid_out ? call.channels : call.value.position_stride);
  const auto run = [&]<template <typename> typename kHeld, typename T>() {
    using A = Sum<T>;
    wide ? attend_backward<kHeld, T, A, N, int64_t>(call, grad, spans, gradients)
         : attend_backward<kHeld, T, A, N, int32_t>(call, grad, spans, gradients);
  };
  if (laid_out) {
    sum == ScalarType::Double ? run.template operator()<LaidOut, double>() : run.template operator()<LaidOut, float>();
  } else {
    dispatch_dtype(value.scalar_type(), [&]<typename T>() { run.template operator()<InPlace, T>(); });
  }
  return {rounded(grad_value, value.scalar_type()), grad_coordinates, grad_weights};
}

#define DEFORMKIT_INSTANTIATE(N)                                  \
  template Tensor attend<N>(const Heads<N>&, const Tensor&);      \
  template std::tuple<Tensor, Tensor, Tensor> attend_backward<N>( \
      Heads<N>, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::vector<bool>&);
DEFORMKIT_INSTANTIATE(1)
DEFORMKIT_INSTANTIATE(2)
DEFORMKIT_INSTANTIATE(3)

}  // namespace deformkit
