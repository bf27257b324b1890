// Schedule-Free AdamW (Defazio et al., arXiv:2405.15682), as in Keras: the
// averages are weighted alike, and x is made from y and z instead of kept.
#pragma once

#include "rules/adam.h"

namespace wdops {

// The parameter is y, where gradients are taken; z is the sequence that they
// move, and x = (y - (1-beta1)*z) / beta1 is their average.
template <class S>
struct ScheduleFreeAdam : Moments<S> {
  static constexpr Names kSlots = {"z", "v"};
  static constexpr Names kHypers = {"beta1", "beta2", "epsilon", "step"};
  S lr, of_x, of_y, root_scale, epsilon;

  template <class D>
  ScheduleFreeAdam(const D& lr, const D* hyper)
      : Moments<S>(hyper),
        lr(lr),
        of_x(hyper[0] / hyper[3]),
        of_y(1 - 1 / hyper[3]),
        root_scale(1 / Sqrt(1 - Pow(hyper[1], hyper[3]))),
        epsilon(hyper[2]) {}

  // beta1*x' = beta1*((1-w)*x + w*z') = (1-w)*(y - (1-beta1)*z) + w*beta1*z',
  // with w = 1/step.
  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    V& z = slot[0];
    this->UpdateSecond(grad, slot[1]);
    const V x = of_y * (param - this->one_minus_beta1 * z);
    z = z - lr * grad / (root_scale * Sqrt(slot[1]) + epsilon);
    return this->one_minus_beta1 * z + (x + of_x * z);
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return lr / (root_scale * Sqrt(slot[1]) + epsilon);
  }
};

}  // namespace wdops
