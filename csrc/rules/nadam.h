// Nadam: Adam with Nesterov's momentum on a schedule of beta1 (Dozat, ICLR
// workshop 2016), in the form of Keras.
#pragma once

#include "rules/adam.h"

namespace wdops {

// With u_t = beta1 * (1 - 0.96^t / 2); `u_product` is u_1 * ... * u_step.
template <class S>
struct Nadam : Moments<S> {
  static constexpr Names kSlots = {"m", "v"};
  static constexpr Names kHypers = {"beta1", "beta2", "epsilon", "step",
                                    "u_product"};
  S of_m, of_grad, rate, root_scale, epsilon;

  template <class D>
  static D Momentum(const D* hyper, int ahead) {
    return hyper[0] * (1 - 0.5 * Pow(Like(hyper[0], 0.96), hyper[3] + ahead));
  }

  template <class D>
  Nadam(const D& lr, const D* hyper)
      : Moments<S>(hyper),
        of_m(lr * Momentum(hyper, 1) / (1 - hyper[4] * Momentum(hyper, 1))),
        of_grad(lr * (1 - Momentum(hyper, 0)) / (1 - hyper[4])),
        rate(lr),
        root_scale(1 / Sqrt(1 - Pow(hyper[1], hyper[3]))),
        epsilon(hyper[2]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    this->UpdateFirst(grad, slot[0]);
    this->UpdateSecond(grad, slot[1]);
    return param - (of_m * slot[0] + of_grad * grad) /
                       (root_scale * Sqrt(slot[1]) + epsilon);
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return rate / (root_scale * Sqrt(slot[1]) + epsilon);
  }
};

}  // namespace wdops
