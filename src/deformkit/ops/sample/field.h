// A field laid out for sampling: the channels of one position side by side, so that a corner is one contiguous row.
#pragma once

#include "cpu/lanes.h"
#include "sample/sample.h"

namespace deformkit {

constexpr int64_t tile = 256;

// Rows of `channels` elements for the positions [begin, end) of the window; after its last, one row of zeros for what
// lies outside.
template <typename A, int N>
void pack(const Map& field, int64_t batch, int64_t channel, int64_t channels, const Window<N>& window, int64_t begin,
          int64_t end, A* rows) {
  const int64_t from = window.first * window.inner();
  if (field.channel_stride == 1) {
    dispatch_dtype(field.dtype(), [&]<typename T>() {
      for (int64_t p = begin; p < end; ++p) {
        const T* source = field.at<T>(batch, channel, from + p);
        for (int64_t c = 0; c < channels; ++c) rows[p * channels + c] = load<A>(source[c]);
      }
    });
  } else {
    A lines[8 * tile];
    for (int64_t p = begin; p < end; p += tile) {
      const int64_t points = std::min(tile, end - p);
      for (int64_t c = 0; c < channels; c += 8) {
        const int64_t some = std::min<int64_t>(8, channels - c);
        for (int64_t i = 0; i < some; ++i) read_run(field, batch, channel + c + i, from + p, points, lines + i * tile);
        transpose(lines, some, points, tile, rows + p * channels + c, channels);
      }
    }
  }
  if (end == window.positions()) std::fill_n(rows + end * channels, channels, A(0));
}

// Stores rows laid out as by pack() in `out`, [channels, field positions] from element `at` on, or adds them to it.
template <typename A, int N>
void unpack(const A* rows, int64_t channels, const Window<N>& window, const Sink& out, int64_t at, bool add) {
  const int64_t positions = window.positions(), plane = count<N>(window.size);
  A lines[8 * tile];
  for (int64_t p = 0; p < positions; p += tile) {
    const int64_t points = std::min(tile, positions - p);
    for (int64_t c = 0; c < channels; c += 8) {
      const int64_t some = std::min<int64_t>(8, channels - c);
      transpose(rows + p * channels + c, points, some, channels, lines, tile);
      for (int64_t i = 0; i < some; ++i)
        out.write(at + (c + i) * plane + window.first * window.inner() + p, lines + i * tile, points, add);
    }
  }
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

// Calls f(number of channels) with a constant for the usual numbers, so that loops over them unroll; with 0 for others.
template <typename F>
void dispatch_channels(int64_t channels, const F& f) {
  switch (channels) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// columns[i * pitch ...] = the sample at point i, of `channels` channels.
template <typename A, int N, typename Index>
void gather(const Cells<A, N, Index>& cells, int64_t points, const A* rows, int64_t channels, A* columns,
            int64_t pitch) {
  constexpr int corners = 1 << N;
  dispatch_channels(channels, [&](auto constant) {
    const int64_t last = constant.value > 0 ? constant.value : channels;
    for (int64_t i = 0; i < points; ++i) {
      A weight[corners];
      const A* row[corners];
      for (int corner = 0; corner < corners; ++corner) {
        weight[corner] = cells.weight(corner)[i];
        row[corner] = rows + cells.index(corner)[i];
      }
      A* const column = columns + i * pitch;
#pragma omp simd
      for (int64_t c = 0; c < last; ++c) {
        A sum = weight[0] * row[0][c];
        for (int corner = 1; corner < corners; ++corner) sum += weight[corner] * row[corner][c];
        column[c] = sum;
      }
    }
  });
}

// What walk() is asked for; a null pointer asks for nothing.
template <typename A, int N>
struct Walk {
  const A* rows;          // the field, as by pack()
  const A* grad_columns;  // gradient of the loss by the samples, `pitch` apart
  A* columns;             // the samples
  A* grad_rows;           // += gradient by the field
  A* grad_shift[N];       // gradient by the shift
  A* grad_factor;         // gradient by the factor
  int64_t pitch, channels;

  bool by_point() const { return grad_shift[0] || grad_factor; }
};

// The one backward walk over the corners: samples again, and the gradient by field, point and factor. kChannels is the
// number of channels, or 0 for any.
template <bool kColumns, bool kPoint, bool kField, int kChannels, typename A, int N, typename Index>
void walk_as(const Cells<A, N, Index>& cells, int64_t points, const Walk<A, N>& w) {
  constexpr int corners = 1 << N, most = corners < 4 ? corners : 4, full = register_bytes / static_cast<int>(sizeof(A));
  constexpr int lanes = kChannels > 0 && kChannels % full == 0 ? full
                        : kChannels == 4                       ? 4
                                                               : 32 / static_cast<int>(sizeof(A));
  typedef typename Lanes<A, lanes>::type V;
  const int64_t channels = kChannels > 0 ? kChannels : w.channels, whole = channels / lanes * lanes;
  A* const dots = cells.dots();
  for (int64_t i = 0; i < points; ++i) {
    const A* const grad = w.grad_columns + i * w.pitch;
    A* const column = w.columns + i * w.pitch;
    if constexpr (kPoint) std::fill_n(dots + i * corners, corners, A(0));
    for (int from = 0; from < corners; from += most) {
      int64_t at[most];
      A weight[most];
      for (int corner = 0; corner < most; ++corner) {
        weight[corner] = cells.weight(from + corner)[i];
        at[corner] = cells.index(from + corner)[i];
      }
      V sums[4] = {};
      for (int64_t c = 0; c < whole; c += lanes) {
        V g, sample;
        if constexpr (kPoint || kField) g = read_lanes<V>(grad + c);
        if constexpr (kColumns) sample = from == 0 ? V{} : read_lanes<V>(column + c);
        for (int corner = 0; corner < most; ++corner) {
          if constexpr (kColumns || kPoint) {
            const V row = read_lanes<V>(w.rows + at[corner] + c);
            if constexpr (kPoint) sums[corner] += g * row;
            if constexpr (kColumns) sample += weight[corner] * row;
          }
          // Corners may share a row (border, outside): one after the other.
          if constexpr (kField) {
            A* const target = w.grad_rows + at[corner] + c;
            write_lanes(target, read_lanes<V>(target) + weight[corner] * g);
          }
        }
        if constexpr (kColumns) write_lanes(column + c, sample);
      }
      A* const dot = dots + i * corners + from;
      if constexpr (kPoint) {
        if constexpr (most == 4) {
          add_sums<A, lanes>(sums, dot);
        } else {
          A both[4] = {};
          add_sums<A, lanes>(sums, both);
          dot[0] = both[0], dot[1] = both[1];
        }
      }
      for (int64_t c = whole; c < channels; ++c) {
        A sample = kColumns && from > 0 ? column[c] : A(0);
        for (int corner = 0; corner < most; ++corner) {
          if constexpr (kPoint) dot[corner] += grad[c] * w.rows[at[corner] + c];
          if constexpr (kColumns) sample += weight[corner] * w.rows[at[corner] + c];
          if constexpr (kField) w.grad_rows[at[corner] + c] += weight[corner] * grad[c];
        }
        if constexpr (kColumns) column[c] = sample;
      }
    }
  }
}

// `factor` is the one that the cells were located with.
template <typename A, int N, typename Index>
void walk(const Cells<A, N, Index>& cells, int64_t points, const A* factor, const Walk<A, N>& w) {
  const int asked = (w.columns ? 4 : 0) + (w.by_point() ? 2 : 0) + (w.grad_rows ? 1 : 0);
  switch (asked) {
    case 0:
      return;
    case 1:
      return walk_as<false, false, true, 0>(cells, points, w);
    case 2:
      walk_as<false, true, false, 0>(cells, points, w);
      break;
    case 3:
      walk_as<false, true, true, 0>(cells, points, w);
      break;
    case 4:
      return walk_as<true, false, false, 0>(cells, points, w);
    case 5:
      return walk_as<true, false, true, 0>(cells, points, w);
    case 6:
      walk_as<true, true, false, 0>(cells, points, w);
      break;
    default:
      dispatch_channels(w.channels,
                        [&](auto constant) { walk_as<true, true, true, constant.value>(cells, points, w); });
  }
  cells.slopes(points, factor, w.grad_shift, w.grad_factor);
}

}  // namespace deformkit
