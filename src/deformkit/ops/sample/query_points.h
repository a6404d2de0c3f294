// The points that the queries of a head read, located in its field.
#pragma once

#include "sample/field.h"
#include "sample/heads.h"
#include "sample/rows.h"

namespace deformkit {

// Points of a head worked on at a time: so many that the work for each block counts little, and so few that they stay
// in a core's first cache. `python benchmarks/run.py attn aggregate` measures other values.
constexpr int64_t block_points = 512;

// How many queries are worked on at a time.
template <int N>
int64_t block_of(const Heads<N>& call) {
  return std::clamp<int64_t>(block_points / call.points, 1, std::max<int64_t>(call.queries, 1));
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

// The points of a run of queries, located. Weights whose rows are not made are not read: the cells have no factors.
template <typename A, int N, typename Index>
struct QueryPoints {
  Cells<A, N, Index> cells;
  Buffer<A> stored, shifts, factors;
  Buffer<Index> origins;

  QueryPoints(const Heads<N>& call, int64_t capacity)
      : cells(capacity),
        stored(N * capacity),
        shifts(N * capacity),
        factors(call.weights.is_made() ? Buffer<A>(capacity) : Buffer<A>()),
        origins(N * capacity) {}

  void locate(const Heads<N>& call, const Plan<A, N, Index>& plan, int64_t b, int64_t head, int64_t first,
              int64_t queries, Index outside) {
    const Span& span = plan.span;
    const int64_t points = queries * span.points, capacity = plan.capacity();
    read_rows(call.coordinates.tensor(), call.coordinates.place(b, first, head) + span.first * N,
              call.coordinates.query_stride(), queries, span.points * N, stored.get(), span.points * N);
    if (call.weights.is_made())
      read_rows(call.weights.tensor(), call.weights.place(b, first, head) + span.first, call.weights.query_stride(),
                queries, span.points, factors.get(), span.points);
    Index* own[N];
    const Index* origin[N];
    const A* shift[N];
    bool moves = std::any_of(call.stride.begin(), call.stride.end(), [](int64_t s) { return s != 0; });
    for (int axis = 0; axis < N; ++axis) own[axis] = origins.get() + axis * capacity;
    if (moves) fill_origins<N>(call.out_size, call.stride, call.padding, first, queries, span.points, own);
    for (int axis = 0; axis < N; ++axis) {
      const A* const from = stored.get() + (call.x_first ? N - 1 - axis : axis);
      const A *const scale = plan.scale.get() + axis * capacity, *const bias = plan.bias.get() + axis * capacity;
      if constexpr (sizeof(Index) == 8) {
        if (!moves) std::fill_n(own[axis], points, Index(0));
        split(from, scale, bias, points, own[axis], shifts.get() + axis * capacity);
      } else {
        spread(from, scale, bias, points, shifts.get() + axis * capacity);
      }
      origin[axis] = moves || sizeof(Index) == 8 ? own[axis] : nullptr;
      shift[axis] = shifts.get() + axis * capacity;
    }
    cells.locate(plan.lines(), call.boundary, call.nearest, points, origin, shift, factors.get(), outside);
  }

 private:
  static void spread(const A* from, const A* scale, const A* bias, int64_t points, A* to) {
#pragma omp simd
    for (int64_t i = 0; i < points; ++i) to[i] = from[i * N] * scale[i] + bias[i];
  }

  // The same for fields so long that a float cannot tell their positions apart: whole cells go to the origin.
  static void split(const A* from, const A* scale, const A* bias, int64_t points, Index* origin, A* to) {
    constexpr double far = int64_t(1) << 52;
    for (int64_t i = 0; i < points; ++i) {
      const double shift = static_cast<double>(from[i * N]) * scale[i] + bias[i], whole = std::floor(shift);
      const bool is_near = std::abs(shift) < far;
      if (is_near) origin[i] += static_cast<Index>(whole);
      to[i] = static_cast<A>(is_near ? shift - whole : shift);
    }
  }
};

}  // namespace deformkit
