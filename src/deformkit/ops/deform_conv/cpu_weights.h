// Packs the weight of a slice for the products, and unpacks its gradient.
#pragma once

#include "deform_conv/cpu_plan.h"

namespace deformkit::conv {

// Rows of columns start on different cache lines modulo the size of a way of the cache, and there is room for a whole
// tile behind the last column.
template <typename A>
int64_t column_pitch(int64_t width) {
  return whole_tiles<A>(width) + 64 / static_cast<int64_t>(sizeof(A));
}

// The channels of a call in slices of at most about `width` channels: some groups, or a part of one.
template <int N>
std::vector<std::pair<int64_t, int64_t>> slices_of(const Problem<N>& problem, int64_t width) {
  const int64_t per_group = problem.group_channels, cuts = ceil_div(per_group, width);
  const int64_t step = cuts > 1 ? per_group : width / per_group * per_group;
  std::vector<std::pair<int64_t, int64_t>> slices;
  for (int64_t c = 0; c < problem.channels; c += step) {
    const int64_t channels = std::min(step, problem.channels - c);
    for (int64_t cut = 0; cut < cuts; ++cut)
      slices.emplace_back(c + channels * cut / cuts, c + channels * (cut + 1) / cuts);
  }
  return slices;
}

// Whether products are of pairs of bfloat16 with float32 sums, as the processor multiplies them, twice as fast. The
// weight and the output's gradient lose nothing by that; samples are rounded once.
template <int N>
bool is_paired(const Problem<N>& problem, ScalarType dtype) {
  return dtype == ScalarType::BFloat16 && !problem.is_narrow() && multiplies_pairs();
}

// Where an element of a slice's weight is packed: that of a group's first row (or panel of rows) at `first`, that of
// each further one `step` behind the one before.
struct Place {
  int64_t first, step;
};

// Where the weights of a segment start in row r of narrow groups, [rows, taps, channels].
template <int N>
int64_t narrow_row(const Problem<N>& problem, const Plan<N>& plan, int64_t r, const Segment& segment) {
  return (r * problem.taps + segment.tap) * plan.channels() + segment.begin - plan.begin;
}
template <int N>
Place narrow_place(const Problem<N>& problem, const Plan<N>& plan, const Segment& segment, int64_t c) {
  return {narrow_row(problem, plan, 0, segment) + c, problem.taps * plan.channels()};
}

// The places of all channels and taps of a slice, [C, taps], from f(segment, channel of the segment).
template <int N, typename F>
std::vector<Place> find_places(const Problem<N>& problem, const Plan<N>& plan, const F& f) {
  std::vector<Place> places(plan.channels() * problem.taps);
  for (const Segment& segment : plan.segments)
    for (int64_t c = 0; c < segment.channels; ++c)
      places[(segment.begin - plan.begin + c) * problem.taps + segment.tap] = f(segment, c);
  return places;
}

// Calls f(element of the weight, element of the slice's [C, taps], count) for the runs of elements that lie side by
// side in row r of the slice's groups.
template <int N, typename F>
void for_runs(const Problem<N>& problem, const Plan<N>& plan, int64_t r, const F& f) {
  const int64_t per_group = problem.group_channels, taps = problem.taps;
  for (int64_t c = plan.begin, next; c < plan.end; c = next) {
    const int64_t group = c / per_group;
    next = std::min(plan.end, (group + 1) * per_group);
    f(((group * problem.group_rows() + r) * per_group + c % per_group) * taps, (c - plan.begin) * taps,
      (next - c) * taps);
  }
}

// Packed for products of columns and weights: panels of output rows, one after the other for each product of the plan.
// With `turned`, for products of an output's gradient and weights: panels of columns. When groups are narrow,
// [rows, taps, channels].
template <typename A, int N>
class Weights {
 public:
  Weights(const Problem<N>& problem, const Plan<N>& plan, const Tensor& weight, bool turned = false)
      : problem_(problem), plan_(plan), rows_(problem.group_rows()) {
    size_ = problem.is_narrow() ? rows_ * problem.taps * plan.channels() : 0;
    for (const Product& product : plan.products) {
      place_.push_back(size_);
      depth_.push_back(turned ? rows_ : product.depth);
      size_ += depth_.back() * whole_tiles<A>(turned ? product.depth : rows_);
    }
    data_ = Buffer<A>(size_);
    dispatch_dtype(weight.scalar_type(), [&]<typename T>() {
      const T* const source = static_cast<const T*>(weight.data_ptr());
      if (problem.is_narrow() || turned) {
        pack_rows(source);
      } else {
        pack_panels(source);
      }
    });
    if constexpr (has_pairs<A>) {
      if (is_paired(problem, weight.scalar_type())) pair(turned);
    }
  }

  // The panels of a product, with or without pairs.
  template <typename O>
  Panels<O> of(size_t product) const {
    if constexpr (std::is_same_v<O, Pair>)
      return Panels<O>::packed(pairs_.get() + pair_place_[product], pair_depth_[product]);
    else
      return Panels<O>::packed(data_.get() + place_[product], depth_[product]);
  }

  // The weights of a segment's channels for one output row of their groups.
  A* narrow(int64_t r, const Segment& segment) const { return data_.get() + narrow_row(problem_, plan_, r, segment); }

 private:
  static constexpr int64_t tile = Tile<A>::columns;

