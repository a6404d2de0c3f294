// Deformable sampling on the CPU: checks the call, and chooses how its field is held.
#include "cpu/operators.h"
#include "deform_sample/cpu_forward.h"
#include "deform_sample/cpu_sweep.h"

namespace deformkit {

using namespace sampling;

namespace {

template <int N>
void check_grad_output(const Problem<N>& problem, const Tensor& grad_output, const Tensor& input) {
  STD_TORCH_CHECK(sizes_of(grad_output) == problem.output_sizes && grad_output.scalar_type() == input.scalar_type(),
                  "grad_output must have the output's shape and input's dtype");
}

}  // namespace

Tensor deform_sample(const Tensor& input, const Tensor& points, int64_t boundary, int64_t mode) {
  check_tensor("input", input);
  check_tensor("points", points);
  Tensor output;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Problem<N> problem(input, points, boundary, mode);
    const Work work(problem.work());
    output = new_result(input, problem.output_sizes);
    if (output.numel() == 0) return;
    const Map field(input);
    if (problem.is_laid_out(field, sizeof(A))) return forward_laid_out<A>(problem, field, Sink(output));
    problem.is_wide(std::max<int64_t>(field.position_stride, 1))
        ? ForwardInPlace<A, N, int64_t>(problem, field, Sink(output)).run()
        : ForwardInPlace<A, N, int32_t>(problem, field, Sink(output)).run();
  });
  return output;
}

std::tuple<Tensor, Tensor> deform_sample_backward(const Tensor& grad_output, const Tensor& input, const Tensor& points,
                                                  int64_t boundary, int64_t mode,
                                                  const std::vector<bool>& output_mask) {
  check_tensor("grad_output", grad_output);
  check_tensor("input", input);
  check_tensor("points", points);
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must have 2 values");
  Tensor grad_input, grad_points;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Problem<N> problem(input, points, boundary, mode);
    check_grad_output(problem, grad_output, input);
    const Work work(backward_work(problem.work(), input));
    grad_input = empty_like(input, output_mask[0]), grad_points = empty_like(points, output_mask[1]);
    std::optional<Sink> by_input, by_points;
    if (output_mask[0]) by_input.emplace(grad_input);
    if (output_mask[1]) by_points.emplace(grad_points);
    backward<A>(problem, input, contiguous(grad_output), by_input, by_points);
  });
  return {grad_input, grad_points};
}

std::tuple<Tensor, Tensor> deform_sample_and_backward(const Tensor& grad_output, const Tensor& input,
                                                      const Tensor& points, int64_t boundary) {
  std::optional<std::tuple<Tensor, Tensor>> result;
  dispatch_sums(input.scalar_type(), input.dim() - 2, [&]<typename A, int N>() {
    const Problem<N> problem(input, points, boundary, 0);
    check_grad_output(problem, grad_output, input);
    const Work work(2 * problem.work());
    const Map field(input);
    if (problem.batch == 0 || problem.points == 0 || !problem.is_laid_out(field, sizeof(A))) return;
    result.emplace(new_result(input, sizes_of(grad_output)), empty_like(points, true));
    const Sink samples(std::get<0>(*result)), grad_points(std::get<1>(*result));
    points_laid_out<A>(problem, field, contiguous(grad_output), &samples, grad_points);
  });
  if (result) return *result;
  return {deform_sample(input, points, boundary, 0),
          std::get<1>(deform_sample_backward(grad_output, input, points, boundary, 0, {false, true}))};
}

}  // namespace deformkit
