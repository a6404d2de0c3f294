// The CPU kernels of deformable RoI pooling. The formula is in op.py, the sampler in sample/.
#include <tuple>

#include "cpu/operators.h"
#include "deform_roi_pool/cpu_points.h"
#include "sample/touched.h"

namespace deformkit {
namespace {

// Measured by `python benchmarks/run.py roi` with other values in their place:
constexpr int64_t field_bytes = 32 * mib;  // of the images that are laid out at a time
constexpr int64_t plane_bytes = 8 * mib;   // of the channels of an image that a thread holds, and of their gradient
constexpr int64_t slice_channels = 32;     // that one item of the backward owns

// The source of the channels [channel, channel + width) of an image: laid out, or only the corners of the samples.
template <typename A>
struct Held {
  const Map& input;
  int64_t image, channel, width;
  A* rows;
  Touched<A>* corners = nullptr;

  // The arguments for locating cells: the elements of a position, and the index of points outside.
  int64_t pitch() const { return corners ? 1 : width; }
  int64_t outside(int64_t positions) const { return corners ? -1 : positions * width; }

  // Points located cells at the rows of their corners, which are read if they are new.
  template <int N, typename Index>
  void find(const Cells<A, N, Index>& cells, int64_t points) const {
    if (!corners) return;
    const int64_t known = corners->count();
    for (int corner = 0; corner < 1 << N; ++corner) corners->find(points, cells.index(corner));
    if (!rows) return;
    dispatch_dtype(input.dtype(), [&]<typename T>() {
      for (int64_t row = known + 1; row <= corners->count(); ++row) {
        const T* const from = input.at<T>(image, channel, corners->position(row));
        for (int64_t c = 0; c < width; ++c) rows[row * width + c] = load<A>(from[c * input.channel_stride]);
      }
    });
  }
};

// sum[c] += its parts; the rounding errors are collected in `lost`.
template <typename A>
void add_parts(const A* parts, int64_t count, int64_t channels, A* sum, A* lost) {
  for (int64_t part = 0; part < count; ++part, parts += channels)
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A more = parts[c] - lost[c], next = sum[c] + more;
      // Infinity has no rounding error.
      lost[c] = next - next == 0 ? (next - sum[c]) - more : 0;
      sum[c] = next;
    }
}

template <typename A, int N, typename Index>
struct PoolScratch {
  RoiPoints<A, N, Index> points;
  Buffer<A> parts, lost, sums, turned;
  std::optional<Touched<A>> corners;

