// Views of tensors for the kernels: element types, strides, and the dispatch over dtype and number of spatial axes.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/host.h"

namespace deformkit {

// The type of coordinates and sums: double for double, float for everything else.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A, typename T>
inline A load(T value) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    _Float16 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<A>(bits);
  }
#endif
  return static_cast<A>(value);
}

template <typename T, typename A>
inline T store(A value) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    const _Float16 bits = static_cast<_Float16>(value);
    Half result;
    std::memcpy(static_cast<void*>(&result), &bits, sizeof bits);
    return result;
  }
#endif
  return static_cast<T>(value);
}

template <typename F>
void dispatch_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    default:
      STD_TORCH_CHECK(false, "the dtype must be float16, bfloat16, float32 or float64");
  }
}

// The same for the dtypes whose sums are A, of which the caller knows that this is one.
template <typename A, typename F>
void dispatch_summed_as(ScalarType dtype, F&& f) {
  dispatch_dtype(dtype, [&]<typename T>() {
    if constexpr (std::is_same_v<Sum<T>, A>) return f.template operator()<T>();
    STD_TORCH_CHECK(false, "values of this dtype are summed in another one");
  });
}

template <typename F>
void dispatch_axes(int64_t axes, F&& f) {
  switch (axes) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      STD_TORCH_CHECK(false, "there must be 1, 2 or 3 spatial axes, not ", axes);
  }
}

// The dtype of sums of values of `dtype`.
inline ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename A>
constexpr ScalarType sum_dtype_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Calls f<A, N>() with the type of sums of values of `dtype`, and the number of spatial axes.
template <typename F>
void dispatch_sums(ScalarType dtype, int64_t axes, F&& f) {
  dispatch_axes(axes, [&]<int N>() {
    dtype == ScalarType::Double ? f.template operator()<double, N>() : f.template operator()<float, N>();
  });
}

inline Sizes sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

// Raises unless a tensor has real numbers, is on the CPU, and has its memory: sharding and offloading free memory of
// tensors that still exist.
inline void check_tensor(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.storage().on_cpu, name, " is not on the CPU; it must be, as the other tensors are");
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  name, " must have the dtype float16, bfloat16, float32 or float64");
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage().offset;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t axis = 0; axis < sizes.size(); ++axis) last += (sizes[axis] - 1) * strides[axis];
  const int64_t found = tensor.storage().bytes, needed = (last + 1) * tensor.element_size();
  STD_TORCH_CHECK(found >= needed, name, " has a storage of ", found, " bytes; it must have ", needed,
                  ": it was freed or cut");
}
inline void check_tensor(const char* name, const std::optional<Tensor>& tensor) {
  if (tensor) check_tensor(name, *tensor);
}

// Sums of sizes and steps up to this stay far below the range of int64.
constexpr int64_t farthest = int64_t(1) << 40;

// Checks that a kernel of `kernel` taps, moved by `stride`, has `outputs` positions along an axis of `size`.
inline void check_window(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                         int64_t outputs) {
  STD_TORCH_CHECK(size > 0 && kernel > 0 && stride > 0 && padding >= 0 && dilation > 0,
                  "sizes, kernel_size, stride and dilation must be positive, padding not negative");
  STD_TORCH_CHECK(size <= farthest && stride <= farthest && padding <= farthest && dilation <= farthest / kernel,
                  "size, stride, padding and dilation * kernel_size must be at most 2^40; they are ", size, ", ",
                  stride, ", ", padding, " and ", dilation, " * ", kernel);
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0 && outputs == room / stride + 1,
                  "offset's spatial size does not fit the input, kernel_size, stride, padding and dilation");
}

// An uninitialised tensor of these sizes, of the dtype of another, for an operator to return.
inline Tensor new_result(const Tensor& like, SizesView sizes) {
  return current_host->allocate(sizes, like.scalar_type(), true);
}

// An uninitialised tensor that no operator returns.
inline Tensor new_scratch(SizesView sizes, ScalarType dtype) {
  return current_host->allocate(sizes, dtype, false);
}

// A result of the sizes of another, or a tensor without elements if it is not requested.
inline Tensor empty_like(const Tensor& like, bool asked) {
  return asked ? new_result(like, like.sizes()) : new_scratch(Sizes{0}, like.scalar_type());
}

// Zeros of the sizes of another: a result if they have its dtype, too.
Tensor zeros_like(const Tensor& like, ScalarType dtype);

// Sets all elements of a contiguous tensor to 0.
void set_to_zero(const Tensor& tensor);

// The same tensor if it is contiguous, else a copy that is.
Tensor contiguous(const Tensor& tensor);

// Writes contiguous `sums` to a contiguous tensor of the same sizes and of another dtype.
void write_rounded(const Tensor& sums, const Tensor& result);

