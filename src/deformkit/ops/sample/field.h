// A field as the kernels hold it: the channels of one position side by side, so that a corner is one contiguous row;
// and the two walks over the corners of located points, one to sample and one for the gradients.
#pragma once

#include "cpu/lanes.h"
#include "sample/rows.h"
#include "sample/sample.h"

namespace deformkit {

// Positions and channels that are turned at a time: as many channels as a register has lanes, whose lines stay in a
// core's first cache. `python benchmarks/run.py sample roi` measures other values.
constexpr int64_t tile = 256, tile_channels = register_bytes / 4;

// Rows of `channels` elements for `points` positions of some planes, from position `from` on.
template <typename A>
void read_turned(const Map& field, int64_t batch, int64_t channel, int64_t channels, int64_t from, int64_t points,
                 A* rows) {
  if (channels == 1) return read_run(field, batch, channel, from, points, rows);
  if (field.channel_stride == 1) {
    dispatch_dtype(field.dtype(), [&]<typename T>() {
      for (int64_t p = 0; p < points; ++p) {
        const T* source = field.at<T>(batch, channel, from + p);
        for (int64_t c = 0; c < channels; ++c) rows[p * channels + c] = load<A>(source[c]);
      }
    });
    return;
  }
  A lines[tile_channels * tile];
  const bool turns = field.position_stride == 1 && field.dtype() == sum_dtype_of<A>;
  for (int64_t p = 0; p < points; p += tile) {
    const int64_t some_points = std::min(tile, points - p);
    for (int64_t c = 0; c < channels; c += tile_channels) {
      const int64_t some = std::min(tile_channels, channels - c);
      const A* source = lines;
      if (turns) {
        source = field.at<A>(batch, channel + c, from + p);
      } else {
        for (int64_t i = 0; i < some; ++i)
          read_run(field, batch, channel + c + i, from + p, some_points, lines + i * tile);
      }
      transpose(source, some, some_points, turns ? field.channel_stride : tile, rows + p * channels + c, channels);
    }
  }
}

// The reverse: rows of `channels` elements, `pitch` apart, to planes, `plane` apart, of a tensor from element `at` on.
template <typename A>
void write_turned(const A* rows, int64_t pitch, int64_t points, int64_t channels, const Sink& out, int64_t at,
                  int64_t plane, bool add) {
  A lines[tile_channels * tile];
  const bool turns = out.dtype() == sum_dtype_of<A> && !add;
  for (int64_t p = 0; p < points; p += tile) {
    const int64_t some_points = std::min(tile, points - p);
    for (int64_t c = 0; c < channels; c += tile_channels) {
      const int64_t some = std::min(tile_channels, channels - c), to = at + c * plane + p;
      transpose(rows + p * pitch + c, some_points, some, pitch, turns ? out.data<A>() + to : lines,
                turns ? plane : tile);
      for (int64_t i = 0; i < some && !turns; ++i) out.write(to + i * plane, lines + i * tile, some_points, add);
    }
  }
}

// Rows of `channels` elements for the positions [begin, end) of the window; after its last, one row of zeros for what
// lies outside.
template <typename A, int N>
void pack(const Map& field, int64_t batch, int64_t channel, int64_t channels, const Window<N>& window, int64_t begin,
          int64_t end, A* rows) {
  read_turned(field, batch, channel, channels, window.first * window.inner() + begin, end - begin,
              rows + begin * channels);
  if (end == window.positions()) std::fill_n(rows + end * channels, channels, A(0));
}

// Stores rows laid out as by pack() in `out`, [channels, field positions] from element `at` on, or adds them to it.
template <typename A, int N>
void unpack(const A* rows, int64_t channels, const Window<N>& window, const Sink& out, int64_t at, bool add) {
  write_turned(rows, channels, window.positions(), channels, out, at + window.first * window.inner(),
               count<N>(window.size), add);
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

// Calls f(number of channels) with a constant for the usual numbers, so that loops over them unroll; with 0 for others,
// and for what is too rare to be worth its code.
template <bool kUsual, typename F>
void dispatch_channels(int64_t channels, const F& f) {
  switch (kUsual ? channels : 0) {
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

// How a field is held. Laid out by pack(), it has a row of zeros among its rows for what lies outside. Read where it
// is, in the tensor, the row for what lies outside is apart: corners there have a negative index. A field is `far` if
// it exceeds a core's caches, or has other rows between its own: its rows are asked for before they are read.
template <typename T>
struct LaidOut {
  static constexpr bool in_place = false;
  using Element = T;
  T* first = nullptr;
  bool far = false;

  T* row(int64_t index) const { return first + index; }
  LaidOut from(int64_t element) const { return {first + element, far}; }
  explicit operator bool() const { return first; }
};

template <typename T>
struct InPlace {
  static constexpr bool in_place = true, far = true;
  using Element = T;
  T *first = nullptr, *outside = nullptr;

  T* row(int64_t index) const { return index < 0 ? outside : first + index; }
  InPlace from(int64_t element) const { return {first + element, outside + element}; }
  explicit operator bool() const { return first; }
};

// How many points before their use the rows of a far field are asked for: a point takes less time than its rows.
// `python benchmarks/run.py sample attn roi` measures other values.
constexpr int64_t points_ahead = 8;

template <typename A, typename Index>
constexpr bool is_usual = std::is_same_v<A, float> && std::is_same_v<Index, int32_t>;

// columns[j * pitch ...] = the sum of the samples at the points [j * per, (j + 1) * per), of `channels` channels. With
// kOne, per is 1.
template <bool kOne, int kChannels, typename A, int N, typename Index, typename Field>
void gather_as(const Cells<A, N, Index>& cells, int64_t sums, int64_t per, const Field field, int64_t channels,
               A* columns, int64_t pitch) {
  using T = typename Field::Element;
  constexpr int corners = 1 << N, full = register_bytes / static_cast<int>(sizeof(A));
  constexpr int lanes = kChannels > 0 ? lanes_for<A>(kChannels) : full;
  constexpr int most = kChannels > 0 && kChannels / lanes < 4 ? kChannels / lanes : 4;
  const int64_t last = kChannels > 0 ? kChannels : channels;
  const A* weights[corners];
  const Index* indices[corners];
  for (int corner = 0; corner < corners; ++corner) {
    weights[corner] = cells.weight(corner);
    indices[corner] = cells.index(corner);
  }
  // The channels from c on, as many as some registers hold. A sum of many samples is two, of every other corner, so
  // that an addition does not wait for the one before.
  constexpr int chains = kOne ? 1 : 2;
  const int64_t asking = field.far ? sums * per - points_ahead : 0;
  const auto sum_up = [&]<int registers, int width>(int64_t j, int64_t c) {
    typedef typename Lanes<A, width>::type V;
    V sum[chains][registers];
    for (auto& chain : sum)
#pragma GCC unroll 4
      for (int r = 0; r < registers; ++r) chain[r] = V{};
    for (int64_t i = j * per; i < (kOne ? j + 1 : (j + 1) * per); ++i) {
      if (kChannels > 0 && c == 0 && i < asking) {
        for (int corner = 0; corner < corners; ++corner)
          ask_for_row(field.row(indices[corner][i + points_ahead]), kChannels);
      }
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner) {
        const T* const row = field.row(indices[corner][i]) + c;
        const A weight = weights[corner][i];
#pragma GCC unroll 4
        for (int r = 0; r < registers; ++r) sum[corner % chains][r] += weight * load_lanes<V>(row + r * width);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r)
      write_lanes(columns + j * pitch + c + r * width, kOne ? sum[0][r] : sum[0][r] + sum[chains - 1][r]);
  };
  for (int64_t j = 0; j < sums; ++j) {
    int64_t c = 0;
    for (; c + most * lanes <= last; c += most * lanes) sum_up.template operator()<most, lanes>(j, c);
    if constexpr (kChannels == 0) {
      for (; c + full <= last; c += full) sum_up.template operator()<1, full>(j, c);
      // The rest again with some channels before it, so that it fills a register.
      if (c < last && last >= full) sum_up.template operator()<1, full>(j, last - full), c = last;
      if (c + full / 2 <= last) sum_up.template operator()<1, full / 2>(j, c), c += full / 2;
      if (c < last && last >= full / 2) sum_up.template operator()<1, full / 2>(j, last - full / 2), c = last;
      for (; c < last; ++c) sum_up.template operator()<1, 1>(j, c);
    }
  }
}

template <bool kOne, typename A, int N, typename Index, typename Field>
void gather(const Cells<A, N, Index>& cells, int64_t sums, int64_t per, const Field& field, int64_t channels,
            A* columns, int64_t pitch) {
  dispatch_channels<is_usual<A, Index>>(channels, [&](auto constant) {
    gather_as<kOne, constant.value>(cells, sums, per, field, channels, columns, pitch);
  });
}

// What walk() is asked for; a null pointer asks for nothing. kHeld is LaidOut or InPlace, of elements T.
template <typename A, int N, template <typename> typename kHeld, typename T = A>
struct Walk {
  kHeld<const T> field;
  kHeld<A> grad_field;    // += gradient by the field
  const A* grad_columns;  // gradient of the loss by the sums of `per` samples, `pitch` apart
  A* columns;             // the sums of samples
  A* grad_shift[N];       // gradient by the shift
  A* grad_factor;         // gradient by the factor
  int64_t pitch, channels, per = 1;

  bool by_point() const { return grad_shift[0] || grad_factor; }
};

// Asks for the rows of a point that is walked over later.
template <bool kRead, bool kField, typename A, int N, typename Index, template <typename> typename kHeld, typename T>
__attribute__((always_inline)) inline void ask_for(const Cells<A, N, Index>& cells, int64_t i, int64_t channels,
                                                   const Walk<A, N, kHeld, T>& w) {
  for (int corner = 0; corner < 1 << N; ++corner) {
    const int64_t at = cells.index(corner)[i];
    if constexpr (kRead) ask_for_row(w.field.row(at), channels);
    if constexpr (kField) ask_for_row<true>(w.grad_field.row(at), channels);
  }
}

// The one backward walk over the corners: sums of samples again, and the gradient by field, point and factor. kChannels
// is the number of channels, or 0 for any.
template <bool kColumns, bool kPoint, bool kField, int kChannels, typename A, int N, typename Index,
          template <typename> typename kHeld, typename T>
void walk_as(const Cells<A, N, Index>& cells, int64_t points, const Walk<A, N, kHeld, T>& w) {
  constexpr int corners = 1 << N, most = corners < 4 ? corners : 4, lanes = lanes_for<A>(kChannels);
  typedef typename Lanes<A, lanes>::type V;
  const int64_t channels = kChannels > 0 ? kChannels : w.channels, whole = channels / lanes * lanes;
  A* const dots = cells.dots();
  const int64_t asking = w.field.far ? points - points_ahead : 0;
  const A* grad = w.grad_columns;
  A* column = w.columns;
  for (int64_t i = 0, left = w.per; i < points; ++i) {
    if (kChannels > 0 && i < asking) ask_for<kColumns || kPoint, kField>(cells, i + points_ahead, channels, w);
    if constexpr (kPoint) std::fill_n(dots + i * corners, corners, A(0));
    for (int from = 0; from < corners; from += most) {
      const bool begins = from == 0 && left == w.per;
      const T* rows[most];
      A *targets[most], weight[most];
      for (int corner = 0; corner < most; ++corner) {
        const int64_t at = cells.index(from + corner)[i];
        weight[corner] = cells.weight(from + corner)[i];
        if constexpr (kColumns || kPoint) rows[corner] = w.field.row(at);
        if constexpr (kField) targets[corner] = w.grad_field.row(at);
      }
      V sums[4] = {};
      for (int64_t c = 0; c < whole; c += lanes) {
        V g, sample;
        if constexpr (kPoint || kField) g = read_lanes<V>(grad + c);
        if constexpr (kColumns) sample = begins ? V{} : read_lanes<V>(column + c);
        for (int corner = 0; corner < most; ++corner) {
          if constexpr (kColumns || kPoint) {
            const V row = load_lanes<V>(rows[corner] + c);
            if constexpr (kPoint) sums[corner] += g * row;
            if constexpr (kColumns) sample += weight[corner] * row;
          }
          // Corners may share a row (border, outside): one after the other.
          if constexpr (kField) {
            A* const target = targets[corner] + c;
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
        A sample = kColumns && !begins ? column[c] : A(0);
        for (int corner = 0; corner < most; ++corner) {
          if constexpr (kPoint) dot[corner] += grad[c] * load<A>(rows[corner][c]);
          if constexpr (kColumns) sample += weight[corner] * load<A>(rows[corner][c]);
          if constexpr (kField) targets[corner][c] += weight[corner] * grad[c];
        }
        if constexpr (kColumns) column[c] = sample;
      }
    }
    if (--left == 0) grad += w.pitch, column += w.pitch, left = w.per;
  }
}

// `factor` is the one that the cells were located with.
template <typename A, int N, typename Index, template <typename> typename kHeld, typename T>
void walk(const Cells<A, N, Index>& cells, int64_t points, const A* factor, const Walk<A, N, kHeld, T>& w) {
  constexpr bool usual = is_usual<A, Index>;
  const int asked = (w.columns ? 4 : 0) + (w.by_point() ? 2 : 0) + (w.grad_field ? 1 : 0);
  const auto as = [&]<bool kColumns, bool kPoint, bool kField, int kChannels>() {
    walk_as<kColumns, kPoint, kField, kChannels>(cells, points, w);
  };
  switch (asked) {
    case 0:
      return;
    case 1:
      return dispatch_channels<usual>(
          w.channels, [&](auto constant) { as.template operator()<false, false, true, constant.value>(); });
    case 2:
      dispatch_channels<usual>(w.channels,
                               [&](auto constant) { as.template operator()<false, true, false, constant.value>(); });
      break;
    case 3:
      dispatch_channels<usual>(w.channels,
                               [&](auto constant) { as.template operator()<false, true, true, constant.value>(); });
      break;
    case 4:
      return as.template operator()<true, false, false, 0>();
    case 5:
      return as.template operator()<true, false, true, 0>();
    case 6:
      dispatch_channels<usual && !kHeld<A>::in_place>(
          w.channels, [&](auto constant) { as.template operator()<true, true, false, constant.value>(); });
      break;
    default:
      dispatch_channels<usual && !kHeld<A>::in_place>(
          w.channels, [&](auto constant) { as.template operator()<true, true, true, constant.value>(); });
  }
  cells.slopes(points, factor, w.grad_shift, w.grad_factor);
}

}  // namespace deformkit
