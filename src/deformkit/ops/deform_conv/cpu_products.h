// The output of a block of positions: its columns times the weight, where groups are not narrow.
#pragma once

#include "deform_conv/cpu_weights.h"

namespace deformkit::conv {

// The columns of a chunk. Products of pairs make them of the values, or find them where samples were written as pairs.
template <typename A>
struct Columns {
  const A* values;  // null where samples are pairs
  int64_t pitch;
  Pair* pairs;  // null where products are not of pairs
  int64_t pairs_pitch;
};

// Adds the columns of a chunk times the weight to sums of [groups, points, rows], whose rows are `pitch` apart.
template <typename A, int N>
void add_products(const Plan<N>& plan, const Chunk& chunk, const Weights<A, N>& weights, int64_t rows, int64_t points,
                  const Columns<A>& columns, A* sums, int64_t pitch) {
  for (size_t p = chunk.first_product; p < chunk.last_product; ++p) {
    const Product& product = plan.products[p];
    A* const to = sums + (product.group - plan.first_group()) * points * pitch;
    if constexpr (has_pairs<A>) {
      if (Pair* pairs = columns.pairs) {
        if (columns.values) {
          pair_columns(columns.values + product.column, points, product.depth, columns.pitch, pairs,
                       columns.pairs_pitch);
        } else {
          pairs += product.column / 2;
        }
        multiply(points, rows, ceil_div(product.depth, 2), Left<Pair>{pairs, columns.pairs_pitch, 1},
                 weights.template of<Pair>(p), to, pitch, true);
        continue;
      }
    }
    multiply(points, rows, product.depth, Left<A>{columns.values + product.column, columns.pitch, 1},
             weights.template of<A>(p), to, pitch, true);
  }
}

// Writes these sums to [B, Cout, positions], or adds them to what an earlier slice has written.
template <typename A, int N>
void write_products(const Problem<N>& problem, const Plan<N>& plan, const A* sums, int64_t pitch, int64_t batch,
                    int64_t begin, int64_t points, const Sink& output) {
  const int64_t rows = problem.group_rows();
  for (int64_t g = 0; g < plan.groups(); ++g) {
    const int64_t group = plan.first_group() + g;
    write_turned(sums + g * points * pitch, pitch, points, rows, output,
                 (batch * problem.out_channels + group * rows) * problem.positions + begin, problem.positions,
                 !plan.starts_group(group));
  }
}

}  // namespace deformkit::conv
