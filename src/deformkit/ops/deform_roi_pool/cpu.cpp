// The CPU kernels of deformable RoI pooling. The formula is in op.py, the sampler in sample/.
#include <numeric>
#include <tuple>

#include "sample/field.h"

namespace deformkit {
namespace {

constexpr int64_t run_points = 512;        // of one RoI that are worked on at a time
constexpr int64_t field_bytes = 32 * mib;  // of the images that are laid out at a time
constexpr int64_t plane_bytes = 8 * mib;   // of the channels of an image that a thread lays out, and of their gradient
constexpr int64_t slice_channels = 32;     // that one item of the backward owns
constexpr int64_t most_bins = int64_t(1) << 31;
constexpr int64_t most_samples = 1024;  // in a bin along one axis

template <typename A, int N>
struct Roi {
  int64_t index;  // among all RoIs
  A start[N], length[N];
  int64_t samples[N], total;  // in a bin
};

template <typename A, int N>
struct Problem {
  int64_t batch, channels, bins;
  Axes<N> size, output_size;
  std::vector<Roi<A, N>> rois;    // image by image
  std::vector<int64_t> first_of;  // of each image among them, and their number
  std::optional<Tensor> offset;   // [R, N, *output_size]
  A gamma;

  Problem(const Tensor& input, const Tensor& rois_, const std::optional<Tensor>& offset_,
          const std::vector<int64_t>& output_size_, double spatial_scale, int64_t sampling_ratio, double gamma_)
      : gamma(static_cast<A>(gamma_)) {
    const auto sizes = sizes_of(input), shape = sizes_of(rois_);
    STD_TORCH_CHECK(shape.size() == 2 && shape[1] == 1 + 2 * N, "rois must be [R, ", 1 + 2 * N, "]");
    STD_TORCH_CHECK(rois_.scalar_type() == sum_dtype(input.scalar_type()),
                    "rois must be float32, or float64 with a float64 input");
    STD_TORCH_CHECK(output_size_.size() == N, "output_size must have ", N, " values");
    STD_TORCH_CHECK(spatial_scale > 0 && std::isfinite(spatial_scale) && std::isfinite(gamma_) && sampling_ratio >= 0 &&
                        sampling_ratio <= most_samples,
                    "spatial_scale, sampling_ratio or gamma is out of range");
    batch = sizes[0], channels = sizes[1], bins = 1;
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
      offset = torch::stable::contiguous(*offset_);
    }
    read_rois(torch::stable::contiguous(rois_), shape[0], static_cast<A>(spatial_scale), sampling_ratio);
  }

  int64_t positions() const { return count<N>(size); }
  bool is_wide(int64_t elements) const {
    return elements >= (int64_t(1) << 31) || *std::max_element(size.begin(), size.end()) >= (int64_t(1) << 29);
  }

 private:
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
        // One sample shows what a corner that is no number does; none would hide it.
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

  // Where the bins of a RoI start.
  void start(const Problem<A, N>& problem, const Roi<A, N>& roi) {
    std::fill_n(factors.get(), run_points, 1 / static_cast<A>(std::max<int64_t>(roi.total, 1)));
    for (int axis = 0; axis < N; ++axis) {
      A* const origin = origins.get() + axis * problem.bins;
      if (problem.offset) {
        read_rows(*problem.offset, (roi.index * N + N - 1 - axis) * problem.bins, 0, 1, problem.bins, origin);
        const A by = problem.gamma * roi.length[axis];
        for (int64_t bin = 0; bin < problem.bins; ++bin) origin[bin] = roi.start[axis] + by * origin[bin];
      } else {
        std::fill_n(origin, problem.bins, roi.start[axis]);
      }
    }
  }

  // Calls f(first bin, number of bins, points of each) for runs of bins, or for parts of one if it has many points.
  template <typename F>
  void for_runs(const Problem<A, N>& problem, const Roi<A, N>& roi, int64_t width, Index outside, const F& f) {
    const int64_t together = std::max<int64_t>(1, run_points / std::max<int64_t>(roi.total, 1));
    for (int64_t bin = 0; bin < problem.bins; bin += together)
      for (int64_t point = 0; point < roi.total; point += run_points) {
        const int64_t some = std::min(together, problem.bins - bin), each = std::min(run_points, roi.total - point);
        place(problem, roi, bin, some, point, each);
        const Index* origin[N] = {};
        const A* shift[N];
        for (int axis = 0; axis < N; ++axis) shift[axis] = shifts.get() + axis * run_points;
        cells.locate(Window<N>{problem.size, 0, problem.size[0]}, Boundary::near, some * each, origin, {}, shift,
                     factors.get(), width, outside);
        f(bin, some, each);
      }
  }

