// The part of ONNX Runtime's C interface that the library uses, of version 17 or later. The runtime hands over a table
// of functions to which versions only append; a function is known by its place in that table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deformkit::ort {

struct Context;         // of one call of a kernel
struct Domain;          // a set of operators
struct Info;            // of a node, when its kernel is created
struct Options;         // of a session
struct Shape;           // the dtype and the sizes of a value
struct Status;          // an error; null if there is none
struct Value;           // an input or an output
struct ShapeInference;  // unused

enum Code : int { fail = 1 };
enum Dtype : int { undefined = 0, float32 = 1, int64 = 7, float16 = 10, float64 = 11, bfloat16 = 16 };
enum Characteristic : int { required = 0, optional = 1 };

constexpr uint32_t version = 17;

// The table, of which functions are taken by their place.
struct Api {
  void* functions[275];
};

// A function of the table.
template <size_t place, typename F>
struct Function;
template <size_t place, typename R, typename... Args>
struct Function<place, R(Args...)> {
  static_assert(place < sizeof(Api) / sizeof(void*));

  R operator()(const Api& api, Args... args) const {
    return reinterpret_cast<R (*)(Args...)>(api.functions[place])(args...);
  }
};

constexpr Function<0, Status*(Code, const char* message)> create_status;
constexpr Function<2, const char*(const Status*)> message_of;
constexpr Function<26, Status*(const char* name, Domain** out)> create_domain;
constexpr Function<27, Status*(Domain*, const struct Operator*)> add_operator;
constexpr Function<28, Status*(Options*, Domain*)> add_domain;
constexpr Function<51, Status*(Value*, void** out)> data_of;
constexpr Function<60, Status*(const Shape*, Dtype* out)> dtype_of;
constexpr Function<61, Status*(const Shape*, size_t* out)> axes_of;
constexpr Function<62, Status*(const Shape*, int64_t* out, size_t axes)> sizes_of;
constexpr Function<65, Status*(const Value*, Shape** out)> shape_of;
constexpr Function<85, Status*(const Info*, const char* name, float* out)> float_attribute;
constexpr Function<86, Status*(const Info*, const char* name, int64_t* out)> int_attribute;
constexpr Function<88, Status*(const Context*, size_t* out)> input_count;
constexpr Function<90, Status*(const Context*, size_t index, const Value** out)> input;
constexpr Function<91, Status*(Context*, size_t index, const int64_t* sizes, size_t axes, Value** out)> output;
constexpr Function<93, void(Status*)> release_status;
constexpr Function<99, void(Shape*)> release_shape;
constexpr Function<163, Status*(const Info*, const char* name, int64_t* out, size_t* count)> ints_attribute;
constexpr Function<274, Status*(const Context*, void (*work)(void* data, size_t index), size_t total, size_t batches,
                                void* data)>
    parallel_for;

// What a library declares of an operator.
struct Operator {
  uint32_t version;
  void* (*create)(const Operator*, const Api*, const Info*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  Dtype (*input_dtype)(const Operator*, size_t index);
  size_t (*inputs)(const Operator*);
  Dtype (*output_dtype)(const Operator*, size_t index);
  size_t (*outputs)(const Operator*);
  void (*compute)(void* kernel, Context*);
  void (*destroy)(void* kernel);
  Characteristic (*input_characteristic)(const Operator*, size_t index);
  Characteristic (*output_characteristic)(const Operator*, size_t index);
  int (*input_memory)(const Operator*, size_t index);
  int (*variadic_input_least)(const Operator*);
  int (*variadic_input_alike)(const Operator*);
  int (*variadic_output_least)(const Operator*);
  int (*variadic_output_alike)(const Operator*);
  Status* (*create_or_fail)(const Operator*, const Api*, const Info*, void** kernel);
  Status* (*compute_or_fail)(void* kernel, Context*);
  Status* (*infer_shapes)(const Operator*, ShapeInference*);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
  // A runtime of version 18 or later knows these.
  size_t (*may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int* inputs, int* outputs);
  size_t (*aliases)(int** inputs, int** outputs);
  void (*release_aliases)(int* inputs, int* outputs);
};

// What the runtime gives a library that it loads: the table of a version, or null if the runtime is older.
struct Base {
  const Api* (*api)(uint32_t version);
  const char* (*version_string)();
};

}  // namespace deformkit::ort