  // The pooled values of one RoI, [bins, channels].
  void pool(const Pooling<A, N>& problem, const Roi<A, N>& roi, const Held<A>& held) {
    const int64_t channels = held.width;
    const bool whole = roi.total > 0 && roi.total <= part_points;
    if (!whole) std::fill_n(sums.get(), problem.bins * channels, A(0));
    points.start(problem, roi);
    const auto outside = static_cast<Index>(held.outside(problem.positions()));
    points.for_runs(problem, roi, held.pitch(), outside, [&](int64_t bin, int64_t some, int64_t each, bool first) {
      // A run does not need the corners of other runs.
      if (corners) corners->forget();
      held.find(points.cells, some * each);
      A* const to = sums.get() + bin * channels;
      const LaidOut<const A> field{held.rows};
      if (whole) return gather<false>(points.cells, some, each, field, channels, to, channels);
      gather<false>(points.cells, each / part_points, part_points, field, channels, parts.get(), channels);
      if (first) std::fill_n(lost.get(), channels, A(0));
      add_parts(parts.get(), each / part_points, channels, to, lost.get());
    });
  }
};

// The channels [channel, channel + width) of the RoIs [first, last) of images, which are laid out together unless
// sparse.
template <typename A, int N, typename Index>
void forward(const Pooling<A, N>& problem, const Map& input, int64_t first_image, int64_t last_image, int64_t channel,
             int64_t width, bool sparse, const Sink& output) {
  const int64_t positions = problem.positions(), bins = problem.bins;
  const int64_t plane = (positions + 1) * width, first = problem.first_of[first_image];
  Buffer<A> rows;
  if (!sparse) {
    constexpr int64_t run = 1024;
    const int64_t runs = ceil_div(positions, run);
    rows = Buffer<A>((last_image - first_image) * plane);
    each((last_image - first_image) * runs, [&](int64_t item) {
      const int64_t image = item / runs, begin = item % runs * run;
      pack(input, first_image + image, channel, width, problem.fields(), begin, std::min(begin + run, positions),
           rows.get() + image * plane);
    });
  }
  std::vector<int64_t> image_of;
  for (int64_t image = first_image; image < last_image; ++image)
    image_of.insert(image_of.end(), problem.first_of[image + 1] - problem.first_of[image], image);
  const auto make = [&] {
    PoolScratch<A, N, Index> scratch{RoiPoints<A, N, Index>(bins),
                                     Buffer<A>(run_points / part_points * width),
                                     Buffer<A>(width),
                                     Buffer<A>(bins * width),
                                     Buffer<A>(bins * width),
                                     {}};
    if (sparse) scratch.corners.emplace(run_points << N, width);
    return scratch;
  };
  each(image_of.size(), make, [&](PoolScratch<A, N, Index>& scratch, int64_t item) {
    const Roi<A, N>& roi = problem.rois[first + item];
    Held<A> held{input, image_of[item], channel, width, rows.get() + (image_of[item] - first_image) * plane};
    if (sparse) held.corners = &*scratch.corners, held.rows = scratch.corners->rows();
    scratch.pool(problem, roi, held);
    transpose<A>(scratch.sums.get(), bins, width, width, scratch.turned.get(), bins);
    output.write((roi.index * problem.channels + channel) * bins, scratch.turned.get(), width * bins);
  });
}

// The requested gradients; absent ones are not requested.
struct RoiGradients {
  std::optional<Sink> input, offset;
};

// Some channels of an image that an item of work owns.
struct Slice {
  int64_t image, channel, width;
  bool sparse;
};

// The channels of a slice: some for each thread, even if there are few; no more than a thread can hold.
template <typename A, int N>
std::vector<Slice> slices_of(const Pooling<A, N>& problem) {
  std::vector<Slice> slices;
  for (int64_t image = 0; image < problem.batch; ++image) {
    const bool sparse = problem.is_sparse(image);
    const int64_t rows = sparse ? problem.corners_of(image) : problem.positions();
    int64_t width = slice_channels;
    while (width > 8 && problem.channels < 2 * width) width /= 2;
    while (width > 1 && width * (rows + 1) * static_cast<int64_t>(sizeof(A)) > plane_bytes) width /= 2;
    for (int64_t c = 0; c < problem.channels; c += width)
      slices.push_back({image, c, std::min(width, problem.channels - c), sparse});
  }
  return slices;
}

// The backward pass. An item is a slice.
template <typename A, int N, typename Index>
class Backward {
 public:
  Backward(const Pooling<A, N>& problem, const Map& input, const Tensor& grad_output, const std::vector<Slice>& slices,
           const RoiGradients& gradients)
      : problem_(problem),
        input_(input),
        grad_output_(grad_output),
        slices_(slices),
        gradients_(gradients),
        turns_(slices.size()) {
    for (const Slice& slice : slices) {
      int64_t& rows = slice.sparse ? touched_ : rows_;
      rows = std::max(rows, (slice.sparse ? problem.corners_of(slice.image) : problem.positions()) * slice.width);
      width_ = std::max(width_, slice.width);
    }
  }

  void run() {
    each(
        slices_.size(), [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t item) {
          const Slice& slice = slices_[item];
          // Whatever its width, a slice has as many corners as there are rows for.
          if (slice.sparse) scratch.corners.emplace(problem_.corners_of(slice.image), slice.width);
          Held<A> held{input_, slice.image, slice.channel, slice.width,
                       gradients_.offset ? scratch.rows.get() : nullptr};
          if (slice.sparse) held.corners = &*scratch.corners;
          Walk<A, N, LaidOut> walk = open(scratch, held);
          for (int64_t r = problem_.first_of[slice.image]; r < problem_.first_of[slice.image + 1]; ++r) {
            by_roi(scratch, held, walk, problem_.rois[r]);
            if (gradients_.offset) add_by_offset(scratch, item, r);
          }
          if (gradients_.input) write_by_input(scratch, held);
        },
        &turns_);
  }

 private:
  struct Scratch {
    RoiPoints<A, N, Index> points;
    Buffer<A> rows, grad_rows, grads, turned, slopes, by_bin;
    std::optional<Touched<A>> corners;

