// The CPU kernels of deformable aggregation. The formula is in op.py, the sampling in sample/heads.h.
#include "cpu/operators.h"
#include "sample/heads.h"

namespace deformkit {
namespace {

template <int N>
Heads<N> make_heads(const Tensor& value, const Tensor& offset, const Tensor& weight,
                    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, double offset_scale,
                    bool remove_center, int64_t boundary) {
  STD_TORCH_CHECK(value.dim() == N + 3 && offset.dim() == N + 4 && weight.dim() == N + 3,
                  "value, offset and weight must have ", N + 3, ", ", N + 4, " and ", N + 3, " axes");
  STD_TORCH_CHECK(kernel_size.size() == N && stride.size() == N && padding.size() == N && dilation.size() == N,
                  "kernel_size, stride, padding and dilation must have ", N, " values");
  STD_TORCH_CHECK(std::isfinite(offset_scale), "offset_scale must be finite");
  Heads<N> call(value, offset, weight);
  call.boundary = boundary_of(boundary);
  call.nearest = call.x_first = false;
  Level<N> level{{}, 0, 0, call.points};
  Axes<N> centre;
  int64_t taps = 1;
  for (int axis = 0; axis < N; ++axis) {
    const int64_t k = kernel_size[axis], d = dilation[axis], s = value.size(axis + 1);
    STD_TORCH_CHECK(k <= call.points + 1, "offset's taps do not fit kernel_size");
    check_window(s, k, stride[axis], padding[axis], d, offset.size(axis + 1));
    STD_TORCH_CHECK(!remove_center || k % 2 == 1, "remove_center needs a kernel_size that is odd along every axis");
    level.size[axis] = s;
    centre[axis] = d * (k - 1) / 2;
    call.out_size[axis] = offset.size(axis + 1), call.stride[axis] = stride[axis];
    call.padding[axis] = padding[axis] - centre[axis];
    taps *= k;
  }
  STD_TORCH_CHECK(call.points == taps - remove_center, "offset's taps do not fit kernel_size");
  for (int64_t t = 0; t < taps; ++t) {
    if (remove_center && t == taps / 2) continue;
    Affine<N> affine;
    int64_t rest = t;
    for (int axis = N; axis-- > 0;) {
      affine.scale[axis] = offset_scale;
      affine.bias[axis] = offset_scale * static_cast<double>(rest % kernel_size[axis] * dilation[axis] - centre[axis]);
      rest /= kernel_size[axis];
    }
    call.affine.push_back(affine);
  }
  call.levels.push_back(level);
  call.output_shape = {call.batch};
  call.output_shape.insert(call.output_shape.end(), call.out_size.begin(), call.out_size.end());
  call.output_shape.insert(call.output_shape.end(), {call.heads, call.channels});
  return call;
}

}  // namespace

Tensor deform_aggregate(const Tensor& value, const Tensor& offset, const Tensor& weight,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, double offset_scale,
                        bool remove_center, int64_t boundary) {
  check_tensor("value", value);
  check_tensor("offset", offset);
  check_tensor("weight", weight);
  Tensor output;
  dispatch_axes(value.dim() - 3, [&]<int N>() {
    const Heads<N> call = make_heads<N>(value, offset, weight, kernel_size, stride, padding, dilation, offset_scale,
                                        remove_center, boundary);
    output = attend(call, value);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deform_aggregate_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, double offset_scale, bool remove_center, int64_t boundary,
    const std::vector<bool>& output_mask) {
  check_tensor("grad_output", grad_output);
  check_tensor("value", value);
  check_tensor("offset", offset);
  check_tensor("weight", weight);
  std::tuple<Tensor, Tensor, Tensor> results;
  dispatch_axes(value.dim() - 3, [&]<int N>() {
    const Heads<N> call = make_heads<N>(value, offset, weight, kernel_size, stride, padding, dilation, offset_scale,
                                        remove_center, boundary);
    results = attend_backward(call, grad_output, value, offset, weight, output_mask);
  });
  return results;
}
}  // namespace deformkit
