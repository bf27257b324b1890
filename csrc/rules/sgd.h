// Gradient descent: update = lr * grad.
#pragma once

#include "rules/rule.h"

namespace wdops {

template <class S>
struct Sgd {
  static constexpr Names kSlots = {};
  static constexpr Names kHypers = {};
  S lr;

  template <class D>
  Sgd(D lr, const D*) : lr(lr) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V*) const {
    return param - lr * grad;
  }
};

}  // namespace wdops
