// Adam (Kingma and Ba, arXiv:1412.6980), in the form before section 2.1 of the
// paper that TensorFlow and Keras use: epsilon stands beside the root of v
// before its bias is corrected. AMSGrad: Reddi et al., arXiv:1904.09237.
#pragma once

#include "rules/rule.h"

namespace wdops {

template <class S>
struct Adam {
  static constexpr Names kSlots = {"m", "v"};
  static constexpr Names kHypers = {"beta1", "beta2", "epsilon", "step"};
  S step_size, one_minus_beta1, one_minus_beta2, epsilon;

  // `step` counts from 1. 1 - beta is made in double: in float it is off by
  // 1e-5 for beta2 = 0.999.
  template <class D>
  Adam(const D& lr, const D* hyper)
      : step_size(lr * Sqrt(1 - Pow(hyper[1], hyper[3])) /
                  (1 - Pow(hyper[0], hyper[3]))),
        one_minus_beta1(1 - hyper[0]),
        one_minus_beta2(1 - hyper[1]),
        epsilon(hyper[2]) {}

  template <class V>
  WDOPS_FN void UpdateMoments(V grad, V& m, V& v) const {
    m = m + one_minus_beta1 * (grad - m);
    v = v + one_minus_beta2 * (grad * grad - v);
  }
  template <class V>
  WDOPS_FN V Update(V m, V v) const {
    return step_size * m / (Sqrt(v) + epsilon);
  }

  template <class V>
  WDOPS_FN V operator()(V grad, V* slot) const {
    UpdateMoments(grad, slot[0], slot[1]);
    return Update(slot[0], slot[1]);
  }
};

template <class S>
struct Amsgrad : Adam<S> {
  static constexpr Names kSlots = {"m", "v", "vhat"};
  using Adam<S>::Adam;

  template <class V>
  WDOPS_FN V operator()(V grad, V* slot) const {
    this->UpdateMoments(grad, slot[0], slot[1]);
    slot[2] = Max(slot[2], slot[1]);
    return this->Update(slot[0], slot[2]);
  }
};

}  // namespace wdops
