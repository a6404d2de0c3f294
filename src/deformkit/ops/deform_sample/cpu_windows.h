// The rows of a field, cut into windows along its first axis, and which windows the points of a group touch.
#pragma once

#include "deform_sample/cpu_problem.h"

namespace deformkit::sampling {

constexpr int64_t window_bytes = 2 * mib;   // of the gradient that an item of work adds up, if it can be cut so far
constexpr int64_t least_items = 8;          // into which the gradient is cut, if it is not small
constexpr int64_t least_bytes = 64 * 1024;  // of such a window
constexpr int64_t most_windows = 255;
constexpr uint8_t nowhere = 255;

// Windows of 2^shift rows each.
template <int N>
struct Windows {
  int64_t shift = 0, number = 1;

  // For a gradient whose positions have `width` bytes, of which there are `times`.
  Windows(const Problem<N>& problem, int64_t width, int64_t times) {
    const int64_t rows = problem.size[0], bytes = problem.positions() * width;
    int64_t wanted = ceil_div(bytes, window_bytes);
    if (times < least_items) wanted = std::max(wanted, std::min(ceil_div(least_items, times), bytes / least_bytes));
    wanted = std::clamp<int64_t>(wanted, 1, std::min(rows, most_windows));
    while (int64_t(2) << shift <= ceil_div(rows, wanted)) ++shift;
    while (ceil_div(rows, int64_t(1) << shift) > most_windows) ++shift;
    number = ceil_div(rows, int64_t(1) << shift);
  }

  Window<N> window(const Problem<N>& problem, int64_t i) const {
    return {problem.size, i << shift, std::min((i + 1) << shift, problem.size[0])};
  }
};

// For each point, the windows that its lower and its upper corners lie in; for each block of points, the first and the
// last of these.
template <typename A, int N, typename Index>
class Touches {
 public:
  Touches(const Problem<N>& problem, const Windows<N>& windows)
      : problem_(problem),
        lower_(windows.number > 1 ? problem.batch * problem.groups * problem.points : 0),
        upper_(windows.number > 1 ? problem.batch * problem.groups * problem.points : 0),
        range_(2 * problem.batch * problem.groups * problem.blocks()),
        one_(windows.number == 1) {
    if (one_) return;
    const int64_t blocks = problem.blocks();
    each(
        problem.batch * problem.groups * blocks, [] { return Points(); },
        [&](Points& points, int64_t item) {
          const int64_t begin = item % blocks * block<N>, some = std::min(block<N>, problem.points - begin);
          points.find(problem, windows, item / blocks, begin, some, lower(item / blocks) + begin,
                      upper(item / blocks) + begin, range_.get() + 2 * item);
        });
  }

  // Whether a block of a group's points touches a window, and whether it touches no other.
  bool touches(int64_t group, int64_t block, uint8_t window) const {
    const uint8_t* const range = range_.get() + 2 * (group * problem_.blocks() + block);
    return one_ || (range[0] <= window && window <= range[1]);
  }
  bool touches_no_other(int64_t group, int64_t block, uint8_t window) const {
    const uint8_t* const range = range_.get() + 2 * (group * problem_.blocks() + block);
    return one_ || (range[0] == window && range[1] == window);
  }

  // Lists those of the points [begin, begin + points) of a group that touch a window; returns their number.
  int64_t list(int64_t group, int64_t begin, int64_t points, uint8_t window, int64_t* to) const {
    typedef Lanes<uint8_t, 16>::type Some;
    constexpr int64_t some = sizeof(Some);
    const uint8_t *const low = lower(group) + begin, *const high = upper(group) + begin;
    int64_t found = 0, i = 0;
    const auto take = [&](int64_t point) {
      to[found] = begin + point;
      found += low[point] == window || high[point] == window;
    };
    for (; i + some <= points; i += some) {
      const auto hits = (read_lanes<Some>(low + i) == window) | (read_lanes<Some>(high + i) == window);
      uint64_t bits[2];
      std::memcpy(bits, &hits, sizeof bits);
      if ((bits[0] | bits[1]) == 0) continue;
      if (~(bits[0] & bits[1]) == 0) {
        for (int64_t k = 0; k < some; ++k) to[found + k] = begin + i + k;
        found += some;
      } else {
        for (int64_t k = 0; k < some; ++k) take(i + k);
      }
    }
    for (; i < points; ++i) take(i);
    return found;
  }

 private:
  // The first axis by itself.
  struct Points {
    Cells<A, 1, Index> cells{block<N>};
    Buffer<A> shifts{block<N>};

    void find(const Problem<N>& problem, const Windows<N>& windows, int64_t group, int64_t begin, int64_t points,
              uint8_t* lower, uint8_t* upper, uint8_t* range) {
      const Coordinates<A> from = coordinates_of<A>(problem, group, begin);
      for (int64_t i = 0; i < points; ++i) shifts[i] = from.first[i * from.point_stride];
      const A* const shift[1] = {shifts.get()};
      cells.locate(Window<1>{{problem.size[0]}, 0, problem.size[0]}, problem.boundary, problem.nearest, points, {}, {},
                   shift, nullptr, 1, -1);
      uint8_t least = nowhere, most = 0;
      for (int corner = 0; corner < 2; ++corner) {
        const Index* const index = cells.index(corner);
        uint8_t* const to = corner ? upper : lower;
        for (int64_t i = 0; i < points; ++i) {
          to[i] = index[i] < 0 ? nowhere : static_cast<uint8_t>(index[i] >> windows.shift);
          least = std::min(least, to[i]);
          most = std::max(most, index[i] < 0 ? uint8_t(0) : to[i]);
        }
      }
      range[0] = least, range[1] = most;
    }
  };

  uint8_t* lower(int64_t group) const { return lower_.get() + group * problem_.points; }
  uint8_t* upper(int64_t group) const { return upper_.get() + group * problem_.points; }

  const Problem<N>& problem_;
  Buffer<uint8_t> lower_, upper_, range_;
  bool one_;
};

}  // namespace deformkit::sampling
