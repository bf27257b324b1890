// The loops over memory of every rule and dtype, as tables of functions: what a
// library for one instruction set exports.
#pragma once

#include <cstdint>

#include "rules/sums.h"
#include "rules/table.h"

namespace wdops::cpu {

// One run of one variable, a chunk or less: arrays of n elements that do not
// overlap.
struct Chunk {
  int64_t begin;  // in the variable, in elements
  int64_t n;
  void* param;
  const void* grad;
  void* slot[kMaxSlots];
  // Null where there are none.
  void* accumulator;
  void* average;
};

// Steps a chunk in place. `step` is a Step<Rule, Compute<T>> made by
// RuleInfo::make_step. `penalty`: where not null, gets the sums of the new
// parameter, a: of |param|, or 0 where l1 is; b: of its squares, or 0 where l1
// and l2 are, in the step's type.
using Sweep = void (*)(const void* step, const Chunk&, Sums* penalty);

// Sums over a chunk.
using Sum = Sums (*)(const void* step, const Chunk&);

// a: of the squares of the gradient, with accumulator and penalty where there
// is a param; b and c: with `penalty`, the sums that a Sweep gives, of this
// param; d: in float64 0, or NaN if an element is not finite. `step` is that of
// any rule.
using GradientSum = Sums (*)(const void* step, const Chunk&, bool penalty);

using SweepPerLayout = std::array<Sweep, kLayoutCount>;
using SumPerLayout = std::array<Sum, kLayoutCount>;

struct ActivationKernels;
struct FactoredKernels;
struct StreamKernels;

struct Kernels {
  const char* isa;
  // Whether Fma is an instruction, and not a call of libm for each element.
  bool has_fma;
  std::array<SweepPerLayout, kRuleCount> sweep;
  // Of the squares of the parameter behind its decay, and of the rule's
  // Direction; null where it has none. Writes nothing.
  std::array<SumPerLayout, kRuleCount> trust;
  std::array<GradientSum, kDTypeCount> gradient;
  const std::array<FactoredKernels, kDTypeCount>* factored;
  const ActivationKernels* activations;
  const StreamKernels* streams;
};

}  // namespace wdops::cpu

extern "C" __attribute__((visibility("default"))) const wdops::cpu::Kernels*
wdops_cpu_kernels();
