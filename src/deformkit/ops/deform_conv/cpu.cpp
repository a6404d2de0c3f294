// The CPU kernels of deformable convolution: the choice of the kernel and the registration. The formula is in op.py,
// the sampler in sample/.
#include <tuple>

#include "cpu/operators.h"
#include "deform_conv/cpu_backward.h"
#include "deform_conv/cpu_forward.h"
#include "deform_conv/cpu_planar.h"

namespace deformkit::conv {
namespace {

// sum over batch and positions, for every output channel.
template <typename A>
void sum_bias(const Map& grad_output, int64_t batch, int64_t out_channels, const Sink& out) {
  each(out_channels, [&](int64_t o) {
    constexpr int64_t run = 1024;
    A values[run];
    double total = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t p = 0; p < grad_output.positions; p += run) {
        const int64_t points = std::min(run, grad_output.positions - p);
        read_run(grad_output, b, o, p, points, values);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < points; ++i) sum += static_cast<double>(values[i]);
        total += sum;
      }
    out.write(o, &total, 1);
  });
}

// The gradients in slices of the channels, and the output where a place for it is given. `results` are in the order of
// the operator; that of the input is made here, in the dtype in which it can be summed up.
template <typename A, int N>
void backward_in_slices(const Call<N>& call, const Tensor& input, const Map& grad_output, Gradients& gradients,
                        bool input_wanted, std::array<Tensor, 5>& results, Tensor* output) {
  const Problem<N>& problem = call.problem;
  const Cut cut = cut_field<A>(problem, backward_width(problem), grad_field_bytes);
  // Contributions of several windows or slices, and of strays, are added up in A, not in half precision.
  const auto dtype = sum_dtype(input.scalar_type());
  const auto slices = slices_of(problem, cut.channels);
  const auto is_split = [&](int64_t channels) {
    return std::any_of(slices.begin(), slices.end(), [&](const auto& slice) { return slice.first % channels != 0; });
  };
  const auto sums_of = [&](const Tensor& result) {
    return result.scalar_type() == dtype ? result : new_scratch(result.sizes(), dtype);
  };
  const bool whole = cut.lays_out() && cut.margin == problem.size[0];
  std::array<Tensor, 5> sums = results;
  if (input_wanted) gradients.input.emplace(sums[0] = whole ? empty_like(input, true) : zeros_like(input, dtype));
  if (is_split(problem.channels_per_offset_group())) {
    if (gradients.offset) gradients.offset.emplace(sums[1] = sums_of(results[1]));
    if (gradients.mask) gradients.mask.emplace(sums[4] = sums_of(results[4]));
  }
  std::optional<Sink> output_sink;
  Tensor output_sums;
  if (output) {
    output_sums = new_result(input, problem.output_sizes());
    if (is_split(problem.group_channels)) output_sums = sums_of(output_sums);
    output_sink.emplace(output_sums);
  }
  Backward<A, N>(call, cut, grad_output, gradients, output_sink).run();
  if (output) *output = rounded(output_sums, input.scalar_type());
  for (int i : {0, 1, 4}) results[i] = rounded(sums[i], results[i].scalar_type());
}