    explicit Scratch(const Backward& work)
        : points(work.problem_.bins),
          rows(std::max(work.rows_, work.touched_) + work.width_),
          grad_rows(work.rows_ + work.width_),
          grads(work.problem_.bins * work.width_),
          turned(work.problem_.bins * work.width_),
          slopes(N * run_points),
          by_bin(N * work.problem_.bins) {}
  };

  // The storage of the channels of a slice and of their gradient.
  Walk<A, N, LaidOut> open(Scratch& scratch, const Held<A>& held) const {
    const int64_t elements = (problem_.positions() + 1) * held.width;
    Walk<A, N, LaidOut> walk{};
    walk.channels = walk.pitch = held.width;
    walk.field.first = scratch.rows.get();
    for (int axis = 0; axis < N && gradients_.offset; ++axis)
      walk.grad_shift[axis] = scratch.slopes.get() + axis * run_points;
    if (held.corners) {
      std::fill_n(scratch.rows.get(), held.width, A(0));
      if (gradients_.input) walk.grad_field.first = held.corners->rows();
      return walk;
    }
    if (gradients_.offset && problem_.first_of[held.image] < problem_.first_of[held.image + 1])
      pack(input_, held.image, held.channel, held.width, problem_.fields(), 0, problem_.positions(),
           scratch.rows.get());
    if (gradients_.input) {
      std::fill_n(scratch.grad_rows.get(), elements, A(0));
      walk.grad_field.first = scratch.grad_rows.get();
    }
    return walk;
  }

  // The gradients of one RoI: by the slice, in its rows; by the offset, in scratch.by_bin.
  void by_roi(Scratch& scratch, const Held<A>& held, Walk<A, N, LaidOut>& walk_on, const Roi<A, N>& roi) const {
    const int64_t bins = problem_.bins, width = held.width;
    A* const by_bin = scratch.by_bin.get();
    read_rows(grad_output_, (roi.index * problem_.channels + held.channel) * bins, 0, 1, width * bins,
              scratch.turned.get(), width * bins);
    transpose<A>(scratch.turned.get(), width, bins, bins, scratch.grads.get(), width);
    std::fill_n(by_bin, N * bins, A(0));
    scratch.points.start(problem_, roi);
    const auto outside = static_cast<Index>(held.outside(problem_.positions()));
    scratch.points.for_runs(problem_, roi, held.pitch(), outside, [&](int64_t bin, int64_t some, int64_t each, bool) {
      held.find(scratch.points.cells, some * each);
      walk_on.per = each;
      walk_on.grad_columns = scratch.grads.get() + bin * width;
      walk(scratch.points.cells, some * each, scratch.points.factors.get(), walk_on);
      for (int axis = 0; axis < N && gradients_.offset; ++axis)
        for (int64_t i = 0; i < some * each; ++i) by_bin[axis * bins + bin + i / each] += walk_on.grad_shift[axis][i];
    });
    for (int axis = 0; axis < N; ++axis)
      for (int64_t bin = 0; bin < bins; ++bin) by_bin[axis * bins + bin] *= problem_.gamma * roi.length[axis];
  }

  // The slices of an image are added up one after the other.
  void add_by_offset(Scratch& scratch, int64_t item, int64_t r) {
    const Slice& slice = slices_[item];
    const int64_t step = r - problem_.first_of[slice.image], index = problem_.rois[r].index;
    if (slice.channel > 0) turns_.wait(item, step);
    for (int axis = 0; axis < N; ++axis)
      gradients_.offset->write((index * N + N - 1 - axis) * problem_.bins, scratch.by_bin.get() + axis * problem_.bins,
                               problem_.bins, slice.channel > 0);
    turns_.finish(item, step);
  }

  void write_by_input(Scratch& scratch, const Held<A>& held) const {
    const int64_t positions = problem_.positions();
    const int64_t place = (held.image * problem_.channels + held.channel) * positions;
    if (!held.corners)
      return unpack(scratch.grad_rows.get(), held.width, problem_.fields(), *gradients_.input, place, false);
    dispatch_dtype(gradients_.input->dtype(), [&]<typename T>() {
      T* const to = gradients_.input->template data<T>() + place;
      std::fill_n(to, held.width * positions, T(0));
      for (int64_t row = 1; row <= held.corners->count(); ++row)
        for (int64_t c = 0; c < held.width; ++c)
          to[c * positions + held.corners->position(row)] = store<T>(held.corners->rows()[row * held.width + c]);
    });
  }

