// Matrix products of pairs of bfloat16 in the matrix registers of AMX, which other files need not know of: each has
// sixteen rows of sixteen pairs or float32 sums.
#pragma once

#include "cpu/tensor.h"

#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace deformkit::amx {

// Whether the processor has the registers for bfloat16, and Linux lets the process use them, which it must be asked.
inline bool is_there() {
  static const bool answer = [] {
    constexpr unsigned for_bfloat16 = 1u << 22, registers = 1u << 24;
    constexpr long ask_for_state = 0x1023, registers_state = 18;  // of arch_prctl: <asm/prctl.h> is not everywhere
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & for_bfloat16) || !(d & registers)) return false;
    return syscall(SYS_arch_prctl, ask_for_state, registers_state) == 0;
  }();
  return answer;
}

constexpr int64_t side = 16;  // rows of a register, and elements of 4 bytes of each

// The shapes of the registers 0 to 7, as the processor reads them.
struct Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int index, int64_t rows_, int64_t elements) {
    rows[index] = static_cast<uint8_t>(rows_), row_bytes[index] = static_cast<uint16_t>(elements * 4);
  }
};
static_assert(sizeof(Shapes) == 64);

// Up to 32 rows of the result for sixteen columns at a time: registers 0 and 1 hold their sums, 2 and 3 pairs of the
// left operand, 4 of the right; 5 to 7 are the same three where less than sixteen pairs of the depth are left. Two
// registers of columns beside each other leave none for that: filling up with zeros instead took 1.6 times as long
// there, and won nothing elsewhere (`python benchmarks/run.py half --case conv`). Strides count elements of 4 bytes.
// `right(j)` is where the sixteen columns from j on start.
template <bool kTwo, typename P, typename F>
__attribute__((target("amx-tile,amx-bf16"))) void multiply_rows(int64_t columns, int64_t depth, const P* a,
                                                                int64_t left_row, const F& right, int64_t right_row,
                                                                float* result, int64_t pitch, bool add) {
  const int64_t a_stride = left_row * 4, b_stride = right_row * 4, c_stride = pitch * 4;
  const int64_t rest = depth % side, whole = depth - rest;
  for (int64_t j = 0; j < columns; j += side) {
    const P* const b = right(j);
    float* const c = result + j;
    if (add) {
      _tile_loadd(0, c, c_stride);
      if constexpr (kTwo) _tile_loadd(1, c + side * pitch, c_stride);
    } else {
      _tile_zero(0);
      if constexpr (kTwo) _tile_zero(1);
    }
    for (int64_t k = 0; k < whole; k += side) {
      _tile_loadd(4, b + k * right_row, b_stride);
      _tile_loadd(2, a + k, a_stride);
      _tile_dpbf16ps(0, 2, 4);
      if constexpr (kTwo) {
        _tile_loadd(3, a + side * left_row + k, a_stride);
        _tile_dpbf16ps(1, 3, 4);
      }
    }
    if (rest > 0) {
      _tile_loadd(7, b + whole * right_row, b_stride);
      _tile_loadd(5, a + whole, a_stride);
      _tile_dpbf16ps(0, 5, 7);
      if constexpr (kTwo) {
        _tile_loadd(6, a + side * left_row + whole, a_stride);
        _tile_dpbf16ps(1, 6, 7);
      }
    }
    _tile_stored(0, c, c_stride);
    if constexpr (kTwo) _tile_stored(1, c + side * pitch, c_stride);
  }
}

// result[i, j] = sum over k of left(i, k) * right(k, j), as multiply() of gemm.h does, for pairs that follow each other
// in the rows of the left operand.
template <typename P, typename F>
__attribute__((target("amx-tile,amx-bf16"))) void multiply(int64_t rows, int64_t columns, int64_t depth, const P* left,
                                                           int64_t left_row, const F& right, int64_t right_row,
                                                           float* result, int64_t pitch, bool add) {
  __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read what was written before
  int64_t shaped = 0;
  for (int64_t i = 0; i < rows;) {
    const int64_t some = std::min(rows - i, 2 * side), first = std::min(some, side), second = some - first;
    if (some != shaped) {
      Shapes shapes;
      const int64_t rest = depth % side;
      shapes.set(0, first, side), shapes.set(2, first, side), shapes.set(4, side, side);
      if (second > 0) shapes.set(1, second, side), shapes.set(3, second, side);
      if (rest > 0) {
        shapes.set(5, first, rest), shapes.set(7, rest, side);
        if (second > 0) shapes.set(6, second, rest);
      }
      _tile_loadconfig(&shapes);
      shaped = some;
    }
    const P* const a = left + i * left_row;
    if (second > 0) {
      multiply_rows<true>(columns, depth, a, left_row, right, right_row, result + i * pitch, pitch, add);
    } else {
      multiply_rows<false>(columns, depth, a, left_row, right, right_row, result + i * pitch, pitch, add);
    }
    i += some;
  }
  _tile_release();
}

}  // namespace deformkit::amx
#else
namespace deformkit::amx {
inline bool is_there() {
  return false;
}
template <typename... Arguments>
void multiply(const Arguments&...) {}
}  // namespace deformkit::amx
#endif
