// Sampling by queries: in every head a query takes some points on each level of a field [B, S, H, D] and adds up their
// samples, weighted: [B, Q, H, D]. That is both multi-scale deformable attention and deformable aggregation; they
// differ in how a stored coordinate becomes a point.
#pragma once

#include <tuple>

#include "sample/sample.h"

namespace deformkit {

// One level: its place among the S positions and among a query's points.
template <int N>
struct Level {
  Axes<N> size;
  int64_t start, first_point, points;

  int64_t positions() const { return count<N>(size); }
};

// The shift of a point: scale * coordinate + bias.
template <int N>
struct Affine {
  std::array<double, N> scale, bias;
};

template <int N>
struct Heads {
  Map value;                    // [B, S, H, D]
  Tensor coordinates, weights;  // [B, Q, H, P, N] and [B, Q, H, P]
  int64_t batch, positions, heads, channels, queries, points;
  std::vector<Level<N>> levels;
  std::vector<Affine<N>> affine;      // of each of a query's points
  Axes<N> out_size, stride, padding;  // a query's points have the base stride * o - padding
  Boundary boundary;
  bool nearest, x_first;
  std::vector<int64_t> output_shape;  // [B, Q, H, D], however the operator writes it

  Heads(const Tensor& value_, const Tensor& coordinates_, const Tensor& weights_)
      : value(Map::with_heads(value_)),
        coordinates(torch::stable::contiguous(coordinates_)),
        weights(torch::stable::contiguous(weights_)) {
    const auto sizes = sizes_of(value_), shape = sizes_of(coordinates_);
    batch = sizes[0], heads = sizes[sizes.size() - 2], channels = sizes.back();
    positions = value.positions;
    points = shape[shape.size() - 2];
    queries = 1;
    for (size_t axis = 1; axis + 3 < shape.size(); ++axis) queries *= shape[axis];
    auto expected = shape;
    expected.pop_back();
    STD_TORCH_CHECK(shape.back() == N && shape[0] == batch && shape[shape.size() - 3] == heads && points > 0,
                    "the coordinates do not fit value");
    STD_TORCH_CHECK(sizes_of(weights_) == expected, "the weights do not fit the coordinates");
    STD_TORCH_CHECK(heads > 0 && channels > 0, "value must have heads and channels");
    STD_TORCH_CHECK(weights_.scalar_type() == value_.scalar_type(), "the weights must have value's dtype");
    STD_TORCH_CHECK((value_.scalar_type() == ScalarType::Double) == (coordinates_.scalar_type() == ScalarType::Double),
                    "the dtype of the coordinates does not fit value's");
  }

  // Where the values of a query and head start in a contiguous [B, Q, H, ...] with `width` of them for each.
  int64_t place(int64_t b, int64_t query, int64_t head, int64_t width) const {
    return ((b * queries + query) * heads + head) * width;
  }
};

// The weighted sums of the samples.
template <int N>
Tensor attend(const Heads<N>& call, const Tensor& value);

// The gradients by value, coordinates and weights, those of them that are asked for.
template <int N>
std::tuple<Tensor, Tensor, Tensor> attend_backward(Heads<N> call, const Tensor& grad_output, const Tensor& value,
                                                   const Tensor& coordinates, const Tensor& weights,
                                                   const std::vector<bool>& output_mask);

}  // namespace deformkit
