// Adadelta (Zeiler, arXiv:1212.5701), as in Keras.
#pragma once

#include "rules/rule.h"

namespace wdops {

template <class S>
struct Adadelta {
  static constexpr Names kSlots = {"v", "v_delta"};
  static constexpr Names kHypers = {"rho", "epsilon"};
  S lr, rho, one_minus_rho, epsilon;

  template <class D>
  Adadelta(const D& lr, const D* hyper)
      : lr(lr), rho(hyper[0]), one_minus_rho(1 - hyper[0]), epsilon(hyper[1]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    slot[0] = rho * slot[0] + one_minus_rho * (grad * grad);
    // sqrt(squares) / sqrt(v), by one root for two. In float the product is not
    // 0 with an epsilon from 1e-19 on.
    const V v = slot[0] + epsilon, squares = slot[1] + epsilon;
    const V delta = Sqrt(squares * v) * grad / v;
    slot[1] = rho * slot[1] + one_minus_rho * (delta * delta);
    return param - lr * delta;
  }
};

}  // namespace wdops
