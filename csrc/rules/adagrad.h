// Adagrad (Duchi, Hazan and Singer, JMLR 2011), as in Keras: epsilon stands
// under the root.
#pragma once

#include "rules/rule.h"

namespace wdops {

template <class S>
struct Adagrad {
  static constexpr Names kSlots = {"v"};
  static constexpr Names kHypers = {"epsilon"};
  S lr, epsilon;

  template <class D>
  Adagrad(const D& lr, const D* hyper) : lr(lr), epsilon(hyper[0]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    slot[0] = slot[0] + grad * grad;
    return param - lr * grad / Sqrt(slot[0] + epsilon);
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return lr / Sqrt(slot[0] + epsilon);
  }
};

}  // namespace wdops