// `sums`, contiguous, in another dtype; the same tensor if it has that dtype.
Tensor rounded(const Tensor& sums, ScalarType dtype);

// A tensor whose spatial axes form one run of positions with a fixed stride, copied if necessary.
class Map {
 public:
  // [B, C, *size]
  explicit Map(Tensor tensor) : Map(tensor, 1, 2, static_cast<size_t>(tensor.dim())) {}

  // [B, *size, H, C], with contiguous channels.
  static Map with_heads(const Tensor& tensor) {
    const auto axes = static_cast<size_t>(tensor.dim());
    const bool dense = tensor.sizes()[axes - 1] < 2 || tensor.strides()[axes - 1] == 1;
    Map map(dense ? tensor : contiguous(tensor), axes - 1, 1, axes - 2);
    map.channel_stride = 1;
    map.head_stride = map.tensor_.strides()[axes - 2];
    return map;
  }

  // The field of one head, starting at a position.
  Map of_head(int64_t head, int64_t position) const {
    Map result = *this;
    result.data_ =
        static_cast<char*>(data_) + (head * head_stride + position * position_stride) * tensor_.element_size();
    return result;
  }

  template <typename T>
  T* at(int64_t batch, int64_t channel = 0, int64_t position = 0) const {
    return static_cast<T*>(data_) + batch * batch_stride + channel * channel_stride + position * position_stride;
  }

  ScalarType dtype() const { return dtype_; }

  int64_t positions = 1, batch_stride, channel_stride, position_stride = 0, head_stride = 0;

 private:
  Map(Tensor tensor, size_t channel_axis, size_t first, size_t last) : tensor_(std::move(tensor)) {
    if (!collapses(first, last)) tensor_ = contiguous(tensor_);
    data_ = tensor_.data_ptr();
    dtype_ = tensor_.scalar_type();
    const auto sizes = tensor_.sizes();
    const auto strides = tensor_.strides();
    batch_stride = strides[0];
    channel_stride = strides[channel_axis];
    for (size_t axis = last; axis-- > first;) {
      positions *= sizes[axis];
      if (sizes[axis] != 1 && position_stride == 0) position_stride = strides[axis];
    }
  }

  bool collapses(size_t first, size_t last) const {
    const auto sizes = tensor_.sizes();
    const auto strides = tensor_.strides();
    int64_t expected = -1;
    for (size_t axis = last; axis-- > first;) {
      if (sizes[axis] == 1) continue;
      if (expected >= 0 && strides[axis] != expected) return false;
      expected = strides[axis] * sizes[axis];
    }
    return true;
  }

  Tensor tensor_;
  void* data_;
  ScalarType dtype_;
};

// `count` elements of a Map of any dtype, as A.
template <typename A>
void read_run(const Map& map, int64_t batch, int64_t channel, int64_t position, int64_t count, A* out);

// The same of elements whose dtype is T's.
template <typename T>
void copy_run(const Map& map, int64_t batch, int64_t channel, int64_t position, int64_t count, T* out) {
  const T* const source = map.at<T>(batch, channel, position);
  const int64_t stride = map.position_stride;
  if (stride == 1) {
    std::copy_n(source, count, out);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = source[i * stride];
  }
}

// Prefetches a run that is read later. Such functions are always inlined: GCC 12 takes one that does nothing but
// prefetch for one without any effect, and leaves out its calls.
__attribute__((always_inline)) inline void ask_for_run(const Map& map, int64_t batch, int64_t channel, int64_t position,
                                                       int64_t count) {
  if (map.position_stride != 1) return;
  const int64_t element = bytes_of(map.dtype());
  const char* const source =
      map.at<char>(0) + (batch * map.batch_stride + channel * map.channel_stride + position) * element;
  for (int64_t i = 0; i < count * element; i += 64) __builtin_prefetch(source + i);
}

// Like read_run(), but uses `buffer` only if the elements need a conversion or a copy.
template <typename A>
const A* view_run(const Map& map, int64_t batch, int64_t channel, int64_t position, int64_t count, A* buffer) {
  if (map.dtype() == sum_dtype_of<A> && (map.position_stride == 1 || count == 1))
    return map.at<A>(batch, channel, position);
  read_run(map, batch, channel, position, count, buffer);
  return buffer;
}

// A contiguous tensor of any dtype to which runs of A are written.
class Sink {
 public:
  explicit Sink(const Tensor& tensor) : data_(tensor.data_ptr()), dtype_(tensor.scalar_type()) {}

  // Stores `count` values from element `at` on, or adds them if `add`.
  template <typename A>
  void write(int64_t at, const A* values, int64_t count, bool add = false) const;

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  ScalarType dtype() const { return dtype_; }

 private:
  void* data_;
  ScalarType dtype_;
};

}  // namespace deformkit
