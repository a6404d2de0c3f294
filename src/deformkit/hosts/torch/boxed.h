// Operators as torch calls them: its tensors become ours, without a copy, and the results are torch's.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"
#include "cpu/pages.h"

namespace deformkit {

using torch::headeronly::IntHeaderOnlyArrayRef;
using TorchTensor = torch::stable::Tensor;

// A view, which the tensor must outlive.
inline Tensor view_of(const TorchTensor& tensor, std::shared_ptr<void> owner = nullptr) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Tensor::Storage storage{0, tensor.storage_offset(), tensor.is_cpu()};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage.bytes));
  return {storage.on_cpu ? tensor.data_ptr() : nullptr,
          tensor.scalar_type(),
          {sizes.data(), sizes.size()},
          {strides.data(), strides.size()},
          storage,
          std::move(owner)};
}

class TorchHost final : public Host {
 public:
  Tensor allocate(SizesView sizes, ScalarType dtype, bool) override {
    auto owner = std::make_shared<TorchTensor>(torch::stable::empty({sizes.data(), sizes.size()}, dtype));
    const Tensor tensor = view_of(*owner, owner);
    ask_for_huge_pages(tensor.data_ptr(), static_cast<uint64_t>(tensor.numel() * tensor.element_size()));
    return tensor;
  }

  void parallel(int64_t most, void (*work)(void* data), void* data) override {
    const int64_t calls = std::min<int64_t>(most, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, calls, 1, [&](int64_t, int64_t) { work(data); });
  }
};

// What torch has for a type of ours.
template <typename T>
struct Foreign {
  using type = T;
};
template <>
struct Foreign<Tensor> {
  using type = TorchTensor;
};
template <>
struct Foreign<const Tensor&> {
  using type = const TorchTensor&;
};
template <>
struct Foreign<const Maybe&> {
  using type = const std::optional<TorchTensor>&;
};
template <typename... T>
struct Foreign<std::tuple<T...>> {
  using type = std::tuple<typename Foreign<T>::type...>;
};

template <typename T>
const T& ours(const T& value) {
  return value;
}
inline Tensor ours(const TorchTensor& tensor) {
  return view_of(tensor);
}
inline Maybe ours(const std::optional<TorchTensor>& tensor) {
  return tensor ? Maybe(view_of(*tensor)) : std::nullopt;
}

inline TorchTensor theirs(const Tensor& result) {
  return *static_cast<const TorchTensor*>(result.owner().get());
}
template <typename... T>
auto theirs(const std::tuple<T...>& results) {
  return std::apply([](const auto&... each) { return std::make_tuple(theirs(each)...); }, results);
}

template <auto entry>
struct Boxed;
template <typename R, typename... Args, Entry<R(Args...)> Kernels::* entry>
struct Boxed<entry> {
  static inline R (*kernel)(Host&, Args...) = nullptr;

  static typename Foreign<R>::type call(typename Foreign<Args>::type... args) {
    TorchHost host;
    return theirs(kernel(host, ours(args)...));
  }

  static void add(torch::stable::detail::StableLibrary& library, const char* name, const Kernels& kernels) {
    kernel = (kernels.*entry).call;
    library.impl(name, TORCH_BOX(&Boxed::call));
  }
};

}  // namespace deformkit
