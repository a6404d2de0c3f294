// The rows of a field that points touch, few among many, side by side: to read them there, or to sum up their gradient
// before it is rounded.
#pragma once

#include <bit>

#include "cpu/parallel.h"
#include "sample/rows.h"

namespace deformkit {

template <typename A>
class Touched {
 public:
  // At most `most` positions are touched between two calls of forget(); a row has `width` elements.
  Touched(int64_t most, int64_t width)
      : width_(width),
        mask_(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(2 * most + 2))) - 1),
        slots_(mask_ + 1),
        positions_(most + 1),
        places_(most + 1),
        rows_((most + 1) * width) {
    std::fill_n(slots_.get(), mask_ + 1, 0);
    std::fill_n(rows(), width, A(0));
  }

  // The row 0 is for what lies outside; those that follow start as zeros.
  A* rows() const { return rows_.get(); }
  int64_t count() const { return count_; }
  int64_t position(int64_t row) const { return positions_[row]; }

  // Replaces positions, negative where outside, by the first elements of their rows.
  template <typename Index>
  void find(int64_t count, Index* index) {
    for (int64_t i = 0; i < count; ++i) index[i] = static_cast<Index>(index[i] < 0 ? 0 : row_of(index[i]) * width_);
  }

  void forget() {
    for (int64_t row = 1; row <= count_; ++row) slots_[places_[row]] = 0;
    count_ = 0;
  }

 private:
  int64_t row_of(int64_t position) {
    int64_t place = static_cast<int64_t>(static_cast<uint64_t>(position) * 0x9e3779b97f4a7c15u >> 24) & mask_;
    for (; slots_[place] != 0; place = (place + 1) & mask_)
      if (positions_[slots_[place]] == position) return slots_[place];
    ++count_;
    slots_[place] = static_cast<int32_t>(count_), places_[count_] = place, positions_[count_] = position;
    std::fill_n(rows() + count_ * width_, width_, A(0));
    return count_;
  }

  int64_t width_, count_ = 0, mask_;
  Buffer<int32_t> slots_;  // the rows, or 0, at a hash of their positions
  Buffer<int64_t> positions_, places_;
  Buffer<A> rows_;
};

}  // namespace deformkit
