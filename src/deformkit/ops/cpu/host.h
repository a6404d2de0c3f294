// What kernels know of the program that calls them: tensors, memory for tensors, and threads. Kernels are linked to no
// framework; whoever loads them is their Host, one for each call.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace deformkit {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

using Sizes = std::vector<int64_t>;
using SizesView = std::span<const int64_t>;

constexpr int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
      return 8;
    default:
      return 1;  // Kernels refuse it.
  }
}

// A view of memory, which it may share.
class Tensor {
 public:
  // No operator takes a tensor with more.
  static constexpr size_t most_axes = 8;

  // The memory that a tensor is in: `bytes` in all, of which the tensor starts at element `offset`.
  struct Storage {
    int64_t bytes, offset;
    bool on_cpu = true;
  };

  Tensor() = default;
  // `data` is the first element of the tensor, which holds on to `owner`.
  Tensor(void* data, ScalarType dtype, SizesView sizes, SizesView strides, Storage storage, std::shared_ptr<void> owner)
      : data_(data), dtype_(dtype), axes_(sizes.size()), storage_(storage), owner_(std::move(owner)) {
    STD_TORCH_CHECK(sizes.size() <= most_axes && sizes.size() == strides.size(), "a tensor has ", sizes.size(),
                    " axes; it must have at most ", most_axes);
    std::copy(sizes.begin(), sizes.end(), sizes_.begin());
    std::copy(strides.begin(), strides.end(), strides_.begin());
    for (const int64_t size : sizes)
      STD_TORCH_CHECK(!__builtin_mul_overflow(elements_, size, &elements_), "a tensor has more than 2^63 elements");
  }
  // Contiguous, in memory of its own size.
  Tensor(void* data, ScalarType dtype, SizesView sizes, std::shared_ptr<void> owner)
      : Tensor(data, dtype, sizes, contiguous_strides(sizes), {}, std::move(owner)) {
    storage_.bytes = elements_ * element_size();
  }

  int64_t dim() const { return static_cast<int64_t>(axes_); }
  SizesView sizes() const { return {sizes_.data(), axes_}; }
  SizesView strides() const { return {strides_.data(), axes_}; }
  int64_t size(size_t axis) const { return sizes_[axis]; }
  int64_t numel() const { return elements_; }
  ScalarType scalar_type() const { return dtype_; }
  int64_t element_size() const { return bytes_of(dtype_); }
  void* data_ptr() const { return data_; }
  const Storage& storage() const { return storage_; }
  const std::shared_ptr<void>& owner() const { return owner_; }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t axis = axes_; axis-- > 0; expected *= sizes_[axis])
      if (sizes_[axis] != 1 && strides_[axis] != expected) return elements_ == 0;
    return true;
  }

 private:
  static Sizes contiguous_strides(SizesView sizes) {
    Sizes strides(sizes.size());
    uint64_t stride = 1;
    for (size_t axis = sizes.size(); axis-- > 0; stride *= std::max<uint64_t>(sizes[axis], 1))
      strides[axis] = static_cast<int64_t>(stride);
    return strides;
  }

  void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  size_t axes_ = 0;
  int64_t elements_ = 1;
  std::array<int64_t, most_axes> sizes_{}, strides_{};
  Storage storage_{};
  std::shared_ptr<void> owner_;
};

// What a call needs of the program that makes it.
class Host {
 public:
  // A contiguous tensor whose elements may be anything. `result`: an operator returns it, and has no other such tensor
  // for the same result.
  virtual Tensor allocate(SizesView sizes, ScalarType dtype, bool result) = 0;

  // Calls work(data) at most `most` times, on as many threads as there are, and returns when all calls have returned. A
  // call that has begun is not interrupted by another; calls may also follow one another.
  virtual void parallel(int64_t most, void (*work)(void* data), void* data) = 0;

 protected:
  ~Host() = default;
};

// Of the call that this thread is in.
inline constinit thread_local Host* current_host = nullptr;

// Makes `host` that of the calls in a scope.
class Guest {
 public:
  explicit Guest(Host& host) : before_(current_host) { current_host = &host; }
  ~Guest() { current_host = before_; }
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

 private:
  Host* const before_;
};

}  // namespace deformkit
