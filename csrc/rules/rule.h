// What the file of a rule needs: numbers, and the names of its slots and
// hyperparameters.
//
// A rule is a class template over S, the type that its constants are kept in
// (float or double, or an HLO scalar):
//   kSlots, kHypers   names, in the order in which operator() and the
//   constructor take them; Rule(lr, hyper)   makes the step's constants from
//   hyperparameters of type D (double, or an f64 HLO scalar); operator() takes
//   one gradient element, updates the slots' elements, and returns what to
//   subtract from
//                     the parameter.
#pragma once

#include <initializer_list>

#include "rules/number.h"

namespace wdops {

struct Names {
  const char* name[8] = {};
  int size = 0;

  constexpr Names(std::initializer_list<const char*> names) {
    for (const char* n : names) name[size++] = n;
  }
  constexpr const char* operator[](int i) const { return name[i]; }
  constexpr const char* const* begin() const { return name; }
  constexpr const char* const* end() const { return name + size; }
};

}  // namespace wdops
