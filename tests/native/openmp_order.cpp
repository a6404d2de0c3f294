// Loaded before all else, this tells ThreadSanitizer of the order that OpenMP's parallel regions make: what a thread
// did before a region precedes the region, and the region precedes what follows it. libgomp waits with system calls,
// which ThreadSanitizer does not see.
#include <dlfcn.h>

extern "C" {

void __tsan_acquire(void* place);
void __tsan_release(void* place);

using Body = void (*)(void*);

struct Region {
  Body body;
  void* data;
};

static void run(void* region) {
  __tsan_acquire(region);
  const auto [body, data] = *static_cast<Region*>(region);
  body(data);
  __tsan_release(region);
}

__attribute__((visibility("default"))) void GOMP_parallel(Body body, void* data, unsigned threads, unsigned flags) {
  static const auto parallel =
      reinterpret_cast<void (*)(Body, void*, unsigned, unsigned)>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data};
  __tsan_release(&region);
  parallel(run, &region, threads, flags);
  __tsan_acquire(&region);
}
}
