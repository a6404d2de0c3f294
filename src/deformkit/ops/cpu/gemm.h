// Matrix products of blocks that lie in a core's cache, a tile of the result in registers at a time.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/lanes.h"

namespace deformkit {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, vector_registers = 32;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
#endif

// A tile has two vectors of columns and as many rows as leave registers for one row of the right operand and a
// broadcast of the left.
template <typename A>
struct Tile {
  static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(A));
  static constexpr int vectors = 2, columns = vectors * lanes, rows = (vector_registers - vectors - 2) / vectors;
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

// The left operand of a product: element (i, k) is data[i * row + k * column].
template <typename A>
struct Left {
  const A* data;
  int64_t row, column;
};

// The right operand in panels, each of one tile's columns: element (k, j) of panel p is data[p * panel + k * row + j].
// Packed panels follow each other; columns of a row-major matrix are panels too.
template <typename A>
struct Panels {
  const A* data;
  int64_t panel, row;

  static Panels packed(const A* data, int64_t depth) { return {data, depth * Tile<A>::columns, Tile<A>::columns}; }
  static Panels of_matrix(const A* data, int64_t pitch) { return {data, Tile<A>::columns, pitch}; }
};

template <int kRows, int kVectors, typename A>
void multiply_tile(int64_t depth, const Left<A>& left, const A* right, int64_t right_row, A* result, int64_t pitch,
                   bool add) {
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

template <int kVectors, typename A>
void multiply_rows(int64_t rows, int64_t depth, const Left<A>& left, const A* right, int64_t right_row, A* result,
                   int64_t pitch, bool add) {
  [&]<int... smaller>(std::integer_sequence<int, smaller...>) {
    (void)((rows == smaller + 1 &&
            (multiply_tile<smaller + 1, kVectors>(depth, left, right, right_row, result, pitch, add), true)) ||
           ...);
  }(std::make_integer_sequence<int, Tile<A>::rows>{});
}

// result[i, j] = sum over k of left(i, k) * right(k, j), with `add` added to what is there, for `rows` and `columns` of
// the result, whose rows are `pitch` apart and hold whole vectors.
template <typename A>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<A>& left, const Panels<A>& right, A* result,
              int64_t pitch, bool add) {
  using T = Tile<A>;
  const int64_t tiles = (rows + T::rows - 1) / T::rows;
  for (int64_t j = 0; j < columns; j += T::columns) {
    const A* const panel = right.data + j / T::columns * right.panel;
    // Rows in equal tiles: a last one of few rows would wait for its additions.
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles, some = rows * (t + 1) / tiles - first;
      const Left<A> part{left.data + first * left.row, left.row, left.column};
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
