// FTRL-Proximal (McMahan et al., KDD 2013, algorithm 1), in the form of Keras:
// its lambda_1 is l1_strength, its lambda_2 is 2*l2_strength, and a power other
// than -1/2 may stand on the accumulator.
#pragma once

#include "rules/decay.h"
#include "rules/rule.h"

namespace wdops {

template <class S, bool kAnyPower>
struct FtrlForm {
  S inverse_lr, l1, curvature, shrinkage, power;

  template <class D>
  FtrlForm(const D& lr, const D* hyper)
      : inverse_lr(1 / lr),
        l1(hyper[0]),
        curvature(hyper[3] / lr + 2 * hyper[1]),
        shrinkage(2 * hyper[2]),
        power(kAnyPower ? -hyper[4] : hyper[0]) {}

  template <class V>
  WDOPS_FN V Root(V v) const {
    if constexpr (kAnyPower) {
      return Pow(v, power);
    } else {
      return Sqrt(v);
    }
  }

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    V &v = slot[0], &z = slot[1];
    const V before = Root(v);
    v = v + grad * grad;
    const V after = Root(v);
    z = z + (grad + shrinkage * param - (after - before) * inverse_lr * param);
    return -SoftThreshold(z, l1) / (after * inverse_lr + curvature);
  }
};

template <class S>
struct Ftrl : FtrlForm<S, false> {
  static constexpr Names kSlots = {"v", "z"};
  static constexpr Names kHypers = {"l1_strength", "l2_strength",
                                    "l2_shrinkage", "beta"};
  using FtrlForm<S, false>::FtrlForm;
};

template <class S>
struct FtrlPower : FtrlForm<S, true> {
  static constexpr Names kSlots = {"v", "z"};
  static constexpr Names kHypers = {"l1_strength", "l2_strength",
                                    "l2_shrinkage", "beta", "lr_power"};
  using FtrlForm<S, true>::FtrlForm;
};

}  // namespace wdops