 private:
  void place(const Problem<A, N>& problem, const Roi<A, N>& roi, int64_t bin, int64_t some, int64_t point,
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
        for (int axis = 0; axis < N; ++axis)
          *to[axis]++ =
              origins[axis * problem.bins + b] +
              (static_cast<A>(at[axis]) + (static_cast<A>(sample[axis]) + A(0.5)) / static_cast<A>(roi.samples[axis])) *
                  (roi.length[axis] / static_cast<A>(problem.output_size[axis]));
        step(samples, sample);
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

// The pooled values of one RoI, [bins, channels].
template <typename A, int N, typename Index, typename Field>
void pool(const Problem<A, N>& problem, const Roi<A, N>& roi, RoiPoints<A, N, Index>& points, const Field& field,
          int64_t channels, int64_t width, Index outside, A* part, A* sums) {
  const bool whole = roi.total > 0 && roi.total <= run_points;
  if (!whole) std::fill_n(sums, problem.bins * channels, A(0));
  points.start(problem, roi);
  points.for_runs(problem, roi, width, outside, [&](int64_t bin, int64_t some, int64_t each) {
    A* const to = sums + bin * channels;
    gather<false>(points.cells, some, each, field, channels, whole ? to : part, channels);
    if (!whole)
      for (int64_t c = 0; c < channels; ++c) to[c] += part[c];
  });
}

template <typename A, int N, typename Index>
struct PoolScratch {
  RoiPoints<A, N, Index> points;
  Buffer<A> part, sums, turned;
};

// The RoIs [first, last) of images that are laid out together, or one channel after the other where they are.
template <template <typename> typename kHeld, typename T, typename A, int N, typename Index>
void forward(const Problem<A, N>& problem, const Map& input, int64_t first_image, int64_t last_image,
             const Sink& output) {
  constexpr bool kLaidOut = !kHeld<A>::in_place;
  const int64_t channels = problem.channels, positions = problem.positions(), bins = problem.bins;
  const int64_t plane = (positions + 1) * channels, first = problem.first_of[first_image];
  Buffer<A> rows;
  if constexpr (kLaidOut) {
    constexpr int64_t run = 1024;
    const int64_t runs = ceil_div(positions, run);
    rows = Buffer<A>((last_image - first_image) * plane);
    each((last_image - first_image) * runs, [&](int64_t item) {
      const int64_t image = item / runs, begin = item % runs * run;
      pack(input, first_image + image, 0, channels, Window<N>{problem.size, 0, problem.size[0]}, begin,
           std::min(begin + run, positions), rows.get() + image * plane);
    });
  }
  std::vector<int64_t> image_of;
  for (int64_t image = first_image; image < last_image; ++image)
    image_of.insert(image_of.end(), problem.first_of[image + 1] - problem.first_of[image], image);
  const T zero(0);
  const int64_t width = kLaidOut ? channels : 1;
  const auto make = [&] {
    return PoolScratch<A, N, Index>{RoiPoints<A, N, Index>(bins), Buffer<A>(width), Buffer<A>(bins * width),
                                    Buffer<A>(bins * width)};
  };
  each(image_of.size(), make, [&](PoolScratch<A, N, Index>& scratch, int64_t item) {
    const Roi<A, N>& roi = problem.rois[first + item];
    A *const part = scratch.part.get(), *const sums = scratch.sums.get(), *const turned = scratch.turned.get();
    for (int64_t c = 0; c < channels; c += width) {
      if constexpr (kLaidOut) {
        const LaidOut<const A> field{rows.get() + (image_of[item] - first_image) * plane};
        pool(problem, roi, scratch.points, field, channels, channels, static_cast<Index>(positions * channels), part,
             sums);
      } else {
        const InPlace<const T> field{input.at<T>(image_of[item], c), &zero};
        pool(problem, roi, scratch.points, field, 1, input.position_stride, Index(-1), part, sums);
      }
      transpose(sums, bins, width, width, turned, bins);
      output.write((roi.index * channels + c) * bins, turned, width * bins);
    }
  });
}

// What is asked for; an absent one is not.
struct RoiGradients {
  std::optional<Sink> input, offset;
};

// Every item owns some channels of an image. Held LaidOut, it lays them and their gradient out for itself; InPlace, it
// takes one channel where it is, and `gradients.input` starts at zero and has the dtype of sums.
template <template <typename> typename kHeld, typename T, typename A, int N, typename Index>
void backward(const Problem<A, N>& problem, const Map& input, const Tensor& grad_output, int64_t width,
              const RoiGradients& gradients) {
  constexpr bool kLaidOut = !kHeld<A>::in_place;
  const int64_t channels = problem.channels, positions = problem.positions(), bins = problem.bins;
  const int64_t slices = ceil_div(channels, width), pitch = kLaidOut ? width : input.position_stride;
  const Window<N> window{problem.size, 0, problem.size[0]};
  struct Scratch {
    RoiPoints<A, N, Index> points;
    Buffer<T> rows;
    Buffer<A> grad_rows, grads, turned, slopes, by_bin;
  };
  const auto make = [&] {
    const int64_t plane = kLaidOut ? (positions + 1) * width : 1;
    Scratch scratch{RoiPoints<A, N, Index>(bins), Buffer<T>(plane),        Buffer<A>(plane),
                    Buffer<A>(bins * width),      Buffer<A>(bins * width), Buffer<A>(N * run_points),
                    Buffer<A>(N * bins)};
    scratch.rows[0] = T(0);
    return scratch;
  };
  Turns turns(problem.batch * slices);
  each(
      problem.batch * slices, make,
      [&](Scratch& scratch, int64_t item) {
        const int64_t image = item / slices, c = item % slices * width, own = std::min(width, channels - c);
        const int64_t first = problem.first_of[image], last = problem.first_of[image + 1];
        const int64_t place = (image * channels + c) * positions;
        const auto outside = static_cast<Index>(kLaidOut ? positions * own : -1);
        Walk<A, N, kHeld, T> walked{};
        walked.channels = walked.pitch = own;
        if constexpr (kLaidOut) {
          if (gradients.offset && first < last) pack(input, image, c, own, window, 0, positions, scratch.rows.get());
          walked.field.first = scratch.rows.get();
          if (gradients.input) {
            std::fill_n(scratch.grad_rows.get(), (positions + 1) * own, A(0));
            walked.grad_field.first = scratch.grad_rows.get();
          }
        } else {
          walked.field = {input.at<T>(image, c), scratch.rows.get()};
          if (gradients.input)
            walked.grad_field = {gradients.input->template data<A>() + place, scratch.grad_rows.get()};
        }
        for (int axis = 0; axis < N; ++axis)
          if (gradients.offset) walked.grad_shift[axis] = scratch.slopes.get() + axis * run_points;
        for (int64_t r = first; r < last; ++r) {
          const Roi<A, N>& roi = problem.rois[r];
          A* const by_bin = scratch.by_bin.get();
          read_rows(grad_output, (roi.index * channels + c) * bins, 0, 1, own * bins, scratch.turned.get());
          transpose(scratch.turned.get(), own, bins, bins, scratch.grads.get(), own);
          std::fill_n(by_bin, N * bins, A(0));
          scratch.points.start(problem, roi);
          scratch.points.for_runs(problem, roi, kLaidOut ? own : pitch, outside,
                                  [&](int64_t bin, int64_t some, int64_t each) {
                                    walked.per = each;
                                    walked.grad_columns = scratch.grads.get() + bin * own;
                                    walk(scratch.points.cells, some * each, scratch.points.factors.get(), walked);
                                    if (!gradients.offset) return;
                                    for (int axis = 0; axis < N; ++axis)
                                      for (int64_t i = 0; i < some * each; ++i)
                                        by_bin[axis * bins + bin + i / each] += walked.grad_shift[axis][i];
                                  });
          if (!gradients.offset) continue;
          for (int axis = 0; axis < N; ++axis)
            for (int64_t bin = 0; bin < bins; ++bin) by_bin[axis * bins + bin] *= problem.gamma * roi.length[axis];
          // The slices of an image add up, one after the other.
          if (c > 0) turns.wait(item, r - first);
          for (int axis = 0; axis < N; ++axis)
            gradients.offset->write((roi.index * N + N - 1 - axis) * bins, by_bin + axis * bins, bins, c > 0);
          turns.finish(item, r - first);
        }
        if (kLaidOut && gradients.input) unpack(scratch.grad_rows.get(), own, window, *gradients.input, place, false);
      },
      &turns);
}

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                       const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
                       double gamma) {
  Tensor output;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Problem<A, N> problem(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma);
    std::vector<int64_t> shape{static_cast<int64_t>(problem.rois.size()), problem.channels};
    shape.insert(shape.end(), output_size.begin(), output_size.end());
    output = torch::stable::new_empty(input, shape);
    const Map map(input);
    const int64_t positions = problem.positions(), elements = (positions + 1) * problem.channels;
    const int64_t together = field_bytes / std::max<int64_t>(elements * static_cast<int64_t>(sizeof(A)), 1);
    for (int64_t first = 0, last; first < problem.batch; first = last) {
      // Images that have RoIs, as many as may be laid out together.
      last = first + 1;
      const int64_t start = problem.first_of[first], number = problem.first_of[last] - start;
      if (number == 0) continue;
      double points = 0;
      for (int64_t r = start; r < start + number; ++r) points += static_cast<double>(problem.rois[r].total);
      const bool sparse = points * static_cast<double>(problem.bins << N) < static_cast<double>(positions) / 8;
      if (together == 0 || sparse) {
        const bool wide = problem.is_wide(positions * map.position_stride);
        dispatch_dtype(map.dtype(), [&]<typename T>() {
          if constexpr (std::is_same_v<Sum<T>, A>)
            wide ? forward<InPlace, T, A, N, int64_t>(problem, map, first, last, Sink(output))
                 : forward<InPlace, T, A, N, int32_t>(problem, map, first, last, Sink(output));
        });
        continue;
      }
      while (last < problem.batch && last - first < together && problem.first_of[last + 1] > problem.first_of[last])
        ++last;
      forward<LaidOut, A, A, N, int32_t>(problem, map, first, last, Sink(output));
    }
  });
  return output;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                                    const std::optional<Tensor>& offset,
                                                    const std::vector<int64_t>& output_size, double spatial_scale,
                                                    int64_t sampling_ratio, double gamma,
                                                    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must have 2 values");
  Tensor grad_input, grad_offset;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Problem<A, N> problem(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma);
    std::vector<int64_t> shape{static_cast<int64_t>(problem.rois.size()), problem.channels};
    shape.insert(shape.end(), output_size.begin(), output_size.end());
    STD_TORCH_CHECK(sizes_of(grad_output) == shape && grad_output.scalar_type() == input.scalar_type(),
                    "grad_output must have the output's shape and input's dtype");
    const bool by_input = output_mask[0], by_offset = output_mask[1] && offset;
    const ScalarType sums = sum_dtype(input.scalar_type());