// The gradients, and the output where a place for it is given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask, int64_t boundary,
    const std::vector<bool>& output_mask, Tensor* output) {
  check_tensor("grad_output", grad_output);
  check_tensor("input", input);
  check_tensor("offset", offset);
  check_tensor("weight", weight);
  check_tensor("bias", bias);
  check_tensor("mask", mask);
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask must have 5 values");
  std::array<Tensor, 5> results;
  const std::array<std::optional<Tensor>, 5> like{input, offset, weight, bias, mask};
  const auto run = [&]<typename A, int N>() {
    const Call<N> call({input, offset, weight, bias, stride, padding, dilation, mask, boundary}, input, offset, weight,
                       mask);
    const Problem<N>& problem = call.problem;
    STD_TORCH_CHECK(sizes_of(grad_output) == problem.output_sizes(), "grad_output must have the output's shape");
    STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output must have input's dtype");

    const bool input_wanted = output_mask[0], offset_wanted = output_mask[1], weight_wanted = output_mask[2];
    const bool mask_wanted = output_mask[4] && mask;
    const bool any = problem.batch > 0 && (input_wanted || offset_wanted || weight_wanted || mask_wanted);
    const bool output_too = output && any && computes_output<A>(problem);
    if (output && !output_too)
      *output = deform_conv(input, offset, weight, bias, stride, padding, dilation, mask, boundary);

    const Work work(backward_work(problem.work(), input));

    // Where the gradient by the input is summed up depends on the call.
    const auto make = [&](int i, bool asked) { results[i] = empty_like(like[i] ? *like[i] : input, asked && like[i]); };
    for (int i = 0; i < 5; ++i) make(i, i > 0 && output_mask[i]);
    if (problem.batch == 0) {
      make(0, output_mask[0]);
      for (Tensor& result : results) set_to_zero(result);
      return;
    }
    const Map grad_map(grad_output);
    if (output_mask[3] && bias) sum_bias<A>(grad_map, problem.batch, problem.out_channels, Sink(results[3]));
    if (!any) return;

    Gradients gradients;
    if (offset_wanted) gradients.offset.emplace(results[1]);
    if (weight_wanted) gradients.weight.emplace(results[2]);
    if (mask_wanted) gradients.mask.emplace(results[4]);
    if (problem.is_planar() && problem.field() * int64_t(sizeof(A)) <= grad_field_bytes) {
      make(0, input_wanted);
      if (input_wanted) gradients.input.emplace(results[0]);
      return PlanarBackward<A, N>(call, grad_map, gradients).run();
    }

    backward_in_slices<A>(call, input, grad_map, gradients, input_wanted, results, output_too ? output : nullptr);
  };
  dispatch_sums(input.scalar_type(), input.dim() - 2, run);
  return {results[0], results[1], results[2], results[3], results[4]};
}

}  // namespace

Tensor deform_conv(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask, int64_t boundary) {
  check_tensor("input", input);
  check_tensor("offset", offset);
  check_tensor("weight", weight);
  check_tensor("bias", bias);
  check_tensor("mask", mask);
  Tensor output;
  const auto run = [&]<typename A, int N>() {
    const Call<N> call({input, offset, weight, bias, stride, padding, dilation, mask, boundary}, input, offset, weight,
                       mask);
    const Problem<N>& problem = call.problem;
    const Work work(problem.work());
    output = new_result(input, problem.output_sizes());
    if (problem.batch == 0) return;
    const std::vector<A> values = bias ? values_of<A>(contiguous(*bias)) : std::vector<A>{};
    const int64_t bytes = sizeof(A);
    if (problem.is_planar() && problem.field() * bytes <= field_bytes)
      return forward_planar(call, values, Sink(output));
    const Cut cut = cut_field<A>(problem, problem.channels, field_bytes);
    // Sums over slices of the channels are not rounded to a half-precision output in between.
    const auto dtype = sum_dtype(input.scalar_type());
    const bool apart = cut.channels < problem.channels && dtype != input.scalar_type();
    const Tensor sums = apart ? new_scratch(problem.output_sizes(), dtype) : output;
    forward<A>(call, cut, values, Sink(sums));
    if (apart) write_rounded(sums, output);
  };
  dispatch_sums(input.scalar_type(), input.dim() - 2, run);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask, int64_t boundary,
    const std::vector<bool>& output_mask) {
  return backward(grad_output, input, offset, weight, bias, stride, padding, dilation, mask, boundary, output_mask,
                  nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv_and_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    const std::optional<Tensor>& mask, int64_t boundary, const std::vector<bool>& output_mask) {
  Tensor output;
  const auto gradients = backward(grad_output, input, offset, weight, std::nullopt, stride, padding, dilation, mask,
                                  boundary, output_mask, &output);
  return std::tuple_cat(std::tuple(output), gradients);
}
}  // namespace deformkit::conv
