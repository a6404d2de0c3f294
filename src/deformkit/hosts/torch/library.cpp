// libdeformkit.so: the schemas of all operators, and their kernels for this processor. A program that loads it can run
// the operators without Python; deformkit in Python loads it, too.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "hosts/choice.h"
#include "hosts/schemas.h"
#include "hosts/torch/boxed.h"

#ifndef _WIN32
// torch 2.12 and later; null in an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_library_def_with_tags(TorchLibraryHandle library,
                                                                            const char* schema, const int32_t* tags,
                                                                            int32_t count);
extern "C" __attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
extern "C" __attribute__((weak)) int32_t torch_tag_needs_fixed_stride_order();
#endif

DEFORMKIT_EXPORT const char* deformkit_isa();
DEFORMKIT_EXPORT const char* deformkit_reasons();

namespace {

// What is defined already stays: Python defines the operators itself if it finds no library when it is imported.
void define(TorchLibraryHandle library, const char* schema) {
#ifndef _WIN32
  if (torch_library_def_with_tags && torch_tag_pt2_compliant_tag && torch_tag_needs_fixed_stride_order) {
    const int32_t tags[] = {torch_tag_pt2_compliant_tag(), torch_tag_needs_fixed_stride_order()};
    torch_library_def_with_tags(library, schema, tags, 2);
    return;
  }
#endif
  aoti_torch_library_def(library, schema);
}

// The operators exist while their library object does, which is until the process ends.
void define_all() {
  static TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_fragment("deformkit", __FILE__, __LINE__, &library) != 0) return;
  for (const char* schema : deformkit::schemas) define(library, schema);
}

// The kernels answer while their library object lives, which is until the process ends, too.
void register_all(const deformkit::Kernels& kernels) {
  using torch::stable::detail::StableLibrary;
  auto& library = *new StableLibrary(StableLibrary::Kind::IMPL, "deformkit", "CPU", __FILE__, __LINE__);
#define DEFORMKIT_ADD(name) deformkit::Boxed<&deformkit::Kernels::name>::add(library, #name, kernels);
  DEFORMKIT_OPERATORS(DEFORMKIT_ADD)
#undef DEFORMKIT_ADD
}

[[maybe_unused]] const bool ready = [] {
  define_all();
  if (const deformkit::Kernels* const kernels = deformkit::choice().kernels) register_all(*kernels);
  return true;
}();

}  // namespace

// The instruction set of the kernels in use; empty if none was loaded.
const char* deformkit_isa() {
  return deformkit::choice().isa.c_str();
}

// Why the kernels of the other instruction sets are not in use, one line for each.
const char* deformkit_reasons() {
  return deformkit::choice().reasons.c_str();
}
