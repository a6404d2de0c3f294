// Prints the instruction sets that this processor supports, as a list of CMake.
#include <cstdio>

#include "hosts/isas.h"

int main() {
  const char* before = "";
  for (const deformkit::Isa& isa : deformkit::isas()) {
    if (!isa.supported) continue;
    std::printf("%s%s", before, isa.name);
    before = ";";
  }
}
