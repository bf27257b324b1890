// The loop over memory of every rule and dtype, as a table of functions: what a
// library for one instruction set exports.
#pragma once

#include <cstdint>

#include "rules/table.h"

namespace wdops::cpu {

// Steps `n` elements of one variable in place. `step` is a Step<Rule,
// Compute<T>> made by RuleInfo::make_step; the arrays hold n elements each and
// do not overlap.
using Sweep = void (*)(const void* step, int64_t n, void* param,
                       const void* grad, void* const* slots);

using SweepPerDType = std::array<Sweep, kDTypeCount>;

struct Kernels {
  const char* isa;
  std::array<SweepPerDType, kRuleCount> sweep;
};

}  // namespace wdops::cpu

extern "C" __attribute__((visibility("default"))) const wdops::cpu::Kernels*
wdops_cpu_kernels();
