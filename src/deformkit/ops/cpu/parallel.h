// Work and memory inside a kernel.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu/pages.h"
#include "cpu/tensor.h"

namespace deformkit {

constexpr int64_t mib = 1 << 20;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The progress of each item of work, for items that add to the results of the item before.
class Turns {
 public:
  explicit Turns(int64_t items) : done_(items) {}

  // Returns when item - 1 has finished this step, or when the work has failed. Items are handed out in order, and only
  // to threads that have their scratch, so that the item before has begun.
  void wait(int64_t item, int64_t step) const {
    while (done_[item - 1].load(std::memory_order_acquire) <= step && !failed_.load(std::memory_order_relaxed))
      std::this_thread::yield();
  }
  void finish(int64_t item, int64_t step) { done_[item].store(step + 1, std::memory_order_release); }
  void fail() { failed_.store(true, std::memory_order_relaxed); }

 private:
  std::vector<std::atomic<int64_t>> done_;
  std::atomic<bool> failed_{false};
};

// How much a call does, in elements that it reads and multiplies. One that does little, some 60 microseconds on one
// thread, stays on the thread that makes it: the others may be asleep, or their processors busy, and then it would wait
// for them a hundred times as long. From there on two idle threads are a fifth quicker than one: `deformkit bench --op
// deform_sample --shape 8x3x32x32`, with `--threads` 1 and 2, measures it. A test of what threads do sets the
// environment variable, or its small calls would prove nothing.
class Work {
 public:
  inline static const double little = std::getenv("DEFORMKIT_SPREAD_SMALL_CALLS") ? -1.0 : 3e5;

  explicit Work(double elements) : before_(is_little_) { is_little_ = elements <= little; }
  ~Work() { is_little_ = before_; }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  // Of what is done in the innermost scope of this thread.
  static bool is_little() { return is_little_; }

 private:
  inline static constinit thread_local bool is_little_ = false;
  const bool before_;
};

// Runs f(scratch, 0) ... f(scratch, items - 1) on the host's threads, with one scratch = make() for each. What an item
// computes must not depend on the thread: work is divided by shape, so that results are bit-identical for any number of
// threads. The first exception ends the work, releases waiting threads, and is thrown again.
template <typename M, typename F>
void each(int64_t items, const M& make, const F& f, Turns* turns = nullptr) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  auto work = [&] {
    // A host's threads would lose the text of an exception.
    try {
      if (next.load() >= items) return;
      auto scratch = make();
      for (int64_t item; !failed && (item = next++) < items;) f(scratch, item);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
      if (turns) turns->fail();
    }
  };
  const int64_t most = Work::is_little() ? std::min<int64_t>(items, 1) : items;
  if (most > 0) current_host->parallel(most, [](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work);
  if (failure) std::rethrow_exception(failure);
}

template <typename F>
void each(int64_t items, const F& f) {
  each(items, [] { return 0; }, [&](int, int64_t item) { f(item); });
}

// A failed allocation; Python raises it as a MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) {
    std::snprintf(text_, sizeof text_, "deformkit could not allocate %zu bytes of scratch memory", bytes);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

// Uninitialised memory on a cache-line boundary. It is aligned here: an allocator finds what it has freed for a request
// of the same size, but not always for one that it has to align, and memory would grow.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    constexpr size_t line = 64;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 2 * line;
    memory_.reset(::operator new(bytes, std::nothrow));
    if (!memory_) throw OutOfMemory(bytes);
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + line - 1) / line * line);
    ask_for_huge_pages(memory_.get(), bytes);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  T* data_ = nullptr;
};

}  // namespace deformkit
