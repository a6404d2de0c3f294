// The table of operators that a library of kernels exports, for the library that loads it.
#pragma once

#include "cpu/operators.h"

// Before a function that a library exports.
#ifdef _WIN32
#define DEFORMKIT_EXPORT extern "C" __declspec(dllexport)
#else
#define DEFORMKIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define DEFORMKIT_OPERATORS(F)      \
  F(deform_aggregate)               \
  F(deform_aggregate_backward)      \
  F(deform_conv)                    \
  F(deform_conv_backward)           \
  F(deform_conv_transpose)          \
  F(deform_conv_transpose_backward) \
  F(deform_correlate)               \
  F(deform_correlate_backward)      \
  F(deform_roi_pool)                \
  F(deform_roi_pool_backward)       \
  F(deform_sample)                  \
  F(deform_sample_backward)         \
  F(deform_splat)                   \
  F(deform_splat_backward)          \
  F(ms_deform_attn)                 \
  F(ms_deform_attn_backward)

namespace deformkit {

// An operator as it is called from another library.
template <typename F>
struct Entry;
template <typename R, typename... Args>
struct Entry<R(Args...)> {
  R (*call)(Host& host, Args... args);

  template <R (*f)(Args...)>
  static R enter(Host& host, Args... args) {
    const Guest guest(host);
    return f(args...);
  }
};

struct Kernels {
  // These stay the first in every version, so that libraries of different versions recognise each other.
  int64_t bytes, tensor_bytes;
  const char* version;

#define DEFORMKIT_ENTRY(name) Entry<decltype(deformkit::name)> name;
  DEFORMKIT_OPERATORS(DEFORMKIT_ENTRY)
#undef DEFORMKIT_ENTRY
};

}  // namespace deformkit

// The function that a library of kernels exports.
constexpr const char* deformkit_kernels_name = "deformkit_kernels";
using deformkit_kernels_type = const deformkit::Kernels*();
