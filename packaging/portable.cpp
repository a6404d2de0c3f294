// What a recent GCC would take from a newer C or C++ library than the wheel's name promises, defined here instead. With
// it a library of kernels needs no more than what manylinux_2_28 has.
#include <new>
#include <sstream>

extern "C" {
// glibc 2.32. False is always right: reference counts are then changed atomically.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {
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
