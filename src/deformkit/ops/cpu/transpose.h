// Transposition of a matrix, eight by eight in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace deformkit {

#if defined(__GNUC__)
namespace detail {

typedef float Lanes __attribute__((vector_size(32)));

inline void transpose_8x8(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  Lanes row[8], half[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&row[i], from + i * from_pitch, sizeof(Lanes));
  // Neighbours interleaved: single elements, then pairs, then halves.
  for (int i = 0; i < 8; i += 2) {
    half[i] = __builtin_shufflevector(row[i], row[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    half[i + 1] = __builtin_shufflevector(row[i], row[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) {
      row[j] = __builtin_shufflevector(half[j], half[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      row[j + 2] = __builtin_shufflevector(half[j], half[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    half[i] = __builtin_shufflevector(row[i], row[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    half[i + 4] = __builtin_shufflevector(row[i], row[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_pitch, &half[i], sizeof(Lanes));
}

}  // namespace detail
#endif

// to[c * to_pitch + r] = from[r * from_pitch + c] for every row r and column c.
template <typename A>
void transpose(const A* from, int64_t rows, int64_t columns, int64_t from_pitch, A* to, int64_t to_pitch) {
  int64_t row = 0;
#if defined(__GNUC__)
  if constexpr (std::is_same_v<A, float>) {
    for (; row + 8 <= rows; row += 8) {
      int64_t column = 0;
      for (; column + 8 <= columns; column += 8)
        detail::transpose_8x8(from + row * from_pitch + column, from_pitch, to + column * to_pitch + row, to_pitch);
      for (; column < columns; ++column)
        for (int64_t r = row; r < row + 8; ++r) to[column * to_pitch + r] = from[r * from_pitch + column];
    }
  }
#endif
  for (; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) to[column * to_pitch + row] = from[row * from_pitch + column];
}

}  // namespace deformkit
