// The RoIs of a call, image by image, and the points of their bins.
#pragma once

#include <algorithm>
#include <numeric>

#include "sample/field.h"
#include "sample/rows.h"

namespace deformkit {

// Measured by `python benchmarks/run.py roi` with other values in their place:
constexpr int64_t run_points = 512;                   // of one RoI that are worked on at a time
constexpr int64_t part_points = 32;                   // of a bin that are added up in one chain
constexpr int64_t few_corners = int64_t(1) << 18;     // that a thread holds, where they alone are
constexpr int64_t many_positions = int64_t(1) << 22;  // of an image that is not laid out

constexpr int64_t most_bins = int64_t(1) << 31;
constexpr int64_t most_samples = 1024;  // in a bin along one axis

template <typename A, int N>
struct Roi {
  int64_t index;  // among all RoIs
  A start[N], length[N];
  int64_t samples[N], total;  // in a bin
};

template <typename A, int N>
struct Pooling {
  int64_t batch, channels, bins, groups = 1;  // channels: of the output
  Axes<N> size, output_size, group_size{};
  bool sensitive;  // to position: a bin reads its group of channels, and samples outside are left out of its mean
  std::vector<Roi<A, N>> rois;    // image by image
  std::vector<int64_t> first_of;  // of each image among them, and their number
  std::optional<Tensor> offset;   // [R, N, *output_size]
  A gamma;

  Pooling(const Tensor& input, const Tensor& rois_, const std::optional<Tensor>& offset_,
          const std::vector<int64_t>& output_size_, double spatial_scale, int64_t sampling_ratio, double gamma_,
          const std::vector<int64_t>& group_size_)
      : sensitive(std::any_of(group_size_.begin(), group_size_.end(), [](int64_t cells) { return cells != 0; })),
        gamma(static_cast<A>(gamma_)) {
    const auto sizes = sizes_of(input), shape = sizes_of(rois_);
    STD_TORCH_CHECK(shape.size() == 2 && shape[1] == 1 + 2 * N, "rois must be [R, ", 1 + 2 * N, "]");
    STD_TORCH_CHECK(rois_.scalar_type() == sum_dtype(input.scalar_type()),
                    "rois must be float32, or float64 with a float64 input");
    STD_TORCH_CHECK(output_size_.size() == N, "output_size must have ", N, " values");
    STD_TORCH_CHECK(spatial_scale > 0 && std::isfinite(spatial_scale) && std::isfinite(gamma_) && sampling_ratio >= 0 &&
                        sampling_ratio <= most_samples,
                    "spatial_scale, sampling_ratio or gamma is out of range");
    if (sensitive) read_groups(group_size_, sizes[1]);
    batch = sizes[0], channels = sizes[1] / groups, bins = 1;
    std::vector<int64_t> expected{shape[0], N};
    for (int axis = 0; axis < N; ++axis) {
      size[axis] = sizes[axis + 2], output_size[axis] = output_size_[axis];
      STD_TORCH_CHECK(size[axis] > 0 && output_size[axis] > 0, "input's sizes and output_size must be positive");
      STD_TORCH_CHECK(output_size[axis] <= most_bins / bins, "output_size has more than ", most_bins, " bins");
      bins *= output_size[axis];
      expected.push_back(output_size[axis]);
    }
    if (offset_) {
      STD_TORCH_CHECK(sizes_of(*offset_) == expected, "offset's shape does not fit rois and output_size");
      STD_TORCH_CHECK((offset_->scalar_type() == ScalarType::Double) == (std::is_same_v<A, double>),
                      "offset's dtype does not fit input's");
      offset = contiguous(*offset_);
    }
    read_rois(contiguous(rois_), shape[0], static_cast<A>(spatial_scale), sampling_ratio);
  }

  // The fields of an image, of one channel of the output: one for each group, one after the other along the first axis.
  Window<N> fields() const {
    Axes<N> all = size;
    all[0] *= groups;
    return {all, 0, all[0]};
  }
  int64_t positions() const { return groups * count<N>(size); }
  // The input as these fields.
  Map map(const Tensor& input) const {
    if (groups == 1) return Map(input);
    Map all(contiguous(input));
    all.positions *= groups, all.channel_stride = all.positions, all.position_stride = 1;
    return all;
  }

  double work() const {
    double samples = 0;
    for (const Roi<A, N>& roi : rois) samples += static_cast<double>(roi.total);
    return work_of<N>(samples * static_cast<double>(bins), channels);
  }

  bool is_wide() const { return positions() >= int64_t(1) << 29; }

