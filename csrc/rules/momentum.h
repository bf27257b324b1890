// Gradient descent with momentum (Polyak, 1964), or Nesterov's in the form of
// Sutskever et al. (ICML 2013).
//
// As in Keras, lr is inside the slot: m' = momentum*m - lr*grad, so a change of
// lr acts on new gradients only.
#pragma once

#include "rules/rule.h"

namespace wdops {

template <class S>
struct Momentum {
  static constexpr Names kSlots = {"m"};
  static constexpr Names kHypers = {"momentum", "nesterov"};
  S lr, momentum, nesterov;

  template <class D>
  Momentum(const D& lr, const D* hyper)
      : lr(lr), momentum(hyper[0]), nesterov(hyper[1]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    V& m = slot[0];
    const V descent = lr * grad;
    m = momentum * m - descent;
    return param + Select(nesterov != 0, momentum * m - descent, m);
  }
};

}  // namespace wdops
