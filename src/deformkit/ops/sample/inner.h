// The cells of one register of points in a field that is read in place. Only the first element of each cell and the
// parts of its corners are kept. A cell at the edge of a field, with zeros or its nearest end outside, is moved inside,
// and the parts of its corners are changed.
#pragma once

#include "sample/sample.h"

namespace deformkit {

// A field whose positions are side by side.
template <int N>
struct InnerField {
  static constexpr int rows = 1 << (N - 1);  // pairs of corners that are neighbours along the last axis

  int32_t size[N], stride[N];
  int64_t row[rows] = {};
  bool has_edges, clamps;

  InnerField(const Axes<N>& sizes, Boundary boundary)
      : has_edges(boundary == Boundary::zeros || boundary == Boundary::border), clamps(boundary == Boundary::border) {
    int64_t pitch = 1;
    for (int axis = N; axis-- > 0; pitch *= sizes[axis]) {
      has_edges = has_edges && sizes[axis] > 1;
      size[axis] = static_cast<int32_t>(sizes[axis]), stride[axis] = static_cast<int32_t>(pitch);
      for (int r = 0; r < rows && axis < N - 1; ++r)
        if (r >> (N - 2 - axis) & 1) row[r] += pitch;
    }
  }
};

template <int N>
class InnerCells {
 public:
  using Run = Cells<float, N, int32_t>;
  using Reals = typename Run::Reals;
  using Indices = typename Run::Indices;
  static constexpr int corners = 1 << N;
  static constexpr float furthest = 1 << 30;  // outside of any field whose indices are int32

  // Locates a register of points base + shift, with no base where it is null. Returns false where a point's cell leaves
  // the field in another way: the general sampler locates such points.
  __attribute__((always_inline)) bool find(const InnerField<N>& field, const Reals (&shift)[N],
                                           const Indices* base = nullptr) {
    field_ = &field;
    Indices low[N], beyond{};
#pragma GCC unroll 3
    for (int axis = 0; axis < N; ++axis) {
      // A point far outside is moved to just outside, so that its cell fits an int32; so is a NaN.
      const Reals most = Reals{} + (base ? furthest : static_cast<float>(field.size[axis]));
      const Reals least = Reals{} - (base ? furthest : 2);
      Reals distance = shift[axis] > least ? shift[axis] : least;
      distance = distance < most ? distance : most;
      low[axis] = __builtin_convertvector(distance, Indices);
      low[axis] += __builtin_convertvector(low[axis], Reals) > distance;
      part_[axis][1] = distance - __builtin_convertvector(low[axis], Reals);
      part_[axis][0] = 1 - part_[axis][1];
      if (base) {
        const Indices outside = Indices{} + field.size[axis];
        low[axis] += base[axis];
        low[axis] = low[axis] < -2 ? Indices{} - 2 : low[axis] < outside ? low[axis] : outside;
      }
      beyond |= low[axis] | (field.size[axis] - 2 - low[axis]);
    }
    at_edge_ = any_lane(beyond >> 31);
    if (at_edge_ && !field.has_edges) return false;
    if (at_edge_) field.clamps ? move_inside<true>(shift, low) : move_inside<false>(shift, low);
    Indices element = low[N - 1];
#pragma GCC unroll 2
    for (int axis = 0; axis < N - 1; ++axis) element += low[axis] * field.stride[axis];
    write_lanes(element_, element);
    return true;
  }

  // Calls f(c, samples) for each plane c of some that are `pitch` elements apart.
  template <typename T, typename F>
  void sample(const T* plane, int64_t pitch, int64_t planes, const F& f) const {
    at_edge_ ? sample_as<true>(plane, pitch, planes, f) : sample_as<false>(plane, pitch, planes, f);
  }

  // Adds the gradient f(c) of the sample of each plane c, times the weight of each corner, to the corners there.
  template <typename F>
  void scatter(float* plane, int64_t pitch, int64_t planes, const F& f) const {
    at_edge_ ? scatter_as<true>(plane, pitch, planes, f) : scatter_as<false>(plane, pitch, planes, f);
  }

  // What lies at the corners in one plane, for interpolate() and slopes_of().
  template <typename T>
  void read(const T* plane, Reals (&value)[corners]) const {
    at_edge_ ? read_as<true>(plane, value) : read_as<false>(plane, value);
  }

  Reals interpolate(const Reals (&value)[corners]) const {
    Reals sum{};
#pragma GCC unroll 8
    for (int corner = 0; corner < corners; ++corner) sum += weight<false>(corner) * value[corner];
    return sum;
  }

  // The slopes along each axis.
  void slopes_of(const Reals (&value)[corners], Reals (&slope)[N]) const {
    at_edge_ ? slopes_from<true>(value, slope) : slopes_from<false>(value, slope);
  }

  // The slopes along each axis of the samples of all planes c, times their gradients f(c).
  template <typename T, typename F>
  void slopes(const T* plane, int64_t pitch, int64_t planes, const F& f, Reals (&slope)[N]) const {
    at_edge_ ? slopes_as<true>(plane, pitch, planes, f, slope) : slopes_as<false>(plane, pitch, planes, f, slope);
  }