  // The corners of the samples in an image, no more than are worth a count.
  int64_t corners_of(int64_t image) const {
    double corners = 0;
    for (int64_t r = first_of[image]; r < first_of[image + 1]; ++r)
      corners += static_cast<double>(rois[r].total) * static_cast<double>(bins << N);
    return static_cast<int64_t>(std::min(corners, static_cast<double>(positions())));
  }

  // Whether only the corners of the samples of an image are laid out. This does not depend on the other images.
  bool is_sparse(int64_t image) const {
    const int64_t corners = corners_of(image);
    return positions() > many_positions || (corners <= few_corners && 2 * corners <= positions());
  }

 private:
  void read_groups(const std::vector<int64_t>& given, int64_t input_channels) {
    STD_TORCH_CHECK(given.size() == N, "group_size must have ", N, " values");
    for (int axis = 0; axis < N; ++axis) {
      group_size[axis] = given[axis];
      STD_TORCH_CHECK(given[axis] > 0 && given[axis] <= most_bins / groups,
                      "group_size must be positive, with at most ", most_bins, " groups");
      groups *= given[axis];
    }
    STD_TORCH_CHECK(input_channels % groups == 0, "group_size must divide input's channels");
  }

  void read_rois(const Tensor& tensor, int64_t number, A scale, int64_t sampling_ratio) {
    const A* const corners = static_cast<const A*>(tensor.data_ptr());
    std::vector<int64_t> image(number), order(number);
    for (int64_t r = 0; r < number; ++r) {
      const A index = corners[r * (1 + 2 * N)];
      STD_TORCH_CHECK(index >= 0 && index < static_cast<A>(batch) && index == std::floor(index), "rois[", r,
                      ", 0] must be a batch index, a whole number from 0 to ", batch - 1);
      image[r] = static_cast<int64_t>(index);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return image[a] < image[b]; });
    for (int64_t r : order) {
      while (static_cast<int64_t>(first_of.size()) <= image[r]) first_of.push_back(rois.size());
      Roi<A, N> roi;
      roi.index = r, roi.total = 1;
      bool known = true;
      for (int axis = 0; axis < N; ++axis) {
        const A* const corner = corners + r * (1 + 2 * N) + N - axis;  // x first
        roi.length[axis] = (corner[N] - corner[0]) * scale;
        roi.start[axis] = corner[0] * scale - A(0.5);
        known = known && std::isfinite(roi.length[axis]);
      }
      for (int axis = 0; axis < N; ++axis) {
        const A cells = std::ceil(roi.length[axis] / static_cast<A>(output_size[axis]));
        // One sample propagates a NaN corner; no sample would hide it.
        roi.samples[axis] = sampling_ratio > 0 ? sampling_ratio
                            : !known           ? 1
                                               : static_cast<int64_t>(std::clamp(cells, A(0), A(most_samples)));
        roi.total *= roi.samples[axis];
      }
      rois.push_back(roi);
    }
    while (static_cast<int64_t>(first_of.size()) <= batch) first_of.push_back(rois.size());
  }
};

// The points of a run of a RoI's bins, located.
template <typename A, int N, typename Index>
struct RoiPoints {
  Cells<A, N, Index> cells{run_points};
  Buffer<A> shifts{N * run_points}, factors{run_points}, origins;

  explicit RoiPoints(int64_t bins) : origins(N * bins) {}

  // The start of the bins of a RoI.
  void start(const Pooling<A, N>& problem, const Roi<A, N>& roi) {
    std::fill_n(factors.get(), run_points, 1 / static_cast<A>(std::max<int64_t>(roi.total, 1)));
    for (int axis = 0; axis < N; ++axis) {
      A* const origin = origins.get() + axis * problem.bins;
      if (problem.offset) {
        read_rows(*problem.offset, (roi.index * N + N - 1 - axis) * problem.bins, 0, 1, problem.bins, origin,
                  problem.bins);
        const A by = problem.gamma * roi.length[axis];
        for (int64_t bin = 0; bin < problem.bins; ++bin) origin[bin] = roi.start[axis] + by * origin[bin];
      } else {
        std::fill_n(origin, problem.bins, roi.start[axis]);
      }
    }
  }

