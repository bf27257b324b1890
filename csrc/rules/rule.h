// What the file of a rule needs: numbers, and the names of its slots and
// hyperparameters.
//
// A rule is a class template over S, the type that its constants are kept in
// (float or double, or an HLO scalar):
//   kSlots, kHypers   names, in the order in which operator() and the
//                     constructor take them;
//   Rule(lr, hyper)   makes the step's constants from hyperparameters of type D
//                     (double, or an f64 HLO scalar);
//   operator()        takes one element of the parameter, its gradient and its
//                     slots, updates the slots, and returns the new parameter;
//   Rate(slot)        where a rule has it: the element's own learning rate, of
//                     the preconditioner behind the update, in whose metric a
//                     proximal step may be taken;
//   Direction, trust  where a rule has them: it wants the ratio of the norm of
//                     the parameter to that of what Direction(grad, slot)
//                     returns, over the whole variable, in `trust`.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "rules/exponential.h"

namespace wdops {

struct Names {
  const char* name[16] = {};
  int size = 0;

  constexpr Names(std::initializer_list<const char*> names) {
    for (const char* n : names) name[size++] = n;
  }
  constexpr const char* operator[](int i) const { return name[i]; }
  constexpr const char* const* begin() const { return name; }
  constexpr const char* const* end() const { return name + size; }
};

// The most slots that a rule has.
inline constexpr int kMaxSlots = 3;

template <class Rule, class V, class = void>
inline constexpr bool kHasRate = false;
template <class Rule, class V>
inline constexpr bool kHasRate<
    Rule, V, std::void_t<decltype(std::declval<Rule>().Rate((V*)nullptr))>> =
    true;

template <class Rule, class = void>
inline constexpr bool kHasTrust = false;
template <class Rule>
inline constexpr bool
    kHasTrust<Rule, std::void_t<decltype(std::declval<Rule>().trust)>> = true;

}  // namespace wdops
