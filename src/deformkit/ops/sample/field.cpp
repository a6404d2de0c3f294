// The walks over the corners of located points, compiled once for the operators that share them.
#include "sample/field.h"

namespace deformkit {
namespace {

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

// How many points before their use the rows of a far field are asked for: a point takes less time than its rows. A core
// waits for more lines of its second-level cache than of its first, so samples ask far ahead there; a gradient, which
// is written, asks for both in the first. `python benchmarks/run.py sample attn roi` measures other values.
constexpr int64_t points_ahead = 8, samples_ahead = 24;

template <typename U, typename V>
inline void write_sum(U* to, const V& sum) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<U, BFloat16> && sizeof(V) >= 32) return store_lanes_quickly(to, sum);
#endif
  store_lanes(to, sum);
}

// kChannels is the number of channels, or 0 for any. Inlined by GCC 12, a depthwise convolution took 3 % longer on
// AVX2: `python benchmarks/run.py conv` measures it.
template <bool kOne, int kChannels, typename A, int N, typename Index, typename Field, typename U>
__attribute__((noinline)) void gather_as(const Cells<A, N, Index>& cells, int64_t sums, int64_t per, const Field field,
                                         int64_t channels, U* columns, int64_t pitch) {
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
  const int64_t asking = field.far ? sums * per - samples_ahead : 0;
  const auto sum_up = [&]<int registers, int width>(int64_t j, int64_t c) {
    typedef typename Lanes<A, width>::type V;
    V sum[chains][registers];
    for (auto& chain : sum)
#pragma GCC unroll 4
      for (int r = 0; r < registers; ++r) chain[r] = V{};
    for (int64_t i = kOne ? j : j * per; i < (kOne ? j + 1 : (j + 1) * per); ++i) {
      if (kChannels > 0 && c == 0 && i < asking) {
        for (int corner = 0; corner < corners; ++corner)
          ask_for_lines<false, true>(field.row(indices[corner][i + samples_ahead]), kChannels);
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
      write_sum(columns + j * pitch + c + r * width, kOne ? sum[0][r] : sum[0][r] + sum[chains - 1][r]);
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

// Asks for the rows of a point that is walked over later.
template <bool kRead, bool kField, typename A, int N, typename Index, template <typename> typename kHeld, typename T>
__attribute__((always_inline)) inline void ask_for(const Cells<A, N, Index>& cells, int64_t i, int64_t channels,
                                                   const Walk<A, N, kHeld, T>& w) {
  for (int corner = 0; corner < 1 << N; ++corner) {
    const int64_t at = cells.index(corner)[i];
    if constexpr (kRead) ask_for_lines(w.field.row(at), channels);
    if constexpr (kField) ask_for_lines<true>(w.grad_field.row(at), channels);
  }
}

// kChannels is the number of channels, or 0 for any.
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

// The gradient by the factor alone: a point's sample, times its gradient. kChannels is the number of channels, or 0 for
// any.
template <int kChannels, typename A, int N, typename Index, template <typename> typename kHeld, typename T>
void correlate_as(const Cells<A, N, Index>& cells, int64_t points, const Walk<A, N, kHeld, T>& w) {
  constexpr int corners = 1 << N, lanes = lanes_for<A>(kChannels);
  typedef typename Lanes<A, lanes>::type V;
  const int64_t channels = kChannels > 0 ? kChannels : w.channels, whole = channels / lanes * lanes;
  const int64_t asking = w.field.far ? points - points_ahead : 0;
  const A* grad = w.grad_columns;
  int64_t left = w.per;
  const A* weights[corners];
  const Index* indices[corners];
#pragma GCC unroll 8
  for (int corner = 0; corner < corners; ++corner)
    weights[corner] = cells.weight(corner), indices[corner] = cells.index(corner);
  // The lanes of a product that are still to be added up; channels that fill none are added to `rest`.
  const auto product = [&](int64_t i, A& rest) __attribute__((always_inline)) {
    if (kChannels > 0 && i < asking) ask_for<true, false>(cells, i + points_ahead, channels, w);
    const T* rows[corners];
    A weight[corners];
#pragma GCC unroll 8
    for (int corner = 0; corner < corners; ++corner)
      rows[corner] = w.field.row(indices[corner][i]), weight[corner] = weights[corner][i];
    V sum{};
    for (int64_t c = 0; c < whole; c += lanes) {
      V sample{};
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner) sample += weight[corner] * load_lanes<V>(rows[corner] + c);
      sum += sample * read_lanes<V>(grad + c);
    }
    for (int64_t c = whole; c < channels; ++c) {
      A sample = 0;
      for (int corner = 0; corner < corners; ++corner) sample += weight[corner] * load<A>(rows[corner][c]);
      rest += sample * grad[c];
    }
    if (--left == 0) grad += w.pitch, left = w.per;
    return sum;
  };
  int64_t i = 0;
  for (; i + 4 <= points; i += 4) {
    V sums[4];
    A products[4] = {};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = product(i + k, products[k]);
    add_sums<A, lanes>(sums, products);
    std::copy_n(products, 4, w.grad_factor + i);
  }
  V sums[4] = {};
  A products[4] = {};
  const int64_t last = points - i;
  for (int64_t k = 0; k < last; ++k) sums[k] = product(i + k, products[k]);
  add_sums<A, lanes>(sums, products);
  std::copy_n(products, last, w.grad_factor + i);
}

}  // namespace

template <bool kOne, typename A, int N, typename Index, typename Field, typename U>
void gather(const Cells<A, N, Index>& cells, int64_t sums, int64_t per, const Field& field, int64_t channels,
            U* columns, int64_t pitch) {
  dispatch_channels<is_usual<A, Index>>(channels, [&](auto constant) {
    gather_as<kOne, constant.value>(cells, sums, per, field, channels, columns, pitch);
  });
}

template <typename A, int N, typename Index, template <typename> typename kHeld, typename T>
void walk(const Cells<A, N, Index>& cells, int64_t points, const A* factor, const Walk<A, N, kHeld, T>& w) {
  constexpr bool usual = is_usual<A, Index>;
  const int asked = (w.columns ? 4 : 0) + (w.by_point() ? 2 : 0) + (w.grad_field ? 1 : 0);
  if (asked == 2 && !w.grad_shift[0] && !factor)
    return dispatch_channels<usual>(w.channels, [&](auto constant) { correlate_as<constant.value>(cells, points, w); });
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

#define DEFORMKIT_GATHER(kOne, kHeld, T, N, Index)                                                             \
  template void gather<kOne>(const Cells<Sum<T>, N, Index>&, int64_t, int64_t, const kHeld<const T>&, int64_t, \
                             Sum<T>*, int64_t);
#define DEFORMKIT_WALK(kHeld, T, N, Index) \
  template void walk(const Cells<Sum<T>, N, Index>&, int64_t, const Sum<T>*, const Walk<Sum<T>, N, kHeld, T>&);
#define DEFORMKIT_LAID_OUT(T, N, Index)         \
  DEFORMKIT_GATHER(true, LaidOut, T, N, Index)  \
  DEFORMKIT_GATHER(false, LaidOut, T, N, Index) \
  DEFORMKIT_WALK(LaidOut, T, N, Index)
#define DEFORMKIT_IN_PLACE(T, N, Index)         \
  DEFORMKIT_GATHER(false, InPlace, T, N, Index) \
  DEFORMKIT_WALK(InPlace, T, N, Index)
#define DEFORMKIT_AXES(HELD, T, Index) HELD(T, 1, Index) HELD(T, 2, Index) HELD(T, 3, Index)
#define DEFORMKIT_INSTANTIATE(HELD, T) DEFORMKIT_AXES(HELD, T, int32_t) DEFORMKIT_AXES(HELD, T, int64_t)
DEFORMKIT_INSTANTIATE(DEFORMKIT_LAID_OUT, float)
DEFORMKIT_INSTANTIATE(DEFORMKIT_LAID_OUT, double)
DEFORMKIT_INSTANTIATE(DEFORMKIT_IN_PLACE, float)
DEFORMKIT_INSTANTIATE(DEFORMKIT_IN_PLACE, double)
DEFORMKIT_INSTANTIATE(DEFORMKIT_IN_PLACE, Half)
DEFORMKIT_INSTANTIATE(DEFORMKIT_IN_PLACE, BFloat16)
#if defined(__AVX512F__)
#define DEFORMKIT_GATHER_PAIRS(N)                                                                                     \
  template void gather<true>(const Cells<float, N, int32_t>&, int64_t, int64_t, const LaidOut<const float>&, int64_t, \
                             BFloat16*, int64_t);
DEFORMKIT_GATHER_PAIRS(1)
DEFORMKIT_GATHER_PAIRS(2)
DEFORMKIT_GATHER_PAIRS(3)
#endif

}  // namespace deformkit
