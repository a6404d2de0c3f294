// The adjoints on the CPU: the kernels of their partners, as ops/_adjoint.py explains.
#include <algorithm>

#include "cpu/operators.h"
#include "cpu/tensor.h"

namespace deformkit {
namespace {

// Stands for the x of a partner F that is linear in x: has its shape, and one element of memory, which nothing reads.
Tensor unread(const Tensor& like, const Sizes& sizes) {
  const Tensor element = new_scratch(Sizes{1}, like.scalar_type());
  return {element.data_ptr(), like.scalar_type(), sizes, Sizes(sizes.size(), 0), element.storage(), element.owner()};
}

// Raises unless the gradient of an output of these sizes has them, and the dtype of the input.
void check_gradient(const Tensor& grad_output, const Tensor& input, const Sizes& sizes) {
  STD_TORCH_CHECK(sizes_of(grad_output) == sizes && grad_output.scalar_type() == input.scalar_type(),
                  "grad_output must have the output's shape and input's dtype");
}

void check_mask(const Asked& output_mask, size_t count) {
  STD_TORCH_CHECK(output_mask.size() == count, "output_mask must have ", count, " values");
}

Tensor none_of(const Tensor& like) {
  return empty_like(like, false);
}

// Splatting, the adjoint of sampling.

Sizes splat_size(const Tensor& input, const Tensor& points, const Sizes& size) {
  check_tensor("input", input);
  check_tensor("points", points);
  STD_TORCH_CHECK(input.dim() >= 3 && points.dim() == input.dim() + 1,
                  "input must be [B, C, *in] and points [B, G, *in, N], with at least one axis in");
  STD_TORCH_CHECK(static_cast<int64_t>(size.size()) == points.size(points.dim() - 1) && !size.empty() &&
                      *std::min_element(size.begin(), size.end()) > 0 &&
                      *std::max_element(size.begin(), size.end()) <= farthest,
                  "size must have a number from 1 to 2^40 for each coordinate of points");
  Sizes result{input.size(0), input.size(1)};
  result.insert(result.end(), size.begin(), size.end());
  return result;
}

}  // namespace

Tensor deform_splat(const Tensor& input, const Tensor& points, const Sizes& size, int64_t boundary) {
  const Tensor field = unread(input, splat_size(input, points, size));
  return std::get<0>(deform_sample_backward(input, field, points, boundary, 0, {true, false}));
}

std::tuple<Tensor, Tensor> deform_splat_backward(const Tensor& grad_output, const Tensor& input, const Tensor& points,
                                                 const Sizes& size, int64_t boundary, const Asked& output_mask) {
  check_tensor("grad_output", grad_output);
  check_gradient(grad_output, input, splat_size(input, points, size));
  check_mask(output_mask, 2);
  if (output_mask[0] && output_mask[1]) return deform_sample_and_backward(input, grad_output, points, boundary);
  Tensor grad_input = none_of(input), grad_points = none_of(points);
  if (output_mask[0]) grad_input = deform_sample(grad_output, points, boundary, 0);
  if (output_mask[1])
    grad_points = std::get<1>(deform_sample_backward(input, grad_output, points, boundary, 0, {false, true}));
  return {grad_input, grad_points};
}

// The correlation, the adjoint of attention by its weights.

namespace {

Sizes correlated_size(const Tensor& query, const Tensor& sampling_locations) {
  check_tensor("query", query);
  check_tensor("sampling_locations", sampling_locations);
  STD_TORCH_CHECK(sampling_locations.dim() == 5, "sampling_locations must have 5 axes");
  Sizes result = sizes_of(sampling_locations);
  result.pop_back();
  return result;
}

}  // namespace

Tensor deform_correlate(const Tensor& query, const Tensor& key, const Sizes& spatial_shapes,
                        const Tensor& sampling_locations, const Sizes& num_points, int64_t mode) {
  check_tensor("key", key);
  const Tensor weights = unread(query, correlated_size(query, sampling_locations));
  return std::get<2>(ms_deform_attn_backward(query, key, spatial_shapes, sampling_locations, weights, num_points, mode,
                                             {false, false, true}));
}

std::tuple<Tensor, Tensor, Tensor> deform_correlate_backward(const Tensor& grad_output, const Tensor& query,
                                                             const Tensor& key, const Sizes& spatial_shapes,
                                                             const Tensor& sampling_locations, const Sizes& num_points,
                                                             int64_t mode, const Asked& output_mask) {
  check_tensor("grad_output", grad_output);
  check_tensor("key", key);
  check_gradient(grad_output, query, correlated_size(query, sampling_locations));
  check_mask(output_mask, 3);
  Tensor grad_query = none_of(query), grad_key = none_of(key), grad_locations = none_of(sampling_locations);
  const Asked others{output_mask[1], output_mask[2], false};
  const bool any = output_mask[1] || output_mask[2];
  if (output_mask[0] && any)
    std::tie(grad_query, grad_key, grad_locations, std::ignore) = ms_deform_attn_and_backward(
        query, key, spatial_shapes, sampling_locations, grad_output, num_points, mode, others);
  else if (output_mask[0])
    grad_query = ms_deform_attn(key, spatial_shapes, sampling_locations, grad_output, num_points, mode);
  else if (any)
    std::tie(grad_key, grad_locations, std::ignore) =
        ms_deform_attn_backward(query, key, spatial_shapes, sampling_locations, grad_output, num_points, mode, others);
  return {grad_query, grad_key, grad_locations};
}

// The transposed convolution, the adjoint of the convolution.

namespace {

Sizes transposed_size(const Tensor& input, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                      const Sizes& output_padding, int64_t groups, const Sizes& dilation) {
  check_tensor("input", input);
  check_tensor("weight", weight);
  const auto axes = static_cast<size_t>(std::max<int64_t>(input.dim() - 2, 0));
  STD_TORCH_CHECK(axes >= 1 && axes <= 3 && weight.dim() == input.dim(),
                  "input and weight must have 3, 4 or 5 axes, and as many as each other");
  for (const Sizes* window : {&stride, &padding, &output_padding, &dilation})
    STD_TORCH_CHECK(window->size() == axes,
                    "stride, padding, output_padding and dilation must have a number for each spatial axis");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "groups must divide weight's input channels");
  Sizes result{input.size(0), groups * weight.size(1)};
  for (size_t axis = 0; axis < axes; ++axis) {
    const int64_t size = input.sizes()[axis + 2], kernel = weight.sizes()[axis + 2];
    const int64_t step = stride[axis], distance = dilation[axis], edge = padding[axis], extra = output_padding[axis];
    STD_TORCH_CHECK(size > 0 && kernel > 0 && step > 0 && distance > 0 && edge >= 0 && extra >= 0,
                    "sizes, stride and dilation must be positive, padding and output_padding not negative");
    STD_TORCH_CHECK(extra < step, "output_padding is ", extra, "; each value must be less than stride ", step);
    STD_TORCH_CHECK(size <= farthest && step <= farthest / size && edge <= farthest && distance <= farthest / kernel,
                    "size * stride, padding and dilation * kernel_size must be at most 2^40");
    result.push_back((size - 1) * step - 2 * edge + distance * (kernel - 1) + extra + 1);
    STD_TORCH_CHECK(result.back() > 0, "the output must have at least one element on every axis");
  }
  return result;
}

}  // namespace

