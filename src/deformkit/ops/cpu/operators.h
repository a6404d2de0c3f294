// The operators, as the kernels define them: in cpu.cpp of the folder of each name, those of adjoints in adjoints.cpp.
#pragma once

#include <tuple>

#include "cpu/host.h"

namespace deformkit {

using Asked = std::vector<bool>;
using Maybe = std::optional<Tensor>;

Tensor deform_aggregate(const Tensor& value, const Tensor& offset, const Tensor& weight, const Sizes& kernel_size,
                        const Sizes& stride, const Sizes& padding, const Sizes& dilation, double offset_scale,
                        bool remove_center, int64_t boundary);
std::tuple<Tensor, Tensor, Tensor> deform_aggregate_backward(const Tensor& grad_output, const Tensor& value,
                                                             const Tensor& offset, const Tensor& weight,
                                                             const Sizes& kernel_size, const Sizes& stride,
                                                             const Sizes& padding, const Sizes& dilation,
                                                             double offset_scale, bool remove_center, int64_t boundary,
                                                             const Asked& output_mask);

namespace conv {
Tensor deform_conv(const Tensor& input, const Tensor& offset, const Tensor& weight, const Maybe& bias,
                   const Sizes& stride, const Sizes& padding, const Sizes& dilation, const Maybe& mask,
                   int64_t boundary);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_backward(const Tensor& grad_output, const Tensor& input,
                                                                        const Tensor& offset, const Tensor& weight,
                                                                        const Maybe& bias, const Sizes& stride,
                                                                        const Sizes& padding, const Sizes& dilation,
                                                                        const Maybe& mask, int64_t boundary,
                                                                        const Asked& output_mask);
// What deform_conv() returns without a bias, and the gradients after it: from one walk, where that is quicker.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_and_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight, const Sizes& stride,
    const Sizes& padding, const Sizes& dilation, const Maybe& mask, int64_t boundary, const Asked& output_mask);
}  // namespace conv
using conv::deform_conv;
using conv::deform_conv_backward;

Tensor deform_conv_transpose(const Tensor& input, const Tensor& offset, const Tensor& weight, const Sizes& stride,
                             const Sizes& padding, const Sizes& output_padding, int64_t groups, const Sizes& dilation,
                             const Maybe& mask, int64_t boundary);
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_transpose_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight, const Sizes& stride,
    const Sizes& padding, const Sizes& output_padding, int64_t groups, const Sizes& dilation, const Maybe& mask,
    int64_t boundary, const Asked& output_mask);

Tensor deform_correlate(const Tensor& query, const Tensor& key, const Sizes& spatial_shapes,
                        const Tensor& sampling_locations, const Sizes& num_points, int64_t mode);
std::tuple<Tensor, Tensor, Tensor> deform_correlate_backward(const Tensor& grad_output, const Tensor& query,
                                                             const Tensor& key, const Sizes& spatial_shapes,
                                                             const Tensor& sampling_locations, const Sizes& num_points,
                                                             int64_t mode, const Asked& output_mask);

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const Maybe& offset, const Sizes& output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, const Sizes& group_size);
std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                                    const Maybe& offset, const Sizes& output_size, double spatial_scale,
                                                    int64_t sampling_ratio, double gamma, const Sizes& group_size,
                                                    const Asked& output_mask);

Tensor deform_sample(const Tensor& input, const Tensor& points, int64_t boundary, int64_t mode);
std::tuple<Tensor, Tensor> deform_sample_backward(const Tensor& grad_output, const Tensor& input, const Tensor& points,
                                                  int64_t boundary, int64_t mode, const Asked& output_mask);
// What deform_sample() returns, and the gradient by the points after it: from one walk, where the field is laid out.
std::tuple<Tensor, Tensor> deform_sample_and_backward(const Tensor& grad_output, const Tensor& input,
                                                      const Tensor& points, int64_t boundary);

Tensor deform_splat(const Tensor& input, const Tensor& points, const Sizes& size, int64_t boundary);
std::tuple<Tensor, Tensor> deform_splat_backward(const Tensor& grad_output, const Tensor& input, const Tensor& points,
                                                 const Sizes& size, int64_t boundary, const Asked& output_mask);

Tensor ms_deform_attn(const Tensor& value, const Sizes& spatial_shapes, const Tensor& sampling_locations,
                      const Tensor& attention_weights, const Sizes& num_points, int64_t mode);
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           const Sizes& spatial_shapes,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, const Sizes& num_points,
                                                           int64_t mode, const Asked& output_mask);
// What ms_deform_attn() returns, and the gradients after it: from one walk, where a head's field is laid out as a
// whole.
std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_and_backward(
    const Tensor& grad_output, const Tensor& value, const Sizes& spatial_shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights, const Sizes& num_points, int64_t mode, const Asked& output_mask);

}  // namespace deformkit
