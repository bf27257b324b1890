// RMSprop (Tieleman and Hinton, 2012), with momentum, and centered (Graves,
// arXiv:1308.0850), as in Keras: epsilon stands under the root. The variance
// v - mean^2 is not let below 0, which rounding would make a NaN of.
#pragma once

#include "rules/rule.h"

namespace wdops {

// Slots: v, then the mean of the gradient if kCentered, then the momentum if
// kMomentum.
template <class S, bool kCentered, bool kMomentum>
struct RmspropForm {
  S lr, rho, one_minus_rho, epsilon, momentum;

  template <class D>
  RmspropForm(const D& lr, const D* hyper)
      : lr(lr),
        rho(hyper[0]),
        one_minus_rho(1 - hyper[0]),
        epsilon(hyper[1]),
        momentum(kMomentum ? hyper[2] : hyper[0]) {}

  template <class V>
  WDOPS_FN V Root(const V* slot) const {
    if constexpr (kCentered) {
      const V variance = slot[0] - slot[1] * slot[1];
      return Sqrt(Max(variance, Like(variance, 0)) + epsilon);
    } else {
      return Sqrt(slot[0] + epsilon);
    }
  }

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    slot[0] = rho * slot[0] + one_minus_rho * (grad * grad);
    if constexpr (kCentered) slot[1] = rho * slot[1] + one_minus_rho * grad;
    const V descent = lr * grad / Root(slot);
    if constexpr (kMomentum) {
      V& m = slot[kCentered ? 2 : 1];
      m = momentum * m + descent;
      return param - m;
    } else {
      return param - descent;
    }
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return lr / Root(slot);
  }
};

template <class S>
struct Rmsprop : RmspropForm<S, false, false> {
  static constexpr Names kSlots = {"v"};
  static constexpr Names kHypers = {"rho", "epsilon"};
  using RmspropForm<S, false, false>::RmspropForm;
};

template <class S>
struct RmspropMomentum : RmspropForm<S, false, true> {
  static constexpr Names kSlots = {"v", "m"};
  static constexpr Names kHypers = {"rho", "epsilon", "momentum"};
  using RmspropForm<S, false, true>::RmspropForm;
};

template <class S>
struct CenteredRmsprop : RmspropForm<S, true, false> {
  static constexpr Names kSlots = {"v", "mean"};
  static constexpr Names kHypers = {"rho", "epsilon"};
  using RmspropForm<S, true, false>::RmspropForm;
};

template <class S>
struct CenteredRmspropMomentum : RmspropForm<S, true, true> {
  static constexpr Names kSlots = {"v", "mean", "m"};
  static constexpr Names kHypers = {"rho", "epsilon", "momentum"};
  using RmspropForm<S, true, true>::RmspropForm;
};

}  // namespace wdops