Tensor deform_conv_transpose(const Tensor& input, const Tensor& offset, const Tensor& weight, const Sizes& stride,
                             const Sizes& padding, const Sizes& output_padding, int64_t groups, const Sizes& dilation,
                             const Maybe& mask, int64_t boundary) {
  const Sizes sizes = transposed_size(input, weight, stride, padding, output_padding, groups, dilation);
  return std::get<0>(conv::deform_conv_backward(input, unread(input, sizes), offset, weight, std::nullopt, stride,
                                                padding, dilation, mask, boundary, {true, false, false, false, false}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_transpose_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight, const Sizes& stride,
    const Sizes& padding, const Sizes& output_padding, int64_t groups, const Sizes& dilation, const Maybe& mask,
    int64_t boundary, const Asked& output_mask) {
  check_tensor("grad_output", grad_output);
  check_gradient(grad_output, input, transposed_size(input, weight, stride, padding, output_padding, groups, dilation));
  check_mask(output_mask, 4);
  Tensor grad_input = none_of(input), grad_offset = none_of(offset), grad_weight = none_of(weight);
  Tensor grad_mask = none_of(input);
  const Asked others{false, output_mask[1], output_mask[2], false, output_mask[3]};
  const bool any = output_mask[1] || output_mask[2] || output_mask[3];
  if (output_mask[0] && any)
    std::tie(grad_input, std::ignore, grad_offset, grad_weight, std::ignore, grad_mask) =
        conv::deform_conv_and_backward(input, grad_output, offset, weight, stride, padding, dilation, mask, boundary,
                                       others);
  else if (output_mask[0])
    grad_input =
        conv::deform_conv(grad_output, offset, weight, std::nullopt, stride, padding, dilation, mask, boundary);
  else if (any)
    std::tie(std::ignore, grad_offset, grad_weight, std::ignore, grad_mask) = conv::deform_conv_backward(
        input, grad_output, offset, weight, std::nullopt, stride, padding, dilation, mask, boundary, others);
  return {grad_input, grad_offset, grad_weight, grad_mask};
}
}  // namespace deformkit
