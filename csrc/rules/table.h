// The tables of rules and dtypes as values: what a caller that meets them by
// name at run time looks up.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "rules/step.h"
// The headers of all rules.
#define RULE(name, Class)
#include "rules/rules.inc"

namespace wdops {

enum DType {
#define DTYPE(name, Type) k_##name,
#include "rules/dtypes.inc"
  kDTypeCount
};

inline constexpr const char* kDTypeNames[] = {
#define DTYPE(name, Type) #name,
#include "rules/dtypes.inc"
};

inline constexpr int kDTypeBytes[] = {
#define DTYPE(name, Type) sizeof(Type),
#include "rules/dtypes.inc"
};

// Room for a Step of any rule, in either type.
struct alignas(16) AnyStep {
  std::byte bytes[256];
};

struct RuleInfo {
  const char* name;
  const char* op;  // of TensorFlow
  Names slots, hypers;
  // Makes the constants of a step, per dtype, from kStepHypers and `hypers` in
  // one array.
  std::array<void (*)(const double* hyper, AnyStep* step), kDTypeCount>
      make_step;
};

template <template <class> class Rule, class S>
void MakeStep(const double* hyper, AnyStep* step) {
  static_assert(sizeof(Step<Rule, S>) <= sizeof(AnyStep));
  new (step->bytes) Step<Rule, S>(hyper);
}

template <template <class> class Rule>
constexpr RuleInfo MakeRuleInfo(const char* name, const char* op) {
  return {name,
          op,
          Rule<float>::kSlots,
          Rule<float>::kHypers,
          {
#define DTYPE(name, Type) &MakeStep<Rule, Compute<Type>>,
#include "rules/dtypes.inc"
          }};
}

inline constexpr RuleInfo kRules[] = {
#define RULE(name, Class) MakeRuleInfo<Class>(#name, "Wdops>Apply" #Class),
#include "rules/rules.inc"
};
inline constexpr int kRuleCount = std::size(kRules);

// The hyperparameters that have a least value, in any rule.
struct Minimum {
  const char* hyper;
  double value;
};
inline constexpr Minimum kMinima[] = {{"l1", 0},           {"l2", 0},
                                      {"weight_decay", 0}, {"proximal_l1", 0},
                                      {"proximal_l2", 0},  {"step", 1}};

// All hyperparameters of a rule, in the order of make_step's array.
inline std::vector<std::string> HyperNames(const RuleInfo& rule) {
  std::vector<std::string> names(kStepHypers.begin(), kStepHypers.end());
  names.insert(names.end(), rule.hypers.begin(), rule.hypers.end());
  return names;
}

inline std::string ToString(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

// What is wrong with the hyperparameters of one variable; empty if nothing is.
inline std::string HyperError(const std::vector<std::string>& names,
                              const double* hyper) {
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string is = names[i] + " is " + ToString(hyper[i]);
    for (const Minimum& minimum : kMinima) {
      if (names[i] == minimum.hyper && !(hyper[i] >= minimum.value)) {
        return is + ", but must be at least " + ToString(minimum.value);
      }
    }
    // A scale that is NaN tells of a gradient that is, and goes where it goes.
    const bool scale = names[i] == "grad_scale" || names[i] == "clip_scale";
    if (!std::isfinite(hyper[i]) && !scale) return is + ", but must be finite";
  }
  if (hyper[0] < 0 && (hyper[6] > 0 || hyper[7] > 0)) {
    return "lr is " + ToString(hyper[0]) +
           ", but must not be negative beside proximal_l1 or proximal_l2";
  }
  return "";
}

}  // namespace wdops
