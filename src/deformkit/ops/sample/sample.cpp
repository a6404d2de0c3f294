// How the cells around points are found, compiled once for the operators that share it.
#include "sample/sample.h"

namespace deformkit {
namespace {

// Locates a register of points at a time.
template <typename A, int N, typename Index>
struct Locator {
  using Run = Cells<A, N, Index>;
  using Reals = typename Run::Reals;
  using Indices = typename Run::Indices;
  static constexpr int lanes = Run::lanes;
  typedef typename Lanes<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, lanes>::type Masks;

  template <bool kNearest, typename L>
  static void dispatch(const Run& cells, Boundary boundary, int64_t points, const Index* const (&origin)[N],
                       const std::array<L, N>& lines, const A* const (&shift)[N], const A* factor, Index outside) {
    switch (boundary) {
      case Boundary::zeros:
        return locate_as<Boundary::zeros, kNearest>(cells, points, origin, lines, shift, factor, outside);
      case Boundary::border:
        return locate_as<Boundary::border, kNearest>(cells, points, origin, lines, shift, factor, outside);
      case Boundary::reflect:
        return locate_as<Boundary::reflect, kNearest>(cells, points, origin, lines, shift, factor, outside);
      case Boundary::near:
        return locate_as<Boundary::near, false>(cells, points, origin, lines, shift, factor, outside);
    }
  }

  // Of a register of points, along one axis: the parts of the lower and the upper corner, their elements, and all bits
  // set where they count.
  struct Side {
    Reals part[2];
    Indices element[2], counts[2];
  };

  static Indices indices(auto mask) { return __builtin_convertvector(mask, Indices); }
  static Masks masks(auto mask) { return __builtin_convertvector(mask, Masks); }

  // `value` modulo `period`, not negative. The first quotient is some hundreds off at most, the second at most one.
  static Indices wrapped(Indices value, const Indices& period) {
    const Reals inverse = 1 / __builtin_convertvector(period, Reals);
    for (int step = 0; step < 2; ++step)
      value -= period * __builtin_convertvector(__builtin_convertvector(value, Reals) * inverse, Indices);
    value = value < 0 ? value + period : value;
    return value < period ? value : value - period;
  }

  template <Boundary kBoundary, bool kNearest, typename L>
  static Side side_of(const Reals& shift, const Indices* origin, const L& line, int64_t i, int64_t points) {
    Indices size, stride, least{}, past, start{};
    if constexpr (std::is_same_v<L, Line<Index>>) {
      size = Indices{} + line.size, stride = Indices{} + line.stride;
      least = Indices{} + line.least, past = Indices{} + line.past;
    } else {
      past = size = Run::template read_some<Indices>(line.size, i, points);
      stride = Run::template read_some<Indices>(line.stride, i, points);
      if (line.start) start = Run::template read_some<Indices>(line.start, i, points);
    }
    // Far outside of any field, and within what an index can hold.
    constexpr bool kReflects = kBoundary == Boundary::reflect;
    Reals far = Reals{} + (kReflects || sizeof(Index) == 4 ? A(1 << 30) : A(int64_t(1) << 40));
    if constexpr (kReflects && sizeof(Index) == 8) {
      const Reals twice = __builtin_convertvector(2 * size, Reals);
      far = far > twice ? far : twice;
    }
    const auto number = shift == shift;
    const Reals finite = number ? shift : Reals{};
    Reals distance = finite > -far ? finite : -far;
    distance = distance < far ? distance : far;
    const Reals rounded = kNearest ? distance + A(0.5) : distance;
    Indices whole = __builtin_convertvector(rounded, Indices);
    whole += indices(__builtin_convertvector(whole, Reals) > rounded);
    Reals rest = kNearest ? Reals{} : distance - __builtin_convertvector(whole, Reals);

    Indices low = whole;
    if (origin) low += *origin;
    if constexpr (std::is_same_v<L, Line<Index>>) low += line.tap;
    Indices high = low + 1, counts = indices(number);
    const Indices most = size - 1;
    if constexpr (kReflects) {
      // A shift that is clamped does not change its sample: its slope is 0.
      low = wrapped(low, 2 * size), high = low - indices(distance == finite);
      high = high == 2 * size ? Indices{} : high;
      low = low < size ? low : 2 * size - 1 - low;
      high = high < size ? high : 2 * size - 1 - high;
    }
    if constexpr (kBoundary == Boundary::near)
      counts = counts & (low >= -1) & ((low < size) | ((low == size) & indices(rest == 0)));
    if constexpr (kBoundary == Boundary::border || kBoundary == Boundary::near) {
      // Beyond an end both corners are that end: the value stays, and its slope is 0.
      rest = masks((low < 0) | (low >= most)) ? Reals{} : rest;
      low = low < 0 ? Indices{} : low > most ? most : low;
      high = high < 0 ? Indices{} : high > most ? most : high;
    }

    Side side;
    side.part[1] = number ? rest : shift;
    side.part[0] = 1 - side.part[1];
    for (int upper = 0; upper < 2; ++upper) {
      const Indices cell = upper ? high : low;
      // Signs, not comparisons: a conjunction of AVX-512 masks is compiled bit by bit (GCC 12).
      const Indices beyond = ((cell - least) | (past - 1 - cell)) >> (8 * sizeof(Index) - 1);
      side.counts[upper] = kNearest && upper ? Indices{} : counts & ~beyond;
      // What does not count may be too far away to be multiplied.
      side.element[upper] = ((cell - least) & side.counts[upper]) * stride + start;
    }
    return side;
  }