    const int64_t positions = problem.positions(), bytes = (positions + 1) * static_cast<int64_t>(sizeof(A));
    const bool laid_out = bytes <= plane_bytes;
    int64_t width = laid_out ? slice_channels : 1;
    // Few channels: still work for two threads.
    while (width > 8 && problem.channels < 2 * width) width /= 2;
    while (width > 1 && width * bytes > plane_bytes) width /= 2;

    grad_input =
        by_input && !laid_out ? torch::stable::new_zeros(input, sizes_of(input), sums) : empty_like(input, by_input);
    grad_offset = empty_like(offset ? *offset : input, by_offset);
    const ScalarType offset_dtype = grad_offset.scalar_type();
    // What several slices add to does not pass through a half dtype.
    if (by_offset && offset_dtype != sums && width < problem.channels)
      grad_offset = torch::stable::new_empty(grad_offset, sizes_of(grad_offset), sums);
    if (by_offset && problem.channels == 0) torch::stable::zero_(grad_offset);
    RoiGradients gradients;
    if (by_input) gradients.input.emplace(grad_input);
    if (by_offset) gradients.offset.emplace(grad_offset);
    const Tensor grad = torch::stable::contiguous(grad_output);
    if (laid_out) {
      backward<LaidOut, A, A, N, int32_t>(problem, Map(input), grad, width, gradients);
    } else {
      const Map map(by_input ? torch::stable::contiguous(input) : input);
      const bool wide = problem.is_wide(positions * map.position_stride);
      dispatch_dtype(map.dtype(), [&]<typename T>() {
        if constexpr (std::is_same_v<Sum<T>, A>)
          wide ? backward<InPlace, T, A, N, int64_t>(problem, map, grad, width, gradients)
               : backward<InPlace, T, A, N, int32_t>(problem, map, grad, width, gradients);
      });
    }
    grad_input = rounded(grad_input, input.scalar_type());
    grad_offset = rounded(grad_offset, offset_dtype);
  });
  return {grad_input, grad_offset};
}
}  // namespace
}  // namespace deformkit

STABLE_TORCH_LIBRARY_IMPL(deformkit, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deformkit::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deformkit::deform_roi_pool_backward));
}
