// Adam (Kingma and Ba, arXiv:1412.6980), in the form before section 2.1 of the
// paper that TensorFlow and Keras use: epsilon stands beside the root of v
// before its bias is corrected. AMSGrad: Reddi et al., arXiv:1904.09237.
#pragma once

#include "rules/rule.h"

namespace wdops {

// The moments that Adam's descendants share. `step` counts from 1. 1 - beta is
// made in double: in float it is off by 1e-5 for beta2 = 0.999.
template <class S>
struct Moments {
  S one_minus_beta1, one_minus_beta2;

  template <class D>
  explicit Moments(const D* hyper)
      : one_minus_beta1(1 - hyper[0]), one_minus_beta2(1 - hyper[1]) {}

  template <class V>
  WDOPS_FN void UpdateFirst(V grad, V& m) const {
    m = m + one_minus_beta1 * (grad - m);
  }
  template <class V>
  WDOPS_FN void UpdateSecond(V grad, V& v) const {
    v = v + one_minus_beta2 * (grad * grad - v);
  }
};

template <class S>
struct Adam : Moments<S> {
  static constexpr Names kSlots = {"m", "v"};
  static constexpr Names kHypers = {"beta1", "beta2", "epsilon", "step"};
  S step_size, rate, epsilon;

  template <class D>
  Adam(const D& lr, const D* hyper)
      : Moments<S>(hyper),
        step_size(lr * Sqrt(1 - Pow(hyper[1], hyper[3])) /
                  (1 - Pow(hyper[0], hyper[3]))),
        rate(lr * Sqrt(1 - Pow(hyper[1], hyper[3]))),
        epsilon(hyper[2]) {}

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    this->UpdateFirst(grad, slot[0]);
    this->UpdateSecond(grad, slot[1]);
    return param - step_size * slot[0] / (Sqrt(slot[1]) + epsilon);
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return rate / (Sqrt(slot[1]) + epsilon);
  }
};

template <class S>
struct Amsgrad : Adam<S> {
  static constexpr Names kSlots = {"m", "v", "vhat"};
  using Adam<S>::Adam;

  template <class V>
  WDOPS_FN V operator()(V param, V grad, V* slot) const {
    this->UpdateFirst(grad, slot[0]);
    this->UpdateSecond(grad, slot[1]);
    slot[2] = Max(slot[2], slot[1]);
    return param - this->step_size * slot[0] / (Sqrt(slot[2]) + this->epsilon);
  }
  template <class V>
  WDOPS_FN V Rate(const V* slot) const {
    return this->rate / (Sqrt(slot[2]) + this->epsilon);
  }
};

}  // namespace wdops
