// An operator as ONNX Runtime knows it, for values of one dtype.
#pragma once

#include <utility>

#include "hosts/onnxruntime/call.h"

namespace deformkit::ort {

// The attribute of an argument of type T; none if it is an input.
template <typename T>
Attribute attribute_of(const Api& api, const Info* info, const Argument& argument, const std::string& operator_name) {
  using Own = std::remove_cvref_t<T>;
  const char* const name = argument.name.c_str();
  const std::string about = operator_name + ": the attribute " + argument.name + ": ";
  if (argument.input) return {};
  if constexpr (std::is_same_v<Own, Sizes>) {
    size_t count = 0;
    check(api, ints_attribute(api, info, name, nullptr, &count), about);
    Sizes values(count);
    if (count > 0) check(api, ints_attribute(api, info, name, values.data(), &count), about);
    return values;
  } else if constexpr (std::is_same_v<Own, double>) {
    float value = 0;
    check(api, float_attribute(api, info, name, &value), about);
    return value;
  } else {
    int64_t value = 0;
    check(api, int_attribute(api, info, name, &value), about);
    return value;
  }
}

// What the operators of all names and types have in common.
struct Declared : Operator {
  const Schema* schema;
  std::vector<size_t> inputs_at;  // the arguments that are inputs
  Dtype dtype;

  static const Declared& of(const Operator* self) { return *static_cast<const Declared*>(self); }

  Declared(const Schema& schema_, Dtype dtype_) : Operator{}, schema(&schema_), dtype(dtype_) {
    for (size_t i = 0; i < schema->arguments.size(); ++i)
      if (schema->arguments[i].input) inputs_at.push_back(i);
    version = ort::version;
    name = [](const Operator* self) { return of(self).schema->name.c_str(); };
    provider = [](const Operator*) -> const char* { return nullptr; };
    // The first input and the output have the dtype of the values; the kernels check that of the other inputs.
    input_dtype = [](const Operator* self, size_t index) { return index == 0 ? of(self).dtype : undefined; };
    output_dtype = [](const Operator* self, size_t) { return of(self).dtype; };
    inputs = [](const Operator* self) { return of(self).inputs_at.size(); };
    outputs = [](const Operator*) -> size_t { return 1; };
    input_characteristic = [](const Operator* self, size_t index) {
      return of(self).schema->arguments[of(self).inputs_at[index]].optional ? optional : required;
    };
    output_characteristic = [](const Operator*, size_t) { return required; };
    input_memory = [](const Operator*, size_t) { return 0; };
    variadic_input_least = variadic_output_least = [](const Operator*) { return 1; };
    variadic_input_alike = variadic_output_alike = [](const Operator*) { return 1; };
  }
};

// The status of what f() does: no exception leaves the library.
template <typename F>
Status* guarded(const Api& api, const F& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    return create_status(api, fail, error.what());
  } catch (...) {
    return create_status(api, fail, "deformkit: unknown error");
  }
}

// The text of a check that failed, without the place in the source, "function, file:line, ", before it.
inline std::string reason_of(const std::exception& error) {
  const std::string text = error.what();
  const size_t file = text.find(", deformkit/"), end = text.find(", ", file + 1);
  return file == text.npos || end == text.npos ? text : text.substr(end + 2);
}

// What f() returns; the reason of its error becomes text(reason).
template <typename F, typename G>
auto explained(const F& f, const G& text) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    throw std::runtime_error(text(reason_of(error)));
  }
}

template <auto entry>
struct Defined;
template <typename... Args, Entry<Tensor(Args...)> Kernels::* entry>
struct Defined<entry> : Declared {
  struct Kernel {
    const Api& api;
    const Schema& schema;
    const Kernels& kernels;
    std::vector<Attribute> attributes;
  };

  const Kernels* kernels;

  Defined(const Schema& schema_, Dtype dtype_, const Kernels& kernels_)
      : Declared(schema_, dtype_), kernels(&kernels_) {
    create_or_fail = &create_kernel;
    compute_or_fail = &compute_output;
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static Status* create_kernel(const Operator* self, const Api* api, const Info* info, void** kernel) noexcept {
    return guarded(*api, [&] {
      const auto& own = *static_cast<const Defined*>(self);
      *kernel = [&]<size_t... i>(std::index_sequence<i...>) {
        const auto& arguments = own.schema->arguments;
        const std::string name = "deformkit." + own.schema->name;
        return new Kernel{*api, *own.schema, *own.kernels, {attribute_of<Args>(*api, info, arguments[i], name)...}};
      }(std::index_sequence_for<Args...>());
    });
  }

  static Status* compute_output(void* kernel, Context* context) noexcept {
    const Kernel& own = *static_cast<const Kernel*>(kernel);
    return guarded(own.api, [&] {
      const auto named = [&](const std::string& reason) { return "deformkit." + own.schema.name + ": " + reason; };
      const Given given = explained([&] { return Given(own.api, context, own.schema, own.attributes); }, named);
      explained(
          [&] {
            OrtHost host(own.api, context);
            [&]<size_t... i>(std::index_sequence<i...>) {
              host.check_result((own.kernels.*entry).call(host, given.get<Args>(i)...));
            }(std::index_sequence_for<Args...>());
          },
          [&](const std::string& reason) { return named(reason + "; the call: " + given.text()); });
    });
  }
};

}  // namespace deformkit::ort
