// The choice of the library of kernels for this processor, among those beside the library that asks.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace deformkit {

// The kernels in use, null without any; the name of their instruction set; and why each other library is not in use:
// lines of "isa: reason".
struct Choice {
  const Kernels* kernels = nullptr;
  std::string isa, reasons;
};

// Loads the kernels when it is called first.
const Choice& choice();

}  // namespace deformkit
