// The instruction sets for which the kernels are compiled.
#pragma once

#include <vector>

namespace deformkit {

// Best first. A processor supports its own instruction set and all that follow it.
struct Isa {
  const char* name;
  bool supported;
};

inline std::vector<Isa> isas() {
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

}  // namespace deformkit
