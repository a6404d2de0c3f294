// Huge pages for large memory.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace deformkit {

// Asks the system for huge pages where memory is written for the first time. The C library takes large memory from the
// system and gives it back, so that every call would wait for thousands of small pages. Memory of less than twice a
// huge page is left alone.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t page = 2 << 20;
  if (bytes < 2 * page) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace deformkit
