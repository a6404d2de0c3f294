// Loaded by ONNX Runtime in the place of the library LIBRARY, this puts itself before the runtime's parallel_for and
// tells ThreadSanitizer of the order that it makes: what the caller did precedes the work, and the work precedes what
// follows the call. The runtime is not compiled for ThreadSanitizer, which does not see how its threads wait.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "hosts/onnxruntime/api.h"

extern "C" {
void __tsan_acquire(void* place);
void __tsan_release(void* place);
}

namespace {

using namespace deformkit::ort;
using Work = void (*)(void* data, size_t index);
using ParallelFor = Status* (*)(const Context*, Work, size_t total, size_t batches, void* data);

ParallelFor original = nullptr;

struct Region {
  Work work;
  void* data;
};

// Two places, because the end of a part of the work does not precede the start of another.
void run(void* its_region, size_t index) {
  auto& region = *static_cast<Region*>(its_region);
  __tsan_acquire(&region.work);
  region.work(region.data, index);
  __tsan_release(&region.data);
}

Status* ordered(const Context* context, Work work, size_t total, size_t batches, void* data) {
  Region region{work, data};
  __tsan_release(&region.work);
  Status* const status = original(context, run, total, batches, &region);
  __tsan_acquire(&region.data);
  return status;
}

[[noreturn]] void stop(const char* reason) {
  std::fprintf(stderr, "onnxruntime_order: %s\n", reason);
  std::abort();
}

// The table is constant, and the runtime hands the same one to every kernel.
void replace(const Api& api) {
  auto& slot = const_cast<void*&>(api.functions[274]);
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  void* const start = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(&slot) / page * page);
  if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0) stop("the runtime's table cannot be changed");
  original = reinterpret_cast<ParallelFor>(std::exchange(slot, reinterpret_cast<void*>(ordered)));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(Options* options, const Base* base) {
  static const auto registered = [&] {
    const Api* const api = base->api(version);
    if (!api) stop("the runtime is too old");
    replace(*api);
    void* const library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library) stop(dlerror());
    return reinterpret_cast<Status* (*)(Options*, const Base*)>(dlsym(library, "RegisterCustomOps"));
  }();
  return registered(options, base);
}
