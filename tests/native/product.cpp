// The products of cpu/gemm.h behind a plain C function, for a test that has no operator around them.
#include "cpu/gemm.h"

namespace {

template <typename O, typename A>
void product(int64_t rows, int64_t columns, int64_t depth, const O* left, int64_t left_row, int64_t left_column,
             const O* right, bool packed, int64_t right_pitch, A* result, int64_t pitch, bool add) {
  using namespace deformkit;
  const auto panels = packed ? Panels<O>::packed(right, depth) : Panels<O>::of_matrix(right, right_pitch);
  multiply(rows, columns, depth, Left<O>{left, left_row, left_column}, panels, result, pitch, add);
}

}  // namespace

extern "C" {
int64_t columns_of_a_tile(bool doubles) {
  return doubles ? deformkit::Tile<double>::columns : deformkit::Tile<float>::columns;
}

bool has_pairs() {
#if defined(__AVX512F__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void product_float(int64_t rows, int64_t columns, int64_t depth, const float* left, int64_t left_row,
                   int64_t left_column, const float* right, bool packed, int64_t right_pitch, float* result,
                   int64_t pitch, bool add) {
  product(rows, columns, depth, left, left_row, left_column, right, packed, right_pitch, result, pitch, add);
}

void product_double(int64_t rows, int64_t columns, int64_t depth, const double* left, int64_t left_row,
                    int64_t left_column, const double* right, bool packed, int64_t right_pitch, double* result,
                    int64_t pitch, bool add) {
  product(rows, columns, depth, left, left_row, left_column, right, packed, right_pitch, result, pitch, add);
}

#if defined(__AVX512F__)
void product_pairs(int64_t rows, int64_t columns, int64_t depth, const deformkit::Pair* left, int64_t left_row,
                   int64_t left_column, const deformkit::Pair* right, bool packed, int64_t right_pitch, float* result,
                   int64_t pitch, bool add) {
  product(rows, columns, depth, left, left_row, left_column, right, packed, right_pitch, result, pitch, add);
}

void pair_and_turn_rows(const deformkit::BFloat16* from, int64_t depth, int64_t columns, int64_t pitch,
                        deformkit::Pair* pairs, int64_t pairs_pitch) {
  deformkit::pair_and_turn_rows(from, depth, columns, pitch, pairs, pairs_pitch);
}
#endif
}
