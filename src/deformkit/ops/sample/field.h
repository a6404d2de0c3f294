// A field laid out for sampling: the channels of one position side by side, so that a corner is one contiguous row.
#pragma once

#include "sample/sample.h"

namespace deformkit {

constexpr int64_t tile = 64;

// Rows of `channels` elements for every position of the window, then one row of zeros for what lies outside.
template <typename A, int N>
void pack(const Map& field, int64_t batch, int64_t channel, int64_t channels, const Window<N>& window, int64_t begin,
          int64_t end, A* rows) {
  const int64_t from = window.first * window.inner();
  dispatch_dtype(field.dtype(), [&]<typename T>() {
    const T* source = field.at<T>(batch, channel, from);
    const int64_t step = field.position_stride, jump = field.channel_stride;
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t last = std::min(first + tile, end);
      if (jump == 1) {
        for (int64_t p = first; p < last; ++p)
          for (int64_t c = 0; c < channels; ++c) rows[p * channels + c] = load<A>(source[p * step + c]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t p = first; p < last; ++p) rows[p * channels + c] = load<A>(source[c * jump + p * step]);
      }
    }
  });
  if (end == window.positions()) std::fill_n(rows + end * channels, channels, A(0));
}

// Stores rows laid out as by pack() in `out`, [channels, field positions] from element `at` on, or adds them to it.
template <typename A, int N>
void unpack(const A* rows, int64_t channels, const Window<N>& window, const Sink& out, int64_t at, bool add) {
  const int64_t positions = window.positions(), plane = count<N>(window.size);
  dispatch_dtype(out.dtype(), [&]<typename T>() {
    T* target = out.data<T>() + at + window.first * window.inner();
    for (int64_t first = 0; first < positions; first += tile) {
      const int64_t last = std::min(first + tile, positions);
      for (int64_t c = 0; c < channels; ++c) {
        T* line = target + c * plane;
        if (add) {
          for (int64_t p = first; p < last; ++p) line[p] = store<T>(load<A>(line[p]) + rows[p * channels + c]);
        } else {
          for (int64_t p = first; p < last; ++p) line[p] = store<T>(rows[p * channels + c]);
        }
      }
    }
  });
}

// For a field too large to lay out: the corners of these points alone, one channel, as a field of their own. The cells
// then point into it; `where` keeps the places that they pointed to, -1 for outside.
template <typename A, int N>
void compact(const Map& field, int64_t batch, int64_t channel, int64_t points, const Cells<A, N, int64_t>& cells,
             int64_t* where, A* rows) {
  constexpr int corners = 1 << N;
  dispatch_dtype(field.dtype(), [&]<typename T>() {
    const T* plane = field.at<T>(batch, channel);
    for (int corner = 0; corner < corners; ++corner) {
      for (int64_t i = 0; i < points; ++i) {
        int64_t& index = cells.index(corner)[i];
        const int64_t own = i * corners + corner;
        where[own] = index;
        rows[own] = index < 0 ? A(0) : load<A>(plane[index * field.position_stride]);
        index = own;
      }
    }
  });
}

// columns[i * pitch ...] = sample at point i of `channels` channels, times factor[i] if given.
template <typename A, int N, typename Index>
void gather(const Cells<A, N, Index>& cells, int64_t points, const A* rows, int64_t width, int64_t channels,
            const A* factor, A* columns, int64_t pitch) {
  constexpr int corners = 1 << N;
  for (int64_t i = 0; i < points; ++i) {
    A weight[corners];
    const A* row[corners];
    for (int corner = 0; corner < corners; ++corner) {
      weight[corner] = factor ? cells.weight(corner)[i] * factor[i] : cells.weight(corner)[i];
      row[corner] = rows + static_cast<int64_t>(cells.index(corner)[i]) * width;
    }
    A* column = columns + i * pitch;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      A sum = weight[0] * row[0][c];
      for (int corner = 1; corner < corners; ++corner) sum += weight[corner] * row[corner][c];
      column[c] = sum;
    }
  }
}

// What walk() is asked for; a null pointer asks for nothing.
template <typename A, int N>
struct Walk {
  const A* rows;          // the field, as by pack()
  const A* grad_columns;  // gradient of the loss by the samples, `pitch` apart
  A* columns;             // the samples, times factor
  A* grad_rows;           // += gradient by the field
  A* grad_shift[N];       // gradient by the shift; null in the first: not asked
  A* grad_factor;         // gradient by the factor
  int64_t pitch, width, channels;
};