  // Calls f(first bin, number of bins, points of each, whether they are the bins' first) for runs of bins, or for parts
  // of one if it has many points, with points outside to fill up its last.
  template <typename F>
  void for_runs(const Pooling<A, N>& problem, const Roi<A, N>& roi, int64_t width, Index outside, const F& f) {
    const bool whole = roi.total <= part_points;
    const int64_t together = whole ? run_points / std::max<int64_t>(roi.total, 1) : 1;
    for (int64_t bin = 0; bin < problem.bins; bin += together)
      for (int64_t point = 0; point < roi.total; point += run_points) {
        const int64_t some = std::min(together, problem.bins - bin), each = std::min(run_points, roi.total - point);
        const int64_t filled = whole ? each : ceil_div(each, part_points) * part_points;
        place(problem, roi, bin, some, point, each);
        if (problem.sensitive) leave_out(problem, roi, bin, some, each);
        const Index* origin[N] = {};
        const A* shift[N];
        for (int axis = 0; axis < N; ++axis) {
          shift[axis] = shifts.get() + axis * run_points;
          std::fill(shifts.get() + axis * run_points + some * each, shifts.get() + axis * run_points + some * filled,
                    -std::numeric_limits<A>::infinity());
        }
        cells.locate(Window<N>{problem.size, 0, problem.size[0]}, Boundary::near, false, some * filled, origin, {},
                     shift, factors.get(), width, outside);
        if (problem.groups > 1) enter_fields(problem, bin, some, filled, width, outside);
        f(bin, some, filled, point == 0);
      }
  }

 private:
  void place(const Pooling<A, N>& problem, const Roi<A, N>& roi, int64_t bin, int64_t some, int64_t point,
             int64_t each) {
    Axes<N> at, sample;
    split(bin, problem.output_size, at);
    A* to[N];
    for (int axis = 0; axis < N; ++axis) to[axis] = shifts.get() + axis * run_points;
    Axes<N> samples;
    std::copy_n(roi.samples, N, samples.begin());
    for (int64_t b = bin; b < bin + some; ++b) {
      split(point, samples, sample);
      for (int64_t i = 0; i < each; ++i) {
        for (int axis = 0; axis < N; ++axis) *to[axis]++ = coordinate(problem, roi, axis, b, at[axis], sample[axis]);
        step(samples, sample);
      }
      step(problem.output_size, at);
    }
  }

  A coordinate(const Pooling<A, N>& problem, const Roi<A, N>& roi, int axis, int64_t bin, int64_t at,
               int64_t sample) const {
    return origins[axis * problem.bins + bin] +
           (static_cast<A>(at) + (static_cast<A>(sample) + A(0.5)) / static_cast<A>(roi.samples[axis])) *
               (roi.length[axis] / static_cast<A>(problem.output_size[axis]));
  }

  // Whether a sample is left out. A NaN is not.
  static bool is_beyond(const Pooling<A, N>& problem, int axis, A coordinate) {
    return coordinate < A(-0.5) || coordinate > static_cast<A>(problem.size[axis]) - A(0.5);
  }

  // Moves the points that are left out of the mean away, and sets the factors of the others.
  void leave_out(const Pooling<A, N>& problem, const Roi<A, N>& roi, int64_t bin, int64_t some, int64_t each) {
    Axes<N> at;
    split(bin, problem.output_size, at);
    for (int64_t b = 0; b < some; ++b) {
      int64_t inside = 1;
      for (int axis = 0; axis < N; ++axis) {
        int64_t along = 0;
        for (int64_t i = 0; i < roi.samples[axis]; ++i)
          along += !is_beyond(problem, axis, coordinate(problem, roi, axis, bin + b, at[axis], i));
        inside *= along;
      }
      std::fill_n(factors.get() + b * each, each, 1 / static_cast<A>(std::max<int64_t>(inside, 1)));
      for (int axis = 0; axis < N; ++axis) {
        A* const along = shifts.get() + axis * run_points;
        for (int64_t i = b * each; i < (b + 1) * each; ++i)
          if (is_beyond(problem, axis, along[i])) along[i] = -std::numeric_limits<A>::infinity();
      }
      step(problem.output_size, at);
    }
  }

  // Moves the cells of each bin to the field of its group.
  void enter_fields(const Pooling<A, N>& problem, int64_t bin, int64_t some, int64_t each, int64_t width,
                    Index outside) const {
    Axes<N> at;
    split(bin, problem.output_size, at);
    for (int64_t b = 0; b < some; ++b) {
      int64_t group = 0;
      for (int axis = 0; axis < N; ++axis)
        group = group * problem.group_size[axis] + at[axis] * problem.group_size[axis] / problem.output_size[axis];
      const auto first = static_cast<Index>(group * count<N>(problem.size) * width);
      for (int corner = 0; corner < 1 << N; ++corner) {
        Index* const index = cells.index(corner) + b * each;
        for (int64_t i = 0; i < each; ++i) index[i] += index[i] == outside ? 0 : first;
      }
      step(problem.output_size, at);
    }
  }

  static void split(int64_t index, const Axes<N>& size, Axes<N>& at) {
    for (int axis = N; axis-- > 0;) at[axis] = index % size[axis], index /= size[axis];
  }

  static void step(const Axes<N>& size, Axes<N>& at) {
    for (int axis = N; axis-- > 0;) {
      if (++at[axis] < size[axis]) return;
      at[axis] = 0;
    }
  }
};

}  // namespace deformkit