  const Pooling<A, N>& problem_;
  const Map& input_;
  const Tensor& grad_output_;
  const std::vector<Slice>& slices_;
  const RoiGradients& gradients_;
  Turns turns_;
  int64_t rows_ = 0, touched_ = 0, width_ = 1;
};

// Calls forward() for images that have RoIs: as many as may be laid out together, or as many channels of one.
template <typename A, int N, typename Index>
void forward(const Pooling<A, N>& problem, const Map& input, const Sink& output) {
  const int64_t elements = (problem.positions() + 1) * static_cast<int64_t>(sizeof(A));
  const int64_t together = field_bytes / std::max<int64_t>(elements * problem.channels, 1);
  const auto has_rois = [&](int64_t image) { return problem.first_of[image + 1] > problem.first_of[image]; };
  for (int64_t first = 0, last; first < problem.batch; first = last) {
    last = first + 1;
    if (!has_rois(first)) continue;
    const bool sparse = problem.is_sparse(first);
    while (!sparse && last < problem.batch && last - first < together && has_rois(last) && !problem.is_sparse(last))
      ++last;
    int64_t width = problem.channels;
    if (!sparse && together == 0) width = std::clamp<int64_t>(field_bytes / elements, 1, width);
    if (sparse) width = std::clamp<int64_t>(plane_bytes / ((run_points << N) * sizeof(A)), 1, width);
    for (int64_t c = 0; c < problem.channels; c += width)
      forward<A, N, Index>(problem, input, first, last, c, std::min(width, problem.channels - c), sparse, output);
  }
}

}  // namespace

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                       const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
                       double gamma, const std::vector<int64_t>& group_size) {
  check_tensor("input", input);
  check_tensor("rois", rois);
  check_tensor("offset", offset);
  Tensor output;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Pooling<A, N> problem(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, group_size);
    const Work work(problem.work());
    std::vector<int64_t> shape{static_cast<int64_t>(problem.rois.size()), problem.channels};
    shape.insert(shape.end(), output_size.begin(), output_size.end());
    output = new_result(input, shape);
    const Map map = problem.map(input);
    problem.is_wide() ? forward<A, N, int64_t>(problem, map, Sink(output))
                      : forward<A, N, int32_t>(problem, map, Sink(output));
  });
  return output;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                                    const std::optional<Tensor>& offset,
                                                    const std::vector<int64_t>& output_size, double spatial_scale,
                                                    int64_t sampling_ratio, double gamma,
                                                    const std::vector<int64_t>& group_size,
                                                    const std::vector<bool>& output_mask) {
  check_tensor("grad_output", grad_output);
  check_tensor("input", input);
  check_tensor("rois", rois);
  check_tensor("offset", offset);
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must have 2 values");
  Tensor grad_input, grad_offset;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Pooling<A, N> problem(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, group_size);
    std::vector<int64_t> shape{static_cast<int64_t>(problem.rois.size()), problem.channels};
    shape.insert(shape.end(), output_size.begin(), output_size.end());
    STD_TORCH_CHECK(sizes_of(grad_output) == shape && grad_output.scalar_type() == input.scalar_type(),
                    "grad_output must have the output's shape and input's dtype");
    const Work work(backward_work(problem.work(), input));
    const bool by_input = output_mask[0], by_offset = output_mask[1] && offset;
    const std::vector<Slice> slices = slices_of(problem);
    grad_input = empty_like(input, by_input);
    grad_offset = empty_like(offset ? *offset : input, by_offset);
    const ScalarType sums = sum_dtype(input.scalar_type()), offset_dtype = grad_offset.scalar_type();
    // A sum of several slices is not rounded to half precision in between.
    if (by_offset && offset_dtype != sums) grad_offset = new_scratch(offset->sizes(), sums);
    if (by_offset && problem.channels == 0) set_to_zero(grad_offset);
    RoiGradients gradients;
    if (by_input) gradients.input.emplace(grad_input);
    if (by_offset) gradients.offset.emplace(grad_offset);
    const Tensor grad = contiguous(grad_output);
    const Map map = problem.map(input);
    if (by_input || by_offset)
      problem.is_wide() ? Backward<A, N, int64_t>(problem, map, grad, slices, gradients).run()
                        : Backward<A, N, int32_t>(problem, map, grad, slices, gradients).run();
    grad_offset = rounded(grad_offset, offset_dtype);
  });
  return {grad_input, grad_offset};
}
}  // namespace deformkit
