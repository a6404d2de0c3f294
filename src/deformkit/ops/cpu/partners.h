// The kernels that adjoints call. Each is defined in cpu.cpp of the operator of its name.
#pragma once

#include <tuple>

#include "cpu/tensor.h"

namespace deformkit {

using Sizes = std::vector<int64_t>;
using Asked = std::vector<bool>;
using Maybe = std::optional<Tensor>;

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
}  // namespace conv

Tensor deform_sample(const Tensor& input, const Tensor& points, int64_t boundary, int64_t mode);
std::tuple<Tensor, Tensor> deform_sample_backward(const Tensor& grad_output, const Tensor& input, const Tensor& points,
                                                  int64_t boundary, int64_t mode, const Asked& output_mask);

Tensor ms_deform_attn(const Tensor& value, const Sizes& spatial_shapes, const Tensor& sampling_locations,
                      const Tensor& attention_weights, const Sizes& num_points, int64_t mode);
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           const Sizes& spatial_shapes,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights, const Sizes& num_points,
                                                           int64_t mode, const Asked& output_mask);

}  // namespace deformkit
