// Loaded before all else, this makes one chosen allocation of deformkit's libraries fail; those of others it leaves
// alone.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> chosen{-1}, seen{0};  // the number of the allocation, from 1 on; 0 counts alone, -1 does nothing

bool fails(void* caller) {
  if (chosen < 0) return false;
  Dl_info info;
  if (!dladdr(caller, &info) || !info.dli_fname) return false;
  const char* const slash = std::strrchr(info.dli_fname, '/');
  if (!std::strstr(slash ? slash : info.dli_fname, "deformkit")) return false;
  return ++seen == chosen;
}

void* allocate(std::size_t size) {
  return std::malloc(size ? size : 1);
}

}  // namespace

extern "C" void choose_failing_allocation(long number) {
  chosen = number;
  seen = 0;
}

extern "C" long allocations_seen() {
  return seen;
}

void* operator new(std::size_t size) {
  void* const memory = fails(__builtin_return_address(0)) ? nullptr : allocate(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return fails(__builtin_return_address(0)) ? nullptr : allocate(size);
}

void operator delete(void* memory) noexcept {
  std::free(memory);
}

void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
