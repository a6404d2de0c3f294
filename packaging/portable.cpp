// Symbols that a recent GCC takes from a newer C and C++ library than the wheel's name promises. With these definitions
// inside, the library of kernels needs no more than what manylinux_2_28 has.
#include <new>

extern "C" {
// glibc 2.32. False is always right: reference counts are then changed atomically.
extern const char __libc_single_threaded;
const char __libc_single_threaded = 0;
}

namespace std {
// GLIBCXX_3.4.29.
[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
