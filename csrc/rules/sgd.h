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
  WDOPS_FN V operator()(V grad, V*) const {
    return lr * grad;
  }
};

}  // namespace wdops
