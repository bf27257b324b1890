// Activations whose derivative the output alone tells, so that the input needs
// no memory between the forward and the backward pass. Behind a bias, z = x +
// b: ELU (Clevert et al., arXiv:1511.07289) and with a scale SELU (Klambauer et
// al., arXiv:1706.02515), ReLU, and leaky ReLU (Maas et al., ICML 2013).
//
// An activation is a class template over S, as a rule is (rules/rule.h):
//   kHypers              names of its hyperparameters, none of them negative,
//                        or the sign of the output would not be that of z;
//   kWork                how many times as long as its reads and writes alone
//                        the forward pass over what lies in a cache takes;
//   Output(z)            the value;
//   Gradient(grad, y)    of z, from that of the output and the output. At 0,
//                        where a kink may be, the slope is that of negative z.
// NaN propagates in both.
#pragma once

#include "rules/rule.h"

namespace wdops {

template <class S>
struct Elu {
  static constexpr Names kHypers = {"alpha", "scale"};
  static constexpr int kWork = 4;
  S alpha, scale;

  template <class D>
  explicit Elu(const D* hyper) : alpha(hyper[0] * hyper[1]), scale(hyper[1]) {}

  template <class V>
  WDOPS_FN V Output(V z) const {
    // Not z > 0: -0 keeps its sign, and NaN stays, by the product.
    return Select(z < 0, ScaledExpm1(alpha, z), scale * z);
  }
  // For z <= 0, alpha * exp(z) = y + alpha.
  template <class V>
  WDOPS_FN V Gradient(V grad, V y) const {
    return Select(y > 0, scale * grad, (y + alpha) * grad);
  }
};

template <class S>
struct Relu {
  static constexpr Names kHypers = {};
  static constexpr int kWork = 1;

  template <class D>
  explicit Relu(const D*) {}

  template <class V>
  WDOPS_FN V Output(V z) const {
    return Max(z, Like(z, 0));
  }
  template <class V>
  WDOPS_FN V Gradient(V grad, V y) const {
    return Select(y > 0, grad, Select(y != y, y, Like(y, 0)));
  }
};

template <class S>
struct LeakyRelu {
  static constexpr Names kHypers = {"alpha"};
  static constexpr int kWork = 1;
  S alpha;

  template <class D>
  explicit LeakyRelu(const D* hyper) : alpha(hyper[0]) {}

  template <class V>
  WDOPS_FN V Output(V z) const {
    return Select(z > 0, z, alpha * z);
  }
  template <class V>
  WDOPS_FN V Gradient(V grad, V y) const {
    return Select(y > 0, grad, Select(y != y, y, alpha * grad));
  }
};

struct ActivationInfo {
  const char* op;  // of TensorFlow; that of the gradient has "Grad" behind it
  Names hypers;
  int work;
};

inline constexpr ActivationInfo kActivations[] = {
#define ACTIVATION(Class) \
  {"Wdops>" #Class, Class<float>::kHypers, Class<float>::kWork},
#include "rules/activations.inc"
};
inline constexpr int kActivationCount =
    sizeof kActivations / sizeof *kActivations;

// More than any activation has.
inline constexpr int kMaxActivationHypers = 2;

}  // namespace wdops
