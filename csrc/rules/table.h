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

struct Layout {
  DType param, slot;
};
inline constexpr Layout kLayouts[] = {
#define LAYOUT(Param, Slot) {k_##Param, k_##Slot},
#include "rules/layouts.inc"
};
inline constexpr int kLayoutCount = std::size(kLayouts);

// The index of a layout; kLayoutCount if there is none.
inline int FindLayout(DType param, DType slot) {
  int layout = 0;
  while (layout < kLayoutCount &&
         (kLayouts[layout].param != param || kLayouts[layout].slot != slot)) {
    ++layout;
  }
  return layout;
}

// The C++ types of the table of dtypes, by its names.
template <DType>
struct Storage;
#define DTYPE(name, Type)    \
  template <>                \
  struct Storage<k_##name> { \
    using type = Type;       \
  };
#include "rules/dtypes.inc"

// Room for a Step of any rule, in either type.
struct alignas(16) AnyStep {
  std::byte bytes[256];
};

struct RuleInfo {
  const char* name;
  const char* op;  // of TensorFlow
  Names slots, hypers;
  // Whether it wants SetTrust before it is swept.
  bool trust;
  // Makes the constants of a step, per dtype, from kStepHypers and `hypers` in
  // one array.
  std::array<void (*)(const double* hyper, StepOptions, AnyStep*), kDTypeCount>
      make_step;
  std::array<void (*)(AnyStep*, double trust), kDTypeCount> set_trust;
};

template <template <class> class Rule, class S>
void MakeStep(const double* hyper, StepOptions options, AnyStep* step) {
  static_assert(sizeof(Step<Rule, S>) <= sizeof(AnyStep));
  new (step->bytes) Step<Rule, S>(hyper, options);
}

template <template <class> class Rule, class S>
void SetTrust(AnyStep* step, double trust) {
  if constexpr (kHasTrust<Rule<S>>) {
    reinterpret_cast<Step<Rule, S>*>(step->bytes)->rule.trust = trust;
  }
}

template <template <class> class Rule>
constexpr RuleInfo MakeRuleInfo(const char* name, const char* op) {
  return {name,
          op,
          Rule<float>::kSlots,
          Rule<float>::kHypers,
          kHasTrust<Rule<float>>,
          {
#define DTYPE(name, Type) &MakeStep<Rule, Compute<Type>>,
#include "rules/dtypes.inc"
          },
          {
#define DTYPE(name, Type) &SetTrust<Rule, Compute<Type>>,
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
inline constexpr Minimum kMinima[] = {
    {"l1", 0},           {"l2", 0},          {"clip_value", 0},
    {"weight_decay", 0}, {"proximal_l1", 0}, {"proximal_l2", 0},
    {"ema_momentum", 0}, {"seed", 0},        {"step", 1}};

// All hyperparameters of a rule, in the order of make_step's array; without a
// rule, those of the gradient, which come first there.
inline std::vector<std::string> HyperNames(const RuleInfo* rule) {
  const char* const* begin = kStepHypers.begin();
  if (!rule) return {begin, begin + kGradientHyperCount};
  std::vector<std::string> names(begin, kStepHypers.end());
  names.insert(names.end(), rule->hypers.begin(), rule->hypers.end());
  return names;
}

inline std::string ToString(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

// The least value of each hyperparameter; -infinity: there is none.
inline std::vector<double> Minima(const std::vector<std::string>& names) {
  std::vector<double> minima(names.size(), -INFINITY);
  for (size_t i = 0; i < names.size(); ++i) {
    for (const Minimum& minimum : kMinima) {
      if (names[i] == minimum.hyper) minima[i] = minimum.value;
    }
  }
  return minima;
}

// What is wrong with the hyperparameters of one variable; empty if nothing is.
// `minima` are those of all, which a caller makes once: an op asks for each of
// hundreds of variables.
inline std::string HyperError(const std::vector<std::string>& names,
                              const std::vector<double>& minima,
                              const double* hyper) {
  for (size_t i = 0; i < names.size(); ++i) {
    // A scale that is NaN tells of a gradient that is, and goes where it goes.
    const bool scale = i == kGradScale || i == kClipScale;
    if (scale || (std::isfinite(hyper[i]) && hyper[i] >= minima[i])) continue;
    const std::string is = names[i] + " is " + ToString(hyper[i]);
    const bool low = std::isfinite(minima[i]) && !(hyper[i] >= minima[i]);
    return is + ", but must be " +
           (low ? "at least " + ToString(minima[i]) : "finite");
  }
  if (names.size() > kLr && hyper[kLr] < 0 &&
      (hyper[kProximalL1] > 0 || hyper[kProximalL2] > 0)) {
    return "lr is " + ToString(hyper[kLr]) +
           ", but must not be negative beside proximal_l1 or proximal_l2";
  }
  return "";
}

}  // namespace wdops
