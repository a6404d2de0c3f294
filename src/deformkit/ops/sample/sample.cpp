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
  typedef typename Lanes<std::make_unsigned_t<Index>, lanes>::type Unsigned;

  // What is known of the points.
  template <typename L>
  struct Given {
    std::array<const Index*, N> origin;
    std::array<L, N> lines;
    std::array<const A*, N> shift;
    const A* factor;
  };

  template <typename L>
  static Given<L> given(const Index* const (&origin)[N], const std::array<L, N>& lines, const A* const (&shift)[N],
                        const A* factor) {
    return {std::to_array(origin), lines, std::to_array(shift), factor};
  }

  template <bool kNearest, typename L>
  static void dispatch(const Run& cells, Boundary boundary, int64_t points, const Given<L>& given, Index outside) {
    switch (boundary) {
      case Boundary::zeros:
        return locate_as<Boundary::zeros, kNearest>(cells, points, given, outside);
      case Boundary::border:
        return locate_as<Boundary::border, kNearest>(cells, points, given, outside);
      case Boundary::reflect:
        return locate_as<Boundary::reflect, kNearest>(cells, points, given, outside);
      case Boundary::near:
        return locate_as<Boundary::near, false>(cells, points, given, outside);
    }
  }

  // Of a register of points, along one axis: the parts of the lower and the upper corner, their elements, and all bits
  // set where they count. The element of what does not count may have wrapped around.
  struct Side {
    Reals part[2];
    Unsigned element[2];
    Indices counts[2];
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
  static Side side_of(const Reals& shift, const Indices* origin, const L& line, bool starts, int64_t i) {
    Indices size, stride, least{}, past, start{};
    if constexpr (std::is_same_v<L, Line<Index>>) {
      size = Indices{} + line.size, stride = Indices{} + line.stride;
      least = Indices{} + line.least, past = Indices{} + line.past;
    } else {
      past = size = read_lanes<Indices>(line.size + i), stride = read_lanes<Indices>(line.stride + i);
      if (starts) start = read_lanes<Indices>(line.start + i);
    }
    // Far outside of any field, and within what an index can hold.
    constexpr bool kReflects = kBoundary == Boundary::reflect;
    Reals far = Reals{} + (kReflects || sizeof(Index) == 4 ? A(1 << 30) : A(int64_t(1) << 40));
    if constexpr (kReflects && sizeof(Index) == 8) {
      const Reals twice = __builtin_convertvector(2 * size, Reals);
      far = far > twice ? far : twice;
    }
    const auto number = shift == shift;
    // A NaN becomes -far, too.
    Reals distance = shift > -far ? shift : -far;
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
      low = wrapped(low, 2 * size), high = low - indices(distance == shift);
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
      const Indices inside = (~(cell - least) & (cell - past)) >> (8 * sizeof(Index) - 1);
      side.counts[upper] = kNearest && upper ? Indices{} : counts & inside;
      side.element[upper] = upper && kBoundary == Boundary::zeros
                                ? side.element[0] + Unsigned(stride)
                                : Unsigned(cell - least) * Unsigned(stride) + Unsigned(start);
    }
    return side;
  }

  // The points of a register that they do not fill, and zeros after them.
  template <typename L>
  class Rest {
   public:
    Rest(const Given<L>& all, int64_t first, int64_t points) : first_(first), points_(points), given_(all) {
      for (int axis = 0; axis < N; ++axis) {
        given_.origin[axis] = copy(all.origin[axis]);
        given_.shift[axis] = copy(all.shift[axis]);
        if constexpr (std::is_same_v<L, Lines<Index>>)
          given_.lines[axis] = {copy(all.lines[axis].size), copy(all.lines[axis].stride), copy(all.lines[axis].start)};
      }
      given_.factor = copy(all.factor);
    }
    const Given<L>& given() const { return given_; }

   private:
    const Index* copy(const Index* from) { return from ? copy(from, indices_[taken_indices_++]) : from; }
    const A* copy(const A* from) { return from ? copy(from, reals_[taken_reals_++]) : from; }
    template <typename T>
    const T* copy(const T* from, T (&to)[lanes]) {
      return std::copy_n(from + first_, points_ - first_, to), to;
    }

    const int64_t first_, points_;
    Given<L> given_;
    Index indices_[4 * N][lanes] = {};
    A reals_[N + 1][lanes] = {};
    int taken_indices_ = 0, taken_reals_ = 0;
  };

  template <Boundary kBoundary, bool kNearest, typename L>
  static void locate_as(const Run& cells, int64_t points, const Given<L>& given, Index outside) {
    const int64_t whole = points / lanes * lanes;
    locate_registers<kBoundary, kNearest>(cells, 0, whole, given, outside);
    if (whole == points) return;
    const Rest<L> rest(given, whole, points);
    locate_registers<kBoundary, kNearest>(cells, whole, lanes, rest.given(), outside);
  }

  // Locates the first `points` that are given; what is known of them goes to the place of `first` and on.
  template <Boundary kBoundary, bool kNearest, typename L>
  __attribute__((noinline)) static void locate_registers(const Run& cells, int64_t first, int64_t points,
                                                         const Given<L>& all, Index outside) {
    // Copies: a store might change what a reference leads to.
    const Given<L> given = all;
    A *fraction[N], *weight[Run::corners];
    Index* index[Run::corners];
    for (int axis = 0; axis < N; ++axis) fraction[axis] = cells.fraction(axis) + first;
    for (int corner = 0; corner < Run::corners; ++corner)
      weight[corner] = cells.weight(corner) + first, index[corner] = cells.index(corner) + first;
    for (int64_t i = 0; i < points; i += lanes) {
      Side side[N];
#pragma GCC unroll 3
      for (int axis = 0; axis < N; ++axis) {
        Indices at;
        if (given.origin[axis]) at = read_lanes<Indices>(given.origin[axis] + i);
        side[axis] =
            side_of<kBoundary, kNearest>(read_lanes<Reals>(given.shift[axis] + i), given.origin[axis] ? &at : nullptr,
                                         given.lines[axis], axis == N - 1, i);
        write_lanes(fraction[axis] + i, side[axis].part[1]);
      }
      const Reals factors = given.factor ? read_lanes<Reals>(given.factor + i) : Reals{} + 1;
      // The factor times 0: a NaN, of the factor or of a coordinate, does not hide, and neither does an infinite
      // factor, which stays away from a corner outside only if another one is inside.
      Reals without{};
      if (given.factor) {
        Indices touches = ~Indices{};
#pragma GCC unroll 3
        for (int axis = 0; axis < N; ++axis) touches &= side[axis].counts[0] | side[axis].counts[1];
        without = (masks(touches) & (factors == factors)) ? Reals{} : factors - factors;
      }
#pragma GCC unroll 8
      for (int corner = 0; corner < Run::corners; ++corner) {
        Reals product = side[0].part[Run::is_upper(corner, 0)];
        Unsigned element = side[0].element[Run::is_upper(corner, 0)];
        Indices counts = side[0].counts[Run::is_upper(corner, 0)];
#pragma GCC unroll 3
        for (int axis = 1; axis < N; ++axis) {
          product *= side[axis].part[Run::is_upper(corner, axis)];
          element += side[axis].element[Run::is_upper(corner, axis)];
          counts &= side[axis].counts[Run::is_upper(corner, axis)];
        }
        product *= masks(counts) ? factors : without;
        write_lanes(weight[corner] + i, product);
        write_lanes(index[corner] + i, counts ? Indices(element) : Indices{} + outside);
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
  const auto given = Locator::given(origin, lines, shift, factor);
  nearest ? Locator::template dispatch<true>(*this, boundary, points, given, outside)
          : Locator::template dispatch<false>(*this, boundary, points, given, outside);
}

template <typename A, int N, typename Index>
void Cells<A, N, Index>::locate(const std::array<Lines<Index>, N>& lines, Boundary boundary, bool nearest,
                                int64_t points, const Index* const (&origin)[N], const A* const (&shift)[N],
                                const A* factor, Index outside) {
  using Locator = deformkit::Locator<A, N, Index>;
  const auto given = Locator::given(origin, lines, shift, factor);
  if (nearest) {
    Locator::template locate_as<Boundary::border, true>(*this, points, given, outside);
  } else {
    Locator::template dispatch<false>(*this, boundary, points, given, outside);
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