// The one backward walk over the corners: samples again, and the gradient by field, point and factor.
template <bool kColumns, bool kPoint, bool kField, typename A, int N, typename Index>
void walk_as(const Cells<A, N, Index>& cells, int64_t points, const A* factor, const Walk<A, N>& w) {
  constexpr int corners = 1 << N;
  for (int64_t i = 0; i < points; ++i) {
    const A scale = factor ? factor[i] : A(1);
    A weight[corners], dots[corners] = {};
    int64_t at[corners];
    for (int corner = 0; corner < corners; ++corner) {
      weight[corner] = cells.weight(corner)[i] * scale;
      at[corner] = static_cast<int64_t>(cells.index(corner)[i]) * w.width;
    }
    const A* const grad = w.grad_columns + i * w.pitch;
    A* const column = w.columns + i * w.pitch;
    if constexpr (kColumns || kPoint) {
      if constexpr (N == 1) {
        A d0 = 0, d1 = 0;
        const A *const r0 = w.rows + at[0], *const r1 = w.rows + at[1];
#pragma omp simd reduction(+ : d0, d1)
        for (int64_t c = 0; c < w.channels; ++c) {
          if constexpr (kPoint) d0 += grad[c] * r0[c], d1 += grad[c] * r1[c];
          if constexpr (kColumns) column[c] = weight[0] * r0[c] + weight[1] * r1[c];
        }
        dots[0] = d0, dots[1] = d1;
      } else {
        for (int half = 0; half < corners; half += 4) {
          A d0 = 0, d1 = 0, d2 = 0, d3 = 0;
          const A *const r0 = w.rows + at[half], *const r1 = w.rows + at[half + 1];
          const A *const r2 = w.rows + at[half + 2], *const r3 = w.rows + at[half + 3];
          const A w0 = weight[half], w1 = weight[half + 1], w2 = weight[half + 2], w3 = weight[half + 3];
#pragma omp simd reduction(+ : d0, d1, d2, d3)
          for (int64_t c = 0; c < w.channels; ++c) {
            if constexpr (kPoint) {
              d0 += grad[c] * r0[c], d1 += grad[c] * r1[c];
              d2 += grad[c] * r2[c], d3 += grad[c] * r3[c];
            }
            if constexpr (kColumns) {
              const A sum = w0 * r0[c] + w1 * r1[c] + w2 * r2[c] + w3 * r3[c];
              column[c] = half == 0 ? sum : column[c] + sum;
            }
          }
          dots[half] = d0, dots[half + 1] = d1, dots[half + 2] = d2, dots[half + 3] = d3;
        }
      }
    }
    if constexpr (kPoint) {
      if (w.grad_shift[0]) {
        for (int axis = 0; axis < N; ++axis) w.grad_shift[axis][i] = scale * cells.slope(axis, i, dots);
      }
      if (w.grad_factor) {
        A sum = 0;
        for (int corner = 0; corner < corners; ++corner) sum += cells.weight(corner)[i] * dots[corner];
        w.grad_factor[i] = sum;
      }
    }
    if constexpr (kField) {
      // Rows may coincide (border, outside): corner after corner, not all at once.
      for (int corner = 0; corner < corners; ++corner) {
        A* const row = w.grad_rows + at[corner];
        const A by = weight[corner];
#pragma omp simd
        for (int64_t c = 0; c < w.channels; ++c) row[c] += by * grad[c];
      }
    }
  }
}

template <typename A, int N, typename Index>
void walk(const Cells<A, N, Index>& cells, int64_t points, const A* factor, const Walk<A, N>& w) {
  const int asked = (w.columns ? 4 : 0) + (w.grad_shift[0] || w.grad_factor ? 2 : 0) + (w.grad_rows ? 1 : 0);
  switch (asked) {
    case 1:
      return walk_as<false, false, true>(cells, points, factor, w);
    case 2:
      return walk_as<false, true, false>(cells, points, factor, w);
    case 3:
      return walk_as<false, true, true>(cells, points, factor, w);
    case 4:
      return walk_as<true, false, false>(cells, points, factor, w);
    case 5:
      return walk_as<true, false, true>(cells, points, factor, w);
    case 6:
      return walk_as<true, true, false>(cells, points, factor, w);
    default:
      return walk_as<true, true, true>(cells, points, factor, w);
  }
}

}  // namespace deformkit
