// What a library of kernels exports.
#include "cpu/kernels.h"

DEFORMKIT_EXPORT const deformkit::Kernels* deformkit_kernels();

const deformkit::Kernels* deformkit_kernels() {
  using namespace deformkit;
#define DEFORMKIT_ENTRY(name) {&Entry<decltype(deformkit::name)>::enter<deformkit::name>},
  static const Kernels kernels{sizeof(Kernels), sizeof(Tensor), DEFORMKIT_VERSION,
                               DEFORMKIT_OPERATORS(DEFORMKIT_ENTRY)};
#undef DEFORMKIT_ENTRY
  return &kernels;
}
