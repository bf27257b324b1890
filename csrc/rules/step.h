// One element's step, in the order of Keras: scale, penalty, clip, decay, rule,
// proximal. It stands once, here.
#pragma once

#include "rules/decay.h"
#include "rules/rule.h"

namespace wdops {

// The hyperparameters of every step, before those of the rule.
inline constexpr Names kStepHypers = {
    "lr", "grad_scale",   "clip_scale",  "l1",
    "l2", "weight_decay", "proximal_l1", "proximal_l2"};

// `l1` and `l2` are the coefficients of l1*sum|p| + l2*sum(p^2), and
// `weight_decay` is times lr, as in Keras.
template <template <class> class Rule, class S>
struct Step {
  static constexpr int kSlots = Rule<S>::kSlots.size;
  S grad_scale, clip_scale, l1, l2_slope, decay, threshold, shrink;
  Rule<S> rule;

  // `hyper`: kStepHypers, then Rule::kHypers.
  template <class D>
  explicit Step(const D* hyper)
      : grad_scale(hyper[1]),
        clip_scale(hyper[2]),
        l1(hyper[3]),
        l2_slope(2 * hyper[4]),
        decay(hyper[0] * hyper[5]),
        threshold(hyper[0] * hyper[6]),
        shrink(1 / (1 + 2 * hyper[0] * hyper[7])),
        rule(hyper[0], hyper + kStepHypers.size) {}

  template <class V>
  WDOPS_FN void operator()(V& param, V grad, V* slot) const {
    V g = grad_scale * grad;
    g = g + Term(l1, Sign(param)) + Term(l2_slope, param);
    g = clip_scale * g;
    V p = param - Term(decay, param);
    p = p - rule(g, slot);
    param = shrink * SoftThreshold(p, threshold);
  }
};

}  // namespace wdops