 private:
  template <bool kClamps>
  void move_inside(const Reals (&shift)[N], Indices (&low)[N]) {
    for (Indices& counts : counts_) counts = Indices{} - 1;
    clamped_ = Indices{};
#pragma GCC unroll 3
    for (int axis = 0; axis < N; ++axis) {
      const Indices last = Indices{} + (field_->size[axis] - 2);
      const Indices moved = low[axis] < 0 ? Indices{} : low[axis] > last ? last : low[axis];
      const Indices by = low[axis] - moved, same = by == 0;
      const Reals none = shift[axis] == shift[axis] ? Reals{} : shift[axis], one = none + 1;
      Reals lower, upper;
      if constexpr (kClamps) {
        clamped_ |= ~same;
        lower = by < 0 ? one : none, upper = by > 0 ? one : none;
        slope_[axis][0] = same ? -one : none, slope_[axis][1] = same ? one : none;
      } else {
        lower = by == -1 ? part_[axis][1] : none, upper = by == 1 ? part_[axis][0] : none;
        // An upper part grows with the coordinate, a lower one shrinks.
        slope_[axis][0] = same ? -one : by == -1 ? one : none, slope_[axis][1] = same ? one : by == 1 ? -one : none;
      }
      part_[axis][0] = same ? part_[axis][0] : lower, part_[axis][1] = same ? part_[axis][1] : upper;
      low[axis] = moved;
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner) {
        const bool is_upper = Run::is_upper(corner, axis);
        counts_[corner] &= kClamps ? (shift[axis] == shift[axis]) & (same | (is_upper ? by > 0 : by < 0))
                                   : same | (by == (is_upper ? 1 : -1));
      }
    }
  }

  // The weight of a corner; with an axis, its slope along it.
  template <bool kEdge>
  Reals weight(int corner, int along = N) const {
    Reals product;
#pragma GCC unroll 3
    for (int axis = 0; axis < N; ++axis) {
      const int upper = Run::is_upper(corner, axis);
      const Reals inner = Reals{} + (upper ? 1.0f : -1.0f);
      const Reals factor = axis != along ? part_[axis][upper] : kEdge ? slope_[axis][upper] : inner;
      product = axis == 0 ? factor : product * factor;
    }
    return product;
  }

  // Reads the corners of one plane. Without the barrier the compiler computes the addresses of all planes before the
  // loop over them, and spills them.
  template <bool kEdge, typename T>
  void read_as(const T* plane, Reals (&value)[corners]) const {
    asm volatile("" : : : "memory");
#pragma GCC unroll 4
    for (int row = 0; row < corners / 2; ++row)
      load_pairs(plane + field_->row[row], element_, value[2 * row], value[2 * row + 1]);
    if constexpr (kEdge) {
      // A corner that does not count is not multiplied: it may be infinite.
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner)
        value[corner] = reinterpret_cast<Reals>(reinterpret_cast<Indices>(value[corner]) & counts_[corner]);
      // The end that stands for both corners is multiplied by 0, too: where it is infinite, the sample is NaN.
      if (!field_->clamps) return;
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner)
        value[corner] += reinterpret_cast<Reals>(reinterpret_cast<Indices>(0 * value[corner]) & clamped_);
    }
  }

  template <bool kEdge, typename T, typename F>
  void sample_as(const T* plane, int64_t pitch, int64_t planes, const F& f) const {
    Reals weights[corners], value[corners];
#pragma GCC unroll 8
    for (int corner = 0; corner < corners; ++corner) weights[corner] = weight<kEdge>(corner);
    for (int64_t c = 0; c < planes; ++c, plane += pitch) {
      read_as<kEdge>(plane, value);
      Reals sum{};
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner) sum += weights[corner] * value[corner];
      f(c, sum);
    }
  }

  template <bool kEdge, typename F>
  void scatter_as(float* plane, int64_t pitch, int64_t planes, const F& f) const {
    for (int64_t c = 0; c < planes; ++c, plane += pitch) {
      const Reals grad = f(c);
      // Corner by corner: those of neighbours seldom coincide, and an addition would wait for the one before.
      for (int corner = 0; corner < corners; ++corner) {
        Reals product = weight<kEdge>(corner) * grad;
        if constexpr (kEdge) product = reinterpret_cast<Reals>(reinterpret_cast<Indices>(product) & counts_[corner]);
        float amount[Run::lanes];
        write_lanes(amount, product);
        // One base for all lanes: the compiler would add up the plane's offset again for each.
        float* to = plane + field_->row[corner / 2] + corner % 2;
        asm("" : "+r"(to));
#pragma GCC unroll 16
        for (int lane = 0; lane < Run::lanes; ++lane) to[element_[lane]] += amount[lane];
      }
    }
  }

  template <bool kEdge, typename T, typename F>
  void slopes_as(const T* plane, int64_t pitch, int64_t planes, const F& f, Reals (&slope)[N]) const {
    Reals dots[corners] = {}, value[corners];
    for (int64_t c = 0; c < planes; ++c, plane += pitch) {
      const Reals grad = f(c);
      read_as<kEdge>(plane, value);
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner) dots[corner] += grad * value[corner];
    }
    slopes_from<kEdge>(dots, slope);
  }

  template <bool kEdge>
  void slopes_from(const Reals (&dots)[corners], Reals (&slope)[N]) const {
#pragma GCC unroll 3
    for (int axis = 0; axis < N; ++axis) {
      slope[axis] = Reals{};
#pragma GCC unroll 8
      for (int corner = 0; corner < corners; ++corner) slope[axis] += dots[corner] * weight<kEdge>(corner, axis);
    }
  }

  const InnerField<N>* field_;
  bool at_edge_;
  int32_t element_[Run::lanes];
  Reals part_[N][2], slope_[N][2];  // slopes at an edge
  Indices counts_[corners];
  Indices clamped_;  // the points beyond an end that is their value
};

}  // namespace deformkit