  void pair(bool turned) {
    int64_t size = 0;
    for (size_t p = 0; p < depth_.size(); ++p) {
      pair_place_.push_back(size), pair_depth_.push_back(ceil_div(depth_[p], 2));
      size += pair_depth_[p] * whole_tiles<A>(turned ? plan_.products[p].depth : rows_);
    }
    pairs_ = Buffer<Pair>(size);
    each(static_cast<int64_t>(depth_.size()), [&](int64_t p) {
      const int64_t panels = whole_tiles<A>(turned ? plan_.products[p].depth : rows_) / tile;
      for (int64_t panel = 0; panel < panels; ++panel)
        pair_rows(data_.get() + place_[p] + panel * depth_[p] * tile, depth_[p], tile, tile,
                  pairs_.get() + pair_place_[p] + panel * pair_depth_[p] * tile, tile);
    });
    data_ = {};
  }

  template <typename T>
  void pack_rows(const T* source) {
    // The last panel has columns that the product does not have.
    if (!problem_.is_narrow()) std::fill_n(data_.get(), size_, A(0));
    const std::vector<Place> places = find_places(problem_, plan_, [&](const Segment& segment, int64_t c) {
      if (problem_.is_narrow()) return narrow_place(problem_, plan_, segment, c);
      const int64_t column = segment.column - plan_.products[segment.product].column + c;
      return Place{place_[segment.product] + column / tile * tile * rows_ + column % tile, tile};
    });
    each(rows_, [&](int64_t r) {
      for_runs(problem_, plan_, r, [&](int64_t from, int64_t first, int64_t count) {
        A* const to = data_.get();
        for (int64_t i = 0; i < count; ++i) {
          const Place& place = places[first + i];
          to[place.first + r * place.step] = load<A>(source[from + i]);
        }
      });
    });
  }

  // The weight of a group is [rows, channels, taps]. Some channels of a panel's rows at a time are turned as they lie,
  // and their lines of one tap and channel then go where the product wants them.
  template <typename T>
  void pack_panels(const T* source) {
    constexpr int64_t together = 512;  // elements of a row: the lines of a panel stay in cache
    const int64_t taps = problem_.taps, per_group = problem_.group_channels;
    const std::vector<Place> lines = find_places(problem_, plan_, [&](const Segment& segment, int64_t c) {
      const Product& product = plan_.products[segment.product];
      return Place{place_[segment.product] + (segment.column - product.column + c) * tile, product.depth * tile};
    });
    struct Scratch {
      Buffer<A> rows{tile * together}, turned{tile * together};
    };
    const int64_t panels = ceil_div(rows_, tile), groups = plan_.groups();
    each(
        groups * panels, [] { return Scratch(); },
        [&](Scratch& scratch, int64_t item) {
          const int64_t panel = item % panels, group = plan_.first_group() + item / panels;
          const int64_t some = std::min(tile, rows_ - panel * tile);
          const int64_t first = std::max(plan_.begin, group * per_group),
                        last = std::min(plan_.end, (group + 1) * per_group);
          for (int64_t e = first * taps; e < last * taps; e += together) {
            const int64_t count = std::min(together, last * taps - e);
            const T* const from =
                source + (group * rows_ + panel * tile) * per_group * taps + e - group * per_group * taps;
            std::fill_n(scratch.rows.get(), tile * together, A(0));
            for (int64_t r = 0; r < some; ++r)
              for (int64_t i = 0; i < count; ++i)
                scratch.rows[r * together + i] = load<A>(from[r * per_group * taps + i]);
            transpose<A>(scratch.rows.get(), tile, count, together, scratch.turned.get(), tile);
            for (int64_t i = 0; i < count; ++i) {
              const Place& line = lines[e - plan_.begin * taps + i];
              std::copy_n(scratch.turned.get() + i * tile, tile, data_.get() + line.first + panel * line.step);
            }
          }
        });
  }

  const Problem<N>& problem_;
  const Plan<N>& plan_;
  int64_t rows_, size_;
  std::vector<int64_t> place_, depth_, pair_place_, pair_depth_;
  Buffer<A> data_;
  Buffer<Pair> pairs_;
};

// Where the gradient by a slice's weight is summed up: [rows, whole_vectors(depth)] for each product, or, when groups
// are narrow, [rows, taps, channels].
template <typename A, int N>
class WeightSums {
 public:
  WeightSums(const Problem<N>& problem, const Plan<N>& plan) : problem_(problem), plan_(plan) {
    if (problem.is_narrow()) size_ = problem.group_rows() * problem.taps * plan.channels();
    for (const Product& product : plan.products) {
      place_.push_back(size_);
      size_ += problem.group_rows() * whole_vectors<A>(product.depth);
    }
  }

  int64_t size() const { return size_; }
  int64_t of(size_t product) const { return place_[product]; }
  int64_t narrow(int64_t r, const Segment& segment) const { return narrow_row(problem_, plan_, r, segment); }

  // Stores sums in the gradient [Cout, C / groups, taps].
  template <typename T>
  void write(const A* sums, T* out) const {
    const std::vector<Place> places = find_places(problem_, plan_, [&](const Segment& segment, int64_t c) {
      if (problem_.is_narrow()) return narrow_place(problem_, plan_, segment, c);
      const Product& product = plan_.products[segment.product];
      return Place{of(segment.product) + segment.column - product.column + c, whole_vectors<A>(product.depth)};
    });
    for (int64_t r = 0; r < problem_.group_rows(); ++r)
      for_runs(problem_, plan_, r, [&](int64_t to, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          const Place& place = places[first + i];
          out[to + i] = store<T>(sums[place.first + r * place.step]);
        }
      });
  }

 private:
  const Problem<N>& problem_;
  const Plan<N>& plan_;
  std::vector<int64_t> place_;
  int64_t size_ = 0;
};

}  // namespace deformkit::conv
