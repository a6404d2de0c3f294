// The CPU kernels of multi-scale deformable attention. The formula is in op.py, the sampling in sample/heads.h.
#include "cpu/operators.h"
#include "sample/heads.h"

namespace deformkit {
namespace {

template <int N>
Heads<N> make_heads(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& sampling_locations,
                    const Tensor& attention_weights, const std::vector<int64_t>& num_points, int64_t mode) {
  STD_TORCH_CHECK(value.dim() == 4 && sampling_locations.dim() == 5 && attention_weights.dim() == 4,
                  "value, sampling_locations and attention_weights must have 4, 5 and 4 axes");
  STD_TORCH_CHECK(mode == 0 || mode == 1, "mode must be 0 (linear) or 1 (nearest)");
  STD_TORCH_CHECK(spatial_shapes.size() == num_points.size() * N, "spatial_shapes and num_points do not fit");
  const auto locations = sampling_locations.scalar_type();
  STD_TORCH_CHECK(locations == ScalarType::Float || locations == ScalarType::Double,
                  "sampling_locations must be float32 or float64");
  Heads<N> call(value, sampling_locations, attention_weights);
  call.out_size.fill(1), call.stride.fill(0), call.padding.fill(0);
  call.out_size[0] = call.queries;
  call.nearest = mode == 1;
  call.boundary = call.nearest ? Boundary::border : Boundary::zeros;
  call.x_first = true;
  call.output_shape = {call.batch, call.queries, call.heads * call.channels};
  int64_t start = 0, point = 0;
  for (size_t l = 0; l < num_points.size(); ++l) {
    Level<N> level{{}, start, point, num_points[l]};
    Affine<N> affine;
    int64_t room = call.positions - start;
    for (int axis = 0; axis < N; ++axis) {
      level.size[axis] = spatial_shapes[l * N + axis];
      room /= std::max<int64_t>(level.size[axis], 1);
      STD_TORCH_CHECK(level.size[axis] > 0 && room > 0,
                      "spatial_shapes must be positive and add up to value's positions");
      affine.scale[axis] = static_cast<double>(level.size[axis]);
      affine.bias[axis] = call.nearest ? 0 : -0.5;
    }
    STD_TORCH_CHECK(level.points >= 0 && level.points <= call.points - point, "num_points do not fit the points");
    call.affine.insert(call.affine.end(), level.points, affine);
    call.levels.push_back(level);
    start += level.positions();
    point += level.points;
  }
  STD_TORCH_CHECK(start == call.positions, "spatial_shapes do not add up to value's positions");
  STD_TORCH_CHECK(point == call.points, "num_points do not add up to the number of points");
  return call;
}

// The output, if it is not null, gets what ms_deform_attn() returns.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            const std::vector<int64_t>& spatial_shapes,
                                            const Tensor& sampling_locations, const Tensor& attention_weights,
                                            const std::vector<int64_t>& num_points, int64_t mode,
                                            const std::vector<bool>& output_mask, Tensor* output) {
  check_tensor("grad_output", grad_output);
  check_tensor("value", value);
  check_tensor("sampling_locations", sampling_locations);
  check_tensor("attention_weights", attention_weights);
  std::tuple<Tensor, Tensor, Tensor> results;
  dispatch_axes(sampling_locations.dim() == 5 ? sampling_locations.size(4) : 0, [&]<int N>() {
    const Heads<N> call = make_heads<N>(value, spatial_shapes, sampling_locations, attention_weights, num_points, mode);
    results = attend_backward(call, grad_output, value, sampling_locations, attention_weights, output_mask, output);
  });
  return results;
}

}  // namespace

Tensor ms_deform_attn(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& sampling_locations,
                      const Tensor& attention_weights, const std::vector<int64_t>& num_points, int64_t mode) {
  check_tensor("value", value);
  check_tensor("sampling_locations", sampling_locations);
  check_tensor("attention_weights", attention_weights);
  Tensor output;
  dispatch_axes(sampling_locations.dim() == 5 ? sampling_locations.size(4) : 0, [&]<int N>() {
    const Heads<N> call = make_heads<N>(value, spatial_shapes, sampling_locations, attention_weights, num_points, mode);
    output = attend(call, value);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           const std::vector<int64_t>& spatial_shapes,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights,
                                                           const std::vector<int64_t>& num_points, int64_t mode,
                                                           const std::vector<bool>& output_mask) {
  return backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights, num_points, mode,
                  output_mask, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_and_backward(
    const Tensor& grad_output, const Tensor& value, const std::vector<int64_t>& spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights, const std::vector<int64_t>& num_points,
    int64_t mode, const std::vector<bool>& output_mask) {
  Tensor output;
  const auto gradients = backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights, num_points,
                                  mode, output_mask, &output);
  return std::tuple_cat(std::tuple(output), gradients);
}
}  // namespace deformkit
