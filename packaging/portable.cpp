// What a recent GCC would take from a newer C or C++ library than the wheel's name promises, defined here instead. With
// it a library of kernels needs no more than what manylinux_2_28 has.
#include <cstring>
#include <exception>
#include <new>
#include <sstream>

extern "C" {
// glibc 2.32. False is always right: reference counts are then changed atomically.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

// The copy and the end of an exception_ptr, as every C++ library since GCC 4.4 exports them.
extern "C" {
void deformkit_copy_exception(void* copy, const void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void deformkit_release_exception(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
}

namespace std {
// CXXABI_1.3.13. A copy that never ends holds on to the exception, and the end of a copy that was not counted lets go.
namespace __exception_ptr {
void exception_ptr::_M_addref() noexcept {
  void* copy;
  deformkit_copy_exception(&copy, this);
}
void exception_ptr::_M_release() noexcept {
  void* copy;
  memcpy(&copy, this, sizeof copy);
  memset(static_cast<void*>(this), 0, sizeof copy);
  deformkit_release_exception(&copy);
}
}  // namespace __exception_ptr

// GLIBCXX_3.4.29.
[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}

// GLIBCXX_3.4.26 and 3.4.29: torch's headers build the texts of errors with streams.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
template basic_string<char> basic_stringbuf<char>::str() const&;
template basic_string<char> basic_stringbuf<char>::str() &&;
}  // namespace std
