// Adamax: Adam in the infinity norm (Kingma and Ba, arXiv:1412.6980, section
// 7.1), with Keras's epsilon.
#pragma once

#include "rules/adam.h"

namespace wdops {

template <class S>
struct Adamax : Moments<S> {
  static constexpr Names kSlots = {"m", "v"};
  static constexpr Names kHypers = {"beta1", "beta2", "epsilon", "step"};
  S step_size, rate, beta2, epsilon;

  template <class D>
  Adamax(const D& lr, const D* hyper)
      : Moments<S>(hyper),
        step_size(lr / (1 - Pow(hyper[0], hyper[3]))),
        rate(lr),
        beta2(hyper[1]),
        epsilon(hyper[2]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    this->UpdateFirst(grad, slot[0]);
    slot[1] = Max(beta2 * slot[1], Abs(grad));
    return param - step_size * slot[0] / (slot[1] + epsilon);
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return rate / (slot[1] + epsilon);
  }
};

}  // namespace wdops
