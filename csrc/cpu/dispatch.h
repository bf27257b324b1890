// The instruction sets whose kernels this machine can run, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/sweep.h"

namespace wdops::cpu {

#define WDOPS_PUBLIC __attribute__((visibility("default")))

// Best first; never empty where the package is whole.
WDOPS_PUBLIC std::vector<std::string> AvailableIsas();

// Makes `isa` the one in use, in every thread from its next sweep on. Throws
// std::invalid_argument if it is not available, and then changes nothing.
WDOPS_PUBLIC void UseIsa(const std::string& isa);

// The kernels in use; null before the first UseIsa.
WDOPS_PUBLIC const Kernels* ActiveKernels();

}  // namespace wdops::cpu
