// A call of a kernel by ONNX Runtime: its inputs become ours, without a copy, and the result is written into its
// output.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "hosts/onnxruntime/api.h"
#include "hosts/onnxruntime/schema.h"

namespace deformkit::ort {

// Raises the error that the runtime reports, if there is one.
inline void check(const Api& api, Status* status, const std::string& about = "") {
  if (!status) return;
  const std::string text = about + message_of(api, status);
  release_status(api, status);
  throw std::runtime_error(text);
}

// A dtype as the runtime, as kernels and as people know it.
struct Known {
  Dtype dtype;
  ScalarType ours;
  const char* name;
};
constexpr Known dtypes[] = {
    {float16, ScalarType::Half, "float16"},
    {bfloat16, ScalarType::BFloat16, "bfloat16"},
    {float32, ScalarType::Float, "float32"},
    {float64, ScalarType::Double, "float64"},
    {int64, ScalarType::Long, "int64"},
    {undefined, ScalarType::Undefined, "of another dtype"},  // Kernels refuse it.
};

// Of the dtypes, the one for which f is true, or the last.
template <typename F>
const Known& known_dtype(const F& f) {
  return *std::find_if(std::begin(dtypes), std::end(dtypes) - 1, f);
}

inline Tensor tensor_of(const Api& api, const std::string& name, const Value* value) {
  Shape* shape = nullptr;
  check(api, shape_of(api, value, &shape));
  const auto release = [&api](Shape* held) { release_shape(api, held); };
  const std::unique_ptr<Shape, decltype(release)> held(shape, release);
  Dtype dtype = undefined;
  size_t axes = 0;
  check(api, dtype_of(api, shape, &dtype));
  check(api, axes_of(api, shape, &axes));
  STD_TORCH_CHECK(axes <= Tensor::most_axes, name, " has ", axes, " axes; it must have at most ", Tensor::most_axes);
  Sizes sizes(axes);
  check(api, ort::sizes_of(api, shape, sizes.data(), axes));
  void* data = nullptr;
  check(api, data_of(api, const_cast<Value*>(value), &data));
  return {data, known_dtype([&](const Known& known) { return known.dtype == dtype; }).ours, sizes, nullptr};
}

class OrtHost final : public Host {
 public:
  OrtHost(const Api& api, Context* context) : api_(api), context_(context) {}

  Tensor allocate(SizesView sizes, ScalarType dtype, bool result) override {
    if (result && !output_) {
      check(api_, output(api_, context_, 0, sizes.data(), sizes.size(), &output_));
      void* data = nullptr;
      check(api_, data_of(api_, output_, &data));
      return result_ = Tensor(data, dtype, sizes, nullptr);
    }
    const Tensor described(nullptr, dtype, sizes, nullptr);
    const auto memory = std::make_shared<Buffer<char>>(described.storage().bytes);
    return {memory->get(), dtype, sizes, memory};
  }

  void parallel(int64_t most, void (*work)(void* data), void* data) override {
    // The runtime has a number of threads that it does not tell; a call for which it has none follows another.
    static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    const auto calls = static_cast<size_t>(std::min(most, processors));
    if (calls < 2) return work(data);
    std::pair<void (*)(void*), void*> given(work, data);
    const auto call = [](void* both, size_t) {
      const auto& [each, its_data] = *static_cast<decltype(given)*>(both);
      each(its_data);
    };
    check(api_, parallel_for(api_, context_, call, calls, calls, &given));
  }

  // Raises unless an operator returned what it has written into the output.
  void check_result(const Tensor& result) const {
    STD_TORCH_CHECK(
        output_ && result.data_ptr() == result_.data_ptr() && std::ranges::equal(result.sizes(), result_.sizes()),
        "the kernel returned another tensor than its result");
  }

 private:
  const Api& api_;
  Context* const context_;
  Value* output_ = nullptr;
  Tensor result_;
};

// The value of an attribute, of the type that the operator takes.
using Attribute = std::variant<Sizes, int64_t, float>;

// The inputs and attributes of a call, in the order of the schema.
class Given {
 public:
  Given(const Api& api, const Context* context, const Schema& schema, const std::vector<Attribute>& attributes)
      : schema_(schema), attributes_(attributes) {
    size_t count = 0, index = 0;
    check(api, input_count(api, context, &count));
    inputs_.resize(schema.arguments.size());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (!schema.arguments[i].input || index++ >= count) continue;
      const Value* value = nullptr;
      check(api, input(api, context, index - 1, &value));
      if (value) inputs_[i] = tensor_of(api, schema.arguments[i].name, value);
    }
  }

  template <typename T>
  std::remove_cvref_t<T> get(size_t i) const {
    using Own = std::remove_cvref_t<T>;
    if constexpr (std::is_same_v<Own, Maybe>) return inputs_[i];
    if constexpr (std::is_same_v<Own, Tensor>) return present(i);
    if constexpr (std::is_same_v<Own, Sizes>)
      return schema_.arguments[i].input ? sizes_in(i) : std::get<Sizes>(attributes_[i]);
    if constexpr (std::is_same_v<Own, double>) return std::get<float>(attributes_[i]);
    if constexpr (std::is_same_v<Own, int64_t>) return std::get<int64_t>(attributes_[i]);
    if constexpr (std::is_same_v<Own, bool>) return std::get<int64_t>(attributes_[i]) != 0;
  }

  // What was given, for the text of an error.
  std::string text() const {
    std::ostringstream out;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      out << (i ? ", " : "") << schema_.arguments[i].name << " ";
      if (schema_.arguments[i].input) {
        if (inputs_[i]) {
          const ScalarType dtype = inputs_[i]->scalar_type();
          list(out << known_dtype([&](const Known& known) { return known.ours == dtype; }).name << " ",
               inputs_[i]->sizes());
        } else {
          out << "absent";
        }
      } else if (const Sizes* const values = std::get_if<Sizes>(&attributes_[i])) {
        list(out, *values);
      } else if (const float* const number = std::get_if<float>(&attributes_[i])) {
        out << *number;
      } else {
        out << std::get<int64_t>(attributes_[i]);
      }
    }
    return out.str();
  }

 private:
  const Tensor& present(size_t i) const {
    if (!inputs_[i]) throw std::runtime_error("the input " + schema_.arguments[i].name + " is absent");
    return *inputs_[i];
  }

  Sizes sizes_in(size_t i) const {
    const Tensor& tensor = present(i);
    if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1)
      throw std::runtime_error(schema_.arguments[i].name + " must be int64 with 1 axis");
    const auto* const data = static_cast<const int64_t*>(tensor.data_ptr());
    return {data, data + tensor.numel()};
  }

  static void list(std::ostream& out, SizesView values) {
    out << "[";
    for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
    out << "]";
  }

  const Schema& schema_;
  const std::vector<Attribute>& attributes_;
  std::vector<Maybe> inputs_;
};

}  // namespace deformkit::ort
