// Lion: the sign of an interpolated momentum (Chen et al., arXiv:2302.06675).
#pragma once

#include "rules/decay.h"
#include "rules/rule.h"

namespace wdops {

template <class S>
struct Lion {
  static constexpr Names kSlots = {"m"};
  static constexpr Names kHypers = {"beta1", "beta2"};
  S lr, beta1, beta2, one_minus_beta1, one_minus_beta2;

  template <class D>
  Lion(const D& lr, const D* hyper)
      : lr(lr),
        beta1(hyper[0]),
        beta2(hyper[1]),
        one_minus_beta1(1 - hyper[0]),
        one_minus_beta2(1 - hyper[1]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    V& m = slot[0];
    const V c = beta1 * m + one_minus_beta1 * grad;
    m = beta2 * m + one_minus_beta2 * grad;
    return param - lr * Sign(c);
  }
};

}  // namespace wdops
