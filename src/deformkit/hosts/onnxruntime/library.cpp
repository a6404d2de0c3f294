// deformkit_onnxruntime.so: the operators for ONNX Runtime, as nodes of the domain "deformkit". It needs the libraries
// of kernels in its folder, and neither torch nor Python.
#include <deque>
#include <mutex>

#include "hosts/choice.h"
#include "hosts/onnxruntime/operator.h"
#include "hosts/schemas.h"

DEFORMKIT_EXPORT deformkit::ort::Status* RegisterCustomOps(deformkit::ort::Options* options,
                                                           const deformkit::ort::Base* base);

namespace deformkit::ort {
namespace {

const Schema& schema_of(const std::string& name) {
  static const auto& parsed = *new std::vector<Schema>(std::begin(schemas), std::end(schemas));
  for (const Schema& schema : parsed)
    if (schema.name == name) return schema;
  throw std::logic_error("no schema of " + name);
}

// Adds an operator; those that return gradients are for training alone.
template <auto entry>
void add(const Api& api, Domain* domain, const Kernels& kernels, const char* name) {
  if constexpr (requires { typename Defined<entry>::Kernel; }) {
    static auto& all = *new std::deque<Defined<entry>>;
    for (const Dtype dtype : {float32, float16, float64, bfloat16})
      check(api, add_operator(api, domain, &all.emplace_back(schema_of(name), dtype, kernels)));
  }
}

// The operators for the runtime of this table. They exist until the process ends, because sessions refer to them.
Domain* domain_for(const Api& api) {
  static std::mutex mutex;
  static auto& known = *new std::vector<std::pair<const Api*, Domain*>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [its_api, domain] : known)
    if (its_api == &api) return domain;
  const Choice& chosen = choice();
  if (!chosen.kernels) throw std::runtime_error("deformkit finds no kernels for this processor:\n" + chosen.reasons);
  Domain* domain = nullptr;
  check(api, create_domain(api, "deformkit", &domain));
#define DEFORMKIT_ADD(name) add<&Kernels::name>(api, domain, *chosen.kernels, #name);
  DEFORMKIT_OPERATORS(DEFORMKIT_ADD)
#undef DEFORMKIT_ADD
  known.emplace_back(&api, domain);
  return domain;
}

}  // namespace
}  // namespace deformkit::ort

// The runtime calls this when it loads the library for the sessions that are made with these options.
deformkit::ort::Status* RegisterCustomOps(deformkit::ort::Options* options, const deformkit::ort::Base* base) {
  using namespace deformkit::ort;
  const Api* const api = base->api(version);
  if (!api) {
    const std::string text = std::string("deformkit needs ONNX Runtime 1.") + std::to_string(version) +
                             " or later; this is " + base->version_string();
    const Api* const oldest = base->api(1);
    return oldest ? create_status(*oldest, fail, text.c_str()) : nullptr;
  }
  return guarded(*api, [&] { check(*api, add_domain(*api, options, domain_for(*api))); });
}
