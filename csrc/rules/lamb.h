// LAMB: Adam's update scaled to the norm of the variable (You et al.,
// arXiv:1904.00962), as in Keras: no bounds on the norm, and decay outside the
// ratio.
#pragma once

#include "rules/adam.h"

namespace wdops {

template <class S>
struct Lamb : Moments<S> {
  static constexpr Names kSlots = {"m", "v"};
  static constexpr Names kHypers = {"beta1", "beta2", "epsilon", "step"};
  S lr, m_scale, root_scale, epsilon;
  S trust;

  template <class D>
  Lamb(const D& lr, const D* hyper)
      : Moments<S>(hyper),
        lr(lr),
        m_scale(1 / (1 - Pow(hyper[0], hyper[3]))),
        root_scale(1 / Sqrt(1 - Pow(hyper[1], hyper[3]))),
        epsilon(hyper[2]),
        trust(Like(lr, 1)) {}

  template <class V>
  WDOPS_FN V Direction(V grad, V* slot) const {
    this->UpdateFirst(grad, slot[0]);
    this->UpdateSecond(grad, slot[1]);
    return m_scale * slot[0] / (root_scale * Sqrt(slot[1]) + epsilon);
  }
  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    return param - trust * lr * Direction(grad, slot);
  }
};

}  // namespace wdops
