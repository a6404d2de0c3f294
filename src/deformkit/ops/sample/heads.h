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

// A tensor [B, *out, H, ...] whose last axes are a row for each query and head, once make_rows() has made it so, by a
// copy if need be. The others may have any strides, such as those of an expanded tensor.
class RowsOfHeads {
 public:
  RowsOfHeads(const Tensor& tensor, size_t inner) : tensor_(tensor), inner_(inner) {}

  void make_rows() {
    if (!has_rows()) tensor_ = contiguous(tensor_);
    const auto sizes = tensor_.sizes(), strides = tensor_.strides();
    const size_t head = sizes.size() - inner_ - 1;
    batch_stride_ = strides[0], head_stride_ = strides[head];
    // Of an axis of one element the stride may be any.
    for (size_t axis = 1; axis < head; ++axis)
      if (sizes[axis] != 1) query_stride_ = strides[axis];
    is_made_ = true;
  }

  bool is_made() const { return is_made_; }
  const Tensor& tensor() const { return tensor_; }
  int64_t place(int64_t b, int64_t query, int64_t head) const {
    return b * batch_stride_ + query * query_stride_ + head * head_stride_;
  }
  int64_t query_stride() const { return query_stride_; }

 private:
  // Whether the last axes are side by side, and the axes of the queries are one.
  bool has_rows() const {
    const auto sizes = tensor_.sizes(), strides = tensor_.strides();
    const size_t head = sizes.size() - inner_ - 1;
    int64_t expected = 1;
    for (size_t axis = sizes.size(); axis-- > head + 1; expected *= sizes[axis])
      if (sizes[axis] != 1 && strides[axis] != expected) return false;
    expected = -1;
    for (size_t axis = head; axis-- > 1;) {
      if (sizes[axis] == 1) continue;
      if (expected >= 0 && strides[axis] != expected) return false;
      expected = strides[axis] * sizes[axis];
    }
    return true;
  }

  Tensor tensor_;
  size_t inner_;
  bool is_made_ = false;
  int64_t batch_stride_ = 0, query_stride_ = 0, head_stride_ = 0;
};

template <int N>
struct Heads {
  Map value;                         // [B, S, H, D]
  RowsOfHeads coordinates, weights;  // [B, Q, H, P, N] and [B, Q, H, P]
  int64_t batch, positions, heads, channels, queries, points;
  std::vector<Level<N>> levels;
  std::vector<Affine<N>> affine;      // of each of a query's points
  Axes<N> out_size, stride, padding;  // a query's points have the base stride * o - padding
  Boundary boundary;
  bool nearest, x_first;
  std::vector<int64_t> output_shape;  // [B, Q, H, D], however the operator writes it

  Heads(const Tensor& value_, const Tensor& coordinates_, const Tensor& weights_)
      : value(Map::with_heads(value_)), coordinates(coordinates_, 2), weights(weights_, 1) {
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

  double work() const {
    return work_of<N>(static_cast<double>(batch * queries * heads) * static_cast<double>(points), channels);
  }

  // Where the values of a query and head start in a contiguous [B, Q, H, ...] with `width` of them for each.
  int64_t place(int64_t b, int64_t query, int64_t head, int64_t width) const {
    return ((b * queries + query) * heads + head) * width;
  }
};

// The weighted sums of the samples.
template <int N>
Tensor attend(Heads<N> call, const Tensor& value);

// The gradients by value, coordinates and weights, those of them that are asked for; in `sums`, if it is not null, what
// attend() returns.
template <int N>
std::tuple<Tensor, Tensor, Tensor> attend_backward(Heads<N> call, const Tensor& grad_output, const Tensor& value,
                                                   const Tensor& coordinates, const Tensor& weights,
                                                   const std::vector<bool>& output_mask, Tensor* sums = nullptr);

}  // namespace deformkit
