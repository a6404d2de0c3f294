// Matrix products of blocks that lie in a core's cache, a tile of the result in registers at a time.
#pragma once

#include <algorithm>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/amx.h"
#include "cpu/lanes.h"

namespace deformkit {

// Registers for broadcasts of the left operand hold no sums. On Arm a broadcast is a load of its own, and compilers
// keep several of them under way: with 11 rows and more GCC 12 moves sums to the stack and back in the innermost loop,
// and Clang 22 does with 14. `objdump -d` of deformkit_baseline.so shows that, in multiply_tile.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32, broadcast_registers = 2;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, vector_registers = 16, broadcast_registers = 2;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, vector_registers = 32, broadcast_registers = 10;
#else
constexpr int vector_bytes = 16, vector_registers = 16, broadcast_registers = 2;
#endif

// A tile has two vectors of columns and as many rows as leave registers for one row of the right operand and broadcasts
// of the left.
template <typename A>
struct Tile {
  static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(A));
  static constexpr int vectors = 2, columns = vectors * lanes,
                       rows = (vector_registers - vectors - broadcast_registers) / vectors;
};

// `count` rounded up to whole tiles of columns, for which right operands have room, and to whole vectors, for which
// results have.
template <typename A>
constexpr int64_t whole_tiles(int64_t count) {
  return (count + Tile<A>::columns - 1) / Tile<A>::columns * Tile<A>::columns;
}
template <typename A>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + Tile<A>::lanes - 1) / Tile<A>::lanes * Tile<A>::lanes;
}

// The left operand of a product. Element (i, k) is data[i * row + k * column].
template <typename A>
struct Left {
  const A* data;
  int64_t row, column;
};

// Two neighbours along the depth of a product of bfloat16, which are multiplied and added up together; the last of an
// odd depth has a zero beside it. Depths are then counted in pairs.
struct Pair {
  BFloat16 first, second;
};

// Whether there are kernels for pairs, for sums in A.
#if defined(__AVX512F__)
template <typename A>
constexpr bool has_pairs = std::is_same_v<A, float>;
#else
template <typename A>
constexpr bool has_pairs = false;
#endif

// The type in which the products of operands are added up.
template <typename O>
using Result = std::conditional_t<std::is_same_v<O, Pair>, float, O>;

// The right operand in panels, each of one tile's columns: element (k, j) of panel p is data[p * panel + k * row + j].
// Packed panels follow each other; columns of a row-major matrix are panels, too.
template <typename A>
struct Panels {
  const A* data;
  int64_t panel, row;

  static Panels packed(const A* data, int64_t depth) { return {data, depth * columns, columns}; }
  static Panels of_matrix(const A* data, int64_t pitch) { return {data, columns, pitch}; }

 private:
  static constexpr int64_t columns = Tile<Result<A>>::columns;
};

// Aligned, because a change elsewhere in a file otherwise moved its loop, and a gradient of 8 offset groups took 1.5 %
// longer: `python benchmarks/run.py conv --case og8` measures it.
template <int kRows, int kVectors, typename A>
__attribute__((aligned(64))) void multiply_tile(int64_t depth, const Left<A>& left, const A* right, int64_t right_row,
                                                A* result, int64_t pitch, bool add) {
  constexpr int lanes = Tile<A>::lanes;
  typedef typename Lanes<A, lanes>::type V;
  V sum[kRows][kVectors] = {};
  const A* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.column, right += right_row) {
    V b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = read_lanes<V>(right + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * left.row] * b[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* const to = result + r * pitch + v * lanes;
      write_lanes(to, add ? read_lanes<V>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

#if defined(__AVX512F__)
// Whether the processor multiplies pairs faster than numbers of float32. Only the library for AVX-512 has these
// kernels; it asks at run time. Intel's processors do so in their matrix registers alone: in vectors, convolution
// took 1.6 to 1.8 times as long as in float32. `python benchmarks/run.py half --case conv` measures it.
inline bool multiplies_pairs() {
  static const bool in_vectors = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
  }();
  return in_vectors || amx::is_there();
}

template <int kRows, int kVectors>
__attribute__((aligned(64), target("avx512bf16"))) void multiply_tile(int64_t depth, const Left<Pair>& left,
                                                                      const Pair* right, int64_t right_row,
                                                                      float* result, int64_t pitch, bool add) {
  constexpr int lanes = Tile<float>::lanes;
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  const Pair* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.column, right += right_row) {
    __m512bh b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) std::memcpy(&b[v], right + v * lanes, sizeof b[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t bits;
      std::memcpy(&bits, a + r * left.row, sizeof bits);
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* const to = result + r * pitch + v * lanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
  }
}

// Sixteen pairs of the lanes of two vectors.
__attribute__((target("avx512bf16"))) inline void write_pairs(__m512 first, __m512 second, Pair* to) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// pairs[i * pairs_pitch + k] of the elements 2 k and 2 k + 1 of row i, for whole vectors of pairs.
__attribute__((target("avx512bf16"))) inline void pair_columns(const float* from, int64_t rows, int64_t depth,
                                                               int64_t pitch, Pair* pairs, int64_t pairs_pitch) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; k += 32) {
      const auto some = [&](int64_t first) {
        const int64_t left = std::clamp<int64_t>(depth - first, 0, 16);
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), from + i * pitch + first);
      };
      const __m512bh both = _mm512_cvtne2ps_pbh(some(k + 16), some(k));
      std::memcpy(pairs + i * pairs_pitch + k / 2, &both, sizeof both);
    }
}

