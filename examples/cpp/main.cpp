// deploy MODEL.pt2 VALUES.pt: runs a package of AOTInductor on inputs, and compares its output with the expected one.
//
// VALUES.pt is a list of tensors that torch.save has written: the inputs, and the output for them.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

std::vector<at::Tensor> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> values;
  for (const c10::IValue& value : list.toListRef()) values.push_back(value.toTensor());
  return values;
}

// The largest difference relative to the largest value.
double error(const at::Tensor& found, const at::Tensor& expected) {
  TORCH_CHECK(found.sizes() == expected.sizes(), "the output has the shape ", found.sizes(), ", not ",
              expected.sizes());
  return found.sub(expected).abs().max().item<double>() / expected.abs().max().item<double>();
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 VALUES.pt\n", argv[0]);
    return 2;
  }
  std::vector<at::Tensor> values = read(argv[2]);
  const at::Tensor expected = values.back();
  values.pop_back();

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const double found = error(model.run(values).at(0), expected);
  std::printf("the output differs by %.1e of its largest value\n", found);
  return found < 1e-4 ? 0 : 1;
} catch (const std::exception& failure) {
  std::fprintf(stderr, "%s\n", failure.what());
  return 1;
}
