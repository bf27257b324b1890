// The loops over memory of every rule and dtype, as tables of functions: what a
// library for one instruction set exports.
#pragma once

#include <cstdint>

#include "rules/table.h"

namespace wdops::cpu {

// Elements of one variable that are swept at a time, the last time fewer: 28
// bytes each for Adam in f32 make half of a usual L2. Sums are made over each
// chunk and then over the chunks in their order, so that they depend on neither
// threads nor instruction set.
inline constexpr int64_t kChunk = 16384;

// How many of `size` hold n.
inline int64_t Ceil(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline int64_t Chunks(int64_t n) { return Ceil(n, kChunk); }

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
// RuleInfo::make_step.
using Sweep = void (*)(const void* step, const Chunk&);

// Up to four sums over a chunk.
struct Sums {
  double a = 0, b = 0, c = 0, d = 0;

  Sums& operator+=(const Sums& other) {
    a += other.a, b += other.b, c += other.c, d += other.d;
    return *this;
  }
};
using Sum = Sums (*)(const void* step, const Chunk&);

// LAMB's ratio, of the sums that Kernels::trust gives.
inline double TrustRatio(const Sums& sums) {
  return sums.a > 0 && sums.b > 0 ? std::sqrt(sums.a / sums.b) : 1;
}

// Whether every element was finite whose sums Kernels::gradient gives.
inline bool IsFinite(const Sums& sums, DType dtype) {
  return dtype == k_float64 ? sums.d == 0 : std::isfinite(sums.a);
}

using SweepPerLayout = std::array<Sweep, kLayoutCount>;
using SumPerLayout = std::array<Sum, kLayoutCount>;

struct ActivationKernels;
struct FactoredKernels;
struct StreamKernels;

struct Kernels {
  const char* isa;
  std::array<SweepPerLayout, kRuleCount> sweep;
  // Of the squares of the parameter behind its decay, and of the rule's
  // Direction; null where it has none. Writes nothing.
  std::array<SumPerLayout, kRuleCount> trust;
  // a: of the squares of the gradient, with accumulator and penalty where there
  // is a param; b and c: the sums of `penalty`, where there is one; d: in
  // float64 0, or NaN if an element is not finite. `step` is that of any rule.
  // Per dtype.
  std::array<Sum, kDTypeCount> gradient;
  // a: of |param|, b: of its squares. `step` is l1, a double: if it is 0, so is
  // a. Per dtype.
  std::array<Sum, kDTypeCount> penalty;
  const std::array<FactoredKernels, kDTypeCount>* factored;
  const ActivationKernels* activations;
  const StreamKernels* streams;
};

}  // namespace wdops::cpu

extern "C" __attribute__((visibility("default"))) const wdops::cpu::Kernels*
wdops_cpu_kernels();
