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
    std::vector<int64_t> size{problem.batch, problem.out_channels};
    size.insert(size.end(), problem.out_size.begin(), problem.out_size.end());
    output = new_result(input, size);
    if (problem.batch == 0) return;
    const std::vector<A> values = bias ? values_of<A>(contiguous(*bias)) : std::vector<A>{};
    const int64_t bytes = sizeof(A);
    if (problem.is_planar() && problem.field() * bytes <= field_bytes)
      return forward_planar(call, values, Sink(output));
    const Cut cut = cut_field<A>(problem, problem.channels, field_bytes);
    // Sums over slices of the channels are not rounded to a half-precision output in between.
    const auto dtype = sum_dtype(input.scalar_type());
    const bool apart = cut.channels < problem.channels && dtype != input.scalar_type();
    const Tensor sums = apart ? new_scratch(size, dtype) : output;
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
    const auto size = sizes_of(grad_output);
    STD_TORCH_CHECK(grad_output.dim() == N + 2 && size[0] == problem.batch && size[1] == problem.out_channels &&
                        std::equal(problem.out_size.begin(), problem.out_size.end(), size.begin() + 2),
                    "grad_output must have the output's shape");
    STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output must have input's dtype");

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
    const bool input_wanted = output_mask[0], offset_wanted = output_mask[1], weight_wanted = output_mask[2];
    const bool mask_wanted = output_mask[4] && mask;
    if (output_mask[3] && bias) sum_bias<A>(grad_map, problem.batch, problem.out_channels, Sink(results[3]));
    if (!(input_wanted || offset_wanted || weight_wanted || mask_wanted)) return;

    Gradients gradients;
    if (offset_wanted) gradients.offset.emplace(results[1]);
    if (weight_wanted) gradients.weight.emplace(results[2]);
    if (mask_wanted) gradients.mask.emplace(results[4]);
    if (problem.is_planar() && problem.field() * int64_t(sizeof(A)) <= grad_field_bytes) {
      make(0, input_wanted);
      if (input_wanted) gradients.input.emplace(results[0]);
      return PlanarBackward<A, N>(call, grad_map, gradients).run();
    }

    const Cut cut = cut_field<A>(problem, backward_width(problem), grad_field_bytes);
    // Contributions of several windows or slices, and of strays, are added up in A, not in a half-precision gradient.
    const bool whole = cut.lays_out() && cut.margin == problem.size[0];
    const auto slices = slices_of(problem, cut.channels);
    const bool split = std::any_of(slices.begin(), slices.end(), [&](const auto& slice) {
      return slice.first % problem.channels_per_offset_group() != 0;
    });
    const auto dtype = sum_dtype(input.scalar_type());
    std::array<Tensor, 5> sums = results;
    if (input_wanted) sums[0] = whole ? empty_like(input, true) : zeros_like(input, dtype);
    for (int i : {1, 4})
      if (split && output_mask[i] && like[i] && like[i]->scalar_type() != dtype)
        sums[i] = new_scratch(like[i]->sizes(), dtype);
    if (input_wanted) gradients.input.emplace(sums[0]);
    if (offset_wanted) gradients.offset.emplace(sums[1]);
    if (mask_wanted) gradients.mask.emplace(sums[4]);
    Backward<A, N>(call, cut, grad_map, gradients).run();
    for (int i : {0, 1, 4}) results[i] = rounded(sums[i], results[i].scalar_type());
  };
  dispatch_sums(input.scalar_type(), input.dim() - 2, run);
  return {results[0], results[1], results[2], results[3], results[4]};
}
}  // namespace deformkit::conv
