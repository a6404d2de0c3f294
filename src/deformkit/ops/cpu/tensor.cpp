// Copies of tensors, which are divided among threads by shape, as all work is; and runs of elements of any dtype.
#include "cpu/tensor.h"

#include <algorithm>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace deformkit {
namespace {

constexpr int64_t piece = 1 << 15;  // elements that one item of work copies
constexpr int64_t patch = 64;       // rows and columns that are turned at a time

// The axes of a tensor that a copy of it has, without those of one element, and with those joined that are one run.
struct Layout {
  struct Axis {
    int64_t size, stride, to;  // to: the stride of the copy
  };
  std::array<Axis, Tensor::most_axes> axis;
  int count = 0;

  explicit Layout(const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t to = tensor.numel();
    for (size_t i = 0; i < sizes.size(); ++i) {
      to /= sizes[i];
      if (sizes[i] == 1) continue;
      const bool joined = count > 0 && axis[count - 1].stride == strides[i] * sizes[i];
      axis[joined ? count - 1 : count++] = {joined ? axis[count - 1].size * sizes[i] : sizes[i], strides[i], to};
    }
    while (count < 2) {
      std::copy_backward(axis.begin(), axis.begin() + count, axis.begin() + count + 1);
      axis[0] = {1, 0, 0}, ++count;
    }
  }

  // The axis whose elements lie closest in the tensor.
  int closest() const {
    int best = count - 1;
    for (int i = 0; i < count - 1; ++i)
      if (axis[i].stride > 0 && (axis[best].stride == 0 || axis[i].stride < axis[best].stride)) best = i;
    return best;
  }

  // The places in the tensor and in the copy where the last two axes start, for an index of the others.
  std::pair<int64_t, int64_t> start(int64_t index) const {
    int64_t from = 0, to = 0;
    for (int i = count - 2; i-- > 0; index /= axis[i].size) {
      from += index % axis[i].size * axis[i].stride;
      to += index % axis[i].size * axis[i].to;
    }
    return {from, to};
  }
};

// A patch of rows and columns; the columns are side by side in the copy.
template <typename T>
void copy_patch(const T* from, const Layout::Axis& row, const Layout::Axis& column, int64_t rows, int64_t columns,
                T* to) {
  if (row.stride == 1 && column.stride != 1) return transpose<T>(from, columns, rows, column.stride, to, row.to);
  for (int64_t r = 0; r < rows; ++r, from += row.stride, to += row.to) {
    if (column.stride == 1) {
      std::memcpy(to, from, static_cast<size_t>(columns) * sizeof(T));
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = from[c * column.stride];
    }
  }
}

// T: a type of the elements' size.
template <typename T>
void copy(const Tensor& tensor, T* to) {
  Layout axes(tensor);
  const T* const from = static_cast<const T*>(tensor.data_ptr());
  // Rows run along the axis whose elements lie closest, unless the columns do.
  const int closest = axes.closest(), last = axes.count - 1;
  if (closest < last - 1) std::swap(axes.axis[closest], axes.axis[last - 1]);
  const Layout::Axis row = axes.axis[last - 1], column = axes.axis[last];
  const bool turned = closest != last;
  const int64_t columns = turned ? std::min(patch, column.size) : std::min(piece, column.size);
  const int64_t rows =
      turned ? std::min(std::max(patch, piece / columns), row.size) : std::clamp<int64_t>(piece / columns, 1, row.size);
  const int64_t across = ceil_div(column.size, columns), down = ceil_div(row.size, rows);
  each(tensor.numel() / (row.size * column.size) * across * down, [&](int64_t item) {
    const auto [source, target] = axes.start(item / (across * down));
    const int64_t r = item / across % down * rows, c = item % across * columns;
    copy_patch(from + source + r * row.stride + c * column.stride, row, column, std::min(rows, row.size - r),
               std::min(columns, column.size - c), to + target + r * row.to + c);
  });
}

}  // namespace

Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  const Tensor result = new_scratch(tensor.sizes(), tensor.scalar_type());
  const Work work(static_cast<double>(tensor.numel()));
  switch (tensor.element_size()) {
    case 2:
      copy(tensor, static_cast<uint16_t*>(result.data_ptr()));
      break;
    case 4:
      copy(tensor, static_cast<float*>(result.data_ptr()));
      break;
    default:
      copy(tensor, static_cast<double*>(result.data_ptr()));
  }
  return result;
}

void write_rounded(const Tensor& sums, const Tensor& result) {
  const Sink out(result);
  each(ceil_div(sums.numel(), piece), [&](int64_t item) {
    const int64_t begin = item * piece, count = std::min(piece, sums.numel() - begin);
    if (sums.scalar_type() == ScalarType::Double) {
      out.write(begin, static_cast<const double*>(sums.data_ptr()) + begin, count);
    } else {
      out.write(begin, static_cast<const float*>(sums.data_ptr()) + begin, count);
    }
  });
}

Tensor rounded(const Tensor& sums, ScalarType dtype) {
  if (sums.scalar_type() == dtype) return sums;
  const Tensor result = current_host->allocate(sums.sizes(), dtype, true);
  write_rounded(sums, result);
  return result;
}

void set_to_zero(const Tensor& tensor) {
  const int64_t bytes = tensor.numel() * tensor.element_size();
  each(ceil_div(bytes, mib), [&](int64_t item) {
    const int64_t begin = item * mib;
    std::memset(static_cast<char*>(tensor.data_ptr()) + begin, 0, static_cast<size_t>(std::min(mib, bytes - begin)));
  });
}

Tensor zeros_like(const Tensor& like, ScalarType dtype) {
  const Tensor result = current_host->allocate(like.sizes(), dtype, dtype == like.scalar_type());
  set_to_zero(result);
  return result;
}

template <typename A>
void read_run(const Map& map, int64_t batch, int64_t channel, int64_t position, int64_t count, A* out) {
  dispatch_dtype(map.dtype(), [&]<typename T>() {
    const T* source = map.at<T>(batch, channel, position);
    const int64_t stride = map.position_stride;
    if (stride == 1) {
      load_run(source, count, out);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = load<A>(source[i * stride]);
    }
  });
}

template <typename A>
void Sink::write(int64_t at, const A* values, int64_t count, bool add) const {
  dispatch_dtype(dtype_, [&]<typename T>() {
    T* out = static_cast<T*>(data_) + at;
    if (add) {
      for (int64_t i = 0; i < count; ++i) out[i] = store<T>(load<A>(out[i]) + values[i]);
    } else {
      store_run(values, count, out);
    }
  });
}

#define DEFORMKIT_INSTANTIATE(A)                                              \
  template void read_run(const Map&, int64_t, int64_t, int64_t, int64_t, A*); \
  template void Sink::write(int64_t, const A*, int64_t, bool) const;
DEFORMKIT_INSTANTIATE(float)
DEFORMKIT_INSTANTIATE(double)

}  // namespace deformkit
