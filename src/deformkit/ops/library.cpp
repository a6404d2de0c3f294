// libdeformkit.so: the schemas of all operators, and the choice of the library of kernels for this processor. A program
// that loads it can run the operators without Python; deformkit in Python loads it, too.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#define DEFORMKIT_EXPORT extern "C" __declspec(dllexport)
#else
#include <dlfcn.h>
#include <unistd.h>
#define DEFORMKIT_EXPORT extern "C" __attribute__((visibility("default")))
// torch 2.12 and later; null in an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_library_def_with_tags(TorchLibraryHandle library,
                                                                            const char* schema, const int32_t* tags,
                                                                            int32_t count);
extern "C" __attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
extern "C" __attribute__((weak)) int32_t torch_tag_needs_fixed_stride_order();
#endif

// The C library moved these in 2.34, and would otherwise ask for that version where the library runs.
#if defined(__GLIBC__) && defined(__x86_64__)
#define DEFORMKIT_OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define DEFORMKIT_OLDEST_GLIBC "GLIBC_2.17"
#endif
#ifdef DEFORMKIT_OLDEST_GLIBC
__asm__(".symver dlopen,dlopen@" DEFORMKIT_OLDEST_GLIBC);
__asm__(".symver dlerror,dlerror@" DEFORMKIT_OLDEST_GLIBC);
__asm__(".symver dladdr,dladdr@" DEFORMKIT_OLDEST_GLIBC);
#endif

DEFORMKIT_EXPORT const char* deformkit_isa();
DEFORMKIT_EXPORT const char* deformkit_reasons();

namespace {

// Generated from the calls of define() in ops/*/op.py by packaging/schemas.py.
const char* const schemas[] = {
#include "schemas.inc"
};

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
  if (aoti_torch_library_init_fragment("deformkit", "deformkit/ops/library.cpp", 0, &library) != 0) return;
  for (const char* schema : schemas) define(library, schema);
}

// Best first. A processor supports its own instruction set and all that follow it.
struct Isa {
  const char* name;
  bool supported;
};

std::vector<Isa> isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return {{"avx512", avx512}, {"avx2", avx2}, {"baseline", true}};
#else
  return {{"avx512", false}, {"avx2", false}, {"baseline", true}};
#endif
}

// The best instruction set that torch's own variable allows, as an index of isas(); none means no limit.
size_t first_allowed() {
  const char* const value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string allowed = value ? value : "";
  return allowed == "avx2" ? 1 : allowed == "default" ? 2 : 0;
}

#ifdef _WIN32
const char separator = '\\';

std::string own_path() {
  HMODULE self = nullptr;
  char path[MAX_PATH] = "";
  GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                     reinterpret_cast<LPCSTR>(&deformkit_isa), &self);
  GetModuleFileNameA(self, path, MAX_PATH);
  return path;
}

bool exists(const std::string& path) {
  return GetFileAttributesA(path.c_str()) != INVALID_FILE_ATTRIBUTES;
}

// Empty if the library loads, else the reason.
std::string open(const std::string& path) {
  return LoadLibraryA(path.c_str()) ? "" : "error " + std::to_string(GetLastError());
}
#else
const char separator = '/';

std::string own_path() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&deformkit_isa), &info) && info.dli_fname ? info.dli_fname : "";
}

bool exists(const std::string& path) {
  return access(path.c_str(), F_OK) == 0;
}

// Empty if the library loads, else the reason.
std::string open(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return "";
  const char* const error = dlerror();
  return error ? error : "unknown error";
}
#endif

// The library of kernels that was loaded, and why each of the others was not: lines of "isa: reason".
struct Kernels {
  std::string isa, reasons;

  Kernels() {
    define_all();
    const std::string self = own_path();
    const size_t end = self.find_last_of(separator);
    const std::string folder = end == std::string::npos ? "" : self.substr(0, end + 1);
    const size_t allowed = first_allowed();
    size_t index = 0;
    for (const Isa& each : isas()) {
      const std::string name = "deformkit_" + std::string(each.name) + ".so", path = folder + name;
      std::string reason;
      if (!exists(path)) {
        reason = "no " + name + " beside libdeformkit.so: it was not built";
      } else if (!each.supported) {
        reason = "this processor does not support it";
      } else if (index < allowed) {
        reason = "ATEN_CPU_CAPABILITY excludes it";
      } else if (!isa.empty()) {
        reason = isa + " is loaded, which is better";
      } else if ((reason = open(path)).empty()) {
        isa = each.name;
      } else {
        reason = "it does not load: " + reason;
      }
      if (!reason.empty()) reasons += std::string(each.name) + ": " + reason + "\n";
      ++index;
    }
  }
};

const Kernels kernels;

}  // namespace

// The instruction set of the kernels in use; empty if none was loaded.
const char* deformkit_isa() {
  return kernels.isa.c_str();
}

// Why the kernels of the other instruction sets are not in use, one line for each.
const char* deformkit_reasons() {
  return kernels.reasons.c_str();
}