  template <Boundary kBoundary, bool kNearest, typename L>
  __attribute__((noinline)) static void locate_as(const Run& cells, int64_t points, const Index* const (&origin)[N],
                                                  const std::array<L, N>& lines, const A* const (&shift)[N],
                                                  const A* factor, Index outside) {
    for (int64_t i = 0; i < points; i += lanes) {
      Side side[N];
#pragma GCC unroll 3
      for (int axis = 0; axis < N; ++axis) {
        Indices at;
        if (origin[axis]) at = Run::template read_some<Indices>(origin[axis], i, points);
        side[axis] = side_of<kBoundary, kNearest>(Run::template read_some<Reals>(shift[axis], i, points),
                                                  origin[axis] ? &at : nullptr, lines[axis], i, points);
        write_lanes(cells.fraction(axis) + i, side[axis].part[1]);
      }
      const Reals factors = factor ? Run::template read_some<Reals>(factor, i, points) : Reals{} + 1;
      // The factor times 0: a NaN, of the factor or of a coordinate, does not hide, and neither does an infinite
      // factor, which stays away from a corner outside only if another one is inside.
      Reals without{};
      if (factor) {
        Indices touches = ~Indices{};
#pragma GCC unroll 3
        for (int axis = 0; axis < N; ++axis) touches &= side[axis].counts[0] | side[axis].counts[1];
        without = (masks(touches) & (factors == factors)) ? Reals{} : factors - factors;
      }
#pragma GCC unroll 8
      for (int corner = 0; corner < Run::corners; ++corner) {
        Reals product = side[0].part[Run::is_upper(corner, 0)];
        Indices element = side[0].element[Run::is_upper(corner, 0)], counts = side[0].counts[Run::is_upper(corner, 0)];
#pragma GCC unroll 3
        for (int axis = 1; axis < N; ++axis) {
          product *= side[axis].part[Run::is_upper(corner, axis)];
          element += side[axis].element[Run::is_upper(corner, axis)];
          counts &= side[axis].counts[Run::is_upper(corner, axis)];
        }
        product *= masks(counts) ? factors : without;
        write_lanes(cells.weight(corner) + i, product);
        write_lanes(cells.index(corner) + i, counts ? element : Indices{} + outside);
      }
    }
  }
};

}  // namespace

template <typename A, int N, typename Index>
void Cells<A, N, Index>::locate(const Window<N>& window, Boundary boundary, bool nearest, int64_t points,
                                const Index* const (&origin)[N], const Axes<N>& tap, const A* const (&shift)[N],
                                const A* factor, int64_t width, Index outside) {
  using Locator = deformkit::Locator<A, N, Index>;
  int64_t step = window.positions() / (window.last - window.first) * width;
  std::array<Line<Index>, N> lines;
  for (int axis = 0; axis < N; ++axis) {
    if (axis > 0) step /= window.size[axis];
    lines[axis] = {static_cast<Index>(tap[axis]), static_cast<Index>(window.size[axis]),
                   static_cast<Index>(axis == 0 ? window.first : 0),
                   static_cast<Index>(axis == 0 ? window.last : window.size[axis]), static_cast<Index>(step)};
  }
  nearest ? Locator::template dispatch<true>(*this, boundary, points, origin, lines, shift, factor, outside)
          : Locator::template dispatch<false>(*this, boundary, points, origin, lines, shift, factor, outside);
}

template <typename A, int N, typename Index>
void Cells<A, N, Index>::locate(const std::array<Lines<Index>, N>& lines, Boundary boundary, bool nearest,
                                int64_t points, const Index* const (&origin)[N], const A* const (&shift)[N],
                                const A* factor, Index outside) {
  using Locator = deformkit::Locator<A, N, Index>;
  if (nearest) {
    Locator::template locate_as<Boundary::border, true>(*this, points, origin, lines, shift, factor, outside);
  } else {
    Locator::template dispatch<false>(*this, boundary, points, origin, lines, shift, factor, outside);
  }
}

#define DEFORMKIT_INSTANTIATE(A, Index) \
  template class Cells<A, 1, Index>;    \
  template class Cells<A, 2, Index>;    \
  template class Cells<A, 3, Index>;
DEFORMKIT_INSTANTIATE(float, int32_t)
DEFORMKIT_INSTANTIATE(float, int64_t)
DEFORMKIT_INSTANTIATE(double, int32_t)
DEFORMKIT_INSTANTIATE(double, int64_t)

}  // namespace deformkit