// pairs[k * pairs_pitch + j] of column j of the rows 2 k and 2 k + 1, for whole vectors of columns.
__attribute__((target("avx512bf16"))) inline void pair_rows(const float* from, int64_t depth, int64_t columns,
                                                            int64_t pitch, Pair* pairs, int64_t pairs_pitch) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t j = 0; j < columns; j += 16) {
      const float* const row = from + k * pitch + j;
      write_pairs(_mm512_loadu_ps(row), k + 1 < depth ? _mm512_loadu_ps(row + pitch) : _mm512_setzero_ps(),
                  pairs + k / 2 * pairs_pitch + j);
    }
}

// The pairs of sixteen elements of two rows.
inline __m512i pair_elements(const BFloat16* first, const BFloat16* second) {
  const __m512i low = _mm512_cvtepu16_epi32(read_lanes<__m256i>(first));
  const __m512i high = _mm512_cvtepu16_epi32(read_lanes<__m256i>(second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// pairs[k * pairs_pitch + j] of column j of the rows 2 k and 2 k + 1, of which there is an even number, for whole
// vectors of columns.
__attribute__((target("avx512bf16"))) inline void pair_rows(const BFloat16* from, int64_t depth, int64_t columns,
                                                            int64_t pitch, Pair* pairs, int64_t pairs_pitch) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t j = 0; j < columns; j += 16) {
      const BFloat16* const row = from + k * pitch + j;
      write_lanes(pairs + k / 2 * pairs_pitch + j, pair_elements(row, row + pitch));
    }
}

// The same turned, pairs[j * pairs_pitch + k], for whole vectors of pairs.
__attribute__((target("avx512bf16"))) inline void pair_and_turn_rows(const BFloat16* from, int64_t depth,
                                                                     int64_t columns, int64_t pitch, Pair* pairs,
                                                                     int64_t pairs_pitch) {
  typedef typename Lanes<float, 16>::type V;
  constexpr std::make_integer_sequence<int, 16> all{};
  for (int64_t k = 0; k < depth; k += 32)
    for (int64_t j = 0; j < columns; j += 16) {
      V some[16] = {};
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) {
        const BFloat16* const row = from + (k + 2 * n) * pitch + j;
        if (k + 2 * n < depth) some[n] = reinterpret_cast<V>(pair_elements(row, row + pitch));
      }
      exchange<1>(some, all);
      exchange<2>(some, all);
      exchange<4>(some, all);
      exchange<8>(some, all);
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n)
        if (j + n < columns) write_lanes(pairs + (j + n) * pairs_pitch + k / 2, some[n]);
    }
}

#else
inline bool multiplies_pairs() {
  return false;
}
#endif

template <int kVectors, typename O, typename A>
void multiply_rows(int64_t rows, int64_t depth, const Left<O>& left, const O* right, int64_t right_row, A* result,
                   int64_t pitch, bool add) {
  [&]<int... smaller>(std::integer_sequence<int, smaller...>) {
    (void)((rows == smaller + 1 &&
            (multiply_tile<smaller + 1, kVectors>(depth, left, right, right_row, result, pitch, add), true)) ||
           ...);
  }(std::make_integer_sequence<int, Tile<A>::rows>{});
}

// result[i, j] = sum over k of left(i, k) * right(k, j), with `add` added to what is there, for `rows` and `columns` of
// the result, whose rows are `pitch` apart and hold whole vectors.
template <typename O, typename A>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<O>& left, const Panels<O>& right, A* result,
              int64_t pitch, bool add) {
  using T = Tile<A>;
  if constexpr (std::is_same_v<O, Pair>) {
    if (left.column == 1 && amx::is_there()) {
      const auto columns_from = [&](int64_t j) { return right.data + j / T::columns * right.panel + j % T::columns; };
      return amx::multiply(rows, columns, depth, left.data, left.row, columns_from, right.row, result, pitch, add);
    }
  }
  const int64_t tiles = (rows + T::rows - 1) / T::rows;
  for (int64_t j = 0; j < columns; j += T::columns) {
    const O* const panel = right.data + j / T::columns * right.panel;
    // The tiles have equal numbers of rows: a last tile with few rows would wait for its additions.
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles, some = rows * (t + 1) / tiles - first;
      const Left<O> part{left.data + first * left.row, left.row, left.column};
      A* const to = result + first * pitch + j;
      if (columns - j > T::lanes) {
        multiply_rows<2>(some, depth, part, panel, right.row, to, pitch, add);
      } else {
        multiply_rows<1>(some, depth, part, panel, right.row, to, pitch, add);
      }
    }
  }
}

}  // namespace deformkit
