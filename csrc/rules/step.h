// One element's step, in the order of Keras: scale, penalty, clip, decay, rule,
// proximal, average. It stands once, here.
#pragma once

#include "rules/decay.h"
#include "rules/random.h"
#include "rules/rule.h"

namespace wdops {

// The hyperparameters of every step, before those of the rule: first those of
// the gradient.
enum StepHyper {
  kGradScale,
  kAccumulationScale,
  kL1,
  kL2,
  kGradientHyperCount,
  kClipScale = kGradientHyperCount,
  kClipValue,
  kLr,
  kDecayLr,
  kWeightDecay,
  kProximalL1,
  kProximalL2,
  kEmaMomentum,
  kEmaOverwrite,
  kSeed,
  kStepHyperCount
};
inline constexpr Names kStepHypers = {"grad_scale",
                                      "accumulation_scale",
                                      "l1",
                                      "l2",
                                      "clip_scale",
                                      "clip_value",
                                      "lr",
                                      "decay_lr",
                                      "weight_decay",
                                      "proximal_l1",
                                      "proximal_l2",
                                      "ema_momentum",
                                      "ema_overwrite",
                                      "seed"};
static_assert(kStepHypers.size == kStepHyperCount);

// What is chosen once, and not as a number that may change from step to step.
struct StepOptions {
  // The proximal step is taken in the metric of the rule's preconditioner:
  // its lr is that of the element, where the rule has one.
  bool scaled_proximal = false;
  // bfloat16 is rounded stochastically and not to nearest.
  bool stochastic = false;
};

// The gradient of the loss with its penalty l1*sum|p| + l2*sum(p^2), before it
// is clipped.
template <class S>
struct Gradient {
  S scale, accumulation_scale, l1, l2_slope;

  template <class D>
  WDOPS_FN explicit Gradient(const D* hyper)
      : scale(hyper[kAccumulationScale] * hyper[kGradScale]),
        accumulation_scale(hyper[kAccumulationScale]),
        l1(hyper[kL1]),
        l2_slope(2 * hyper[kL2]) {}

  template <class V>
  WDOPS_FN V Scaled(V grad) const {
    return scale * grad;
  }
  template <class V>
  WDOPS_FN V Mean(V grad, V accumulator) const {
    return scale * grad + accumulation_scale * accumulator;
  }
  template <class V>
  WDOPS_FN V Penalty(V param) const {
    const V ridge = Term(l2_slope, param);
    return Select(l1 == 0, ridge, l1 * Sign(param) + ridge);
  }
  template <class V>
  WDOPS_FN V Total(V param, V grad) const {
    return Scaled(grad) + Penalty(param);
  }
  template <class V>
  WDOPS_FN V Total(V param, V grad, V accumulator) const {
    return Mean(grad, accumulator) + Penalty(param);
  }
};

// U is the type of random bits: uint32_t, or its HLO.
template <template <class> class Rule, class S, class U = uint32_t>
struct Step : Gradient<S> {
  static constexpr int kSlots = Rule<S>::kSlots.size;
  StepOptions options;
  S clip_scale, clip_value, decay, threshold, proximal_l1, shrink, slope,
      ema_momentum, ema_rest, ema_overwrite;
  Key<U> key;
  Rule<S> rule;

  // `hyper`: kStepHypers, then Rule::kHypers.
  template <class D>
  Step(const D* hyper, StepOptions options)
      : Gradient<S>(hyper),
        options(options),
        clip_scale(hyper[kClipScale]),
        clip_value(hyper[kClipValue]),
        decay(hyper[kDecayLr] * hyper[kWeightDecay]),
        threshold(hyper[kLr] * hyper[kProximalL1]),
        proximal_l1(hyper[kProximalL1]),
        shrink(1 / (1 + 2 * hyper[kLr] * hyper[kProximalL2])),
        slope(2 * hyper[kProximalL2]),
        ema_momentum(hyper[kEmaMomentum]),
        ema_rest(1 - hyper[kEmaMomentum]),
        ema_overwrite(hyper[kEmaOverwrite]),
        key(MakeKey<U>(hyper[kSeed])),
        rule(hyper[kLr], hyper + kStepHyperCount) {}

  // Whether there is neither l1 nor a limit of values nor a threshold, as in
  // most steps: only those choose by the value of an element.
  WDOPS_FN bool IsSmooth() const {
    return this->l1 == 0 && clip_value == 0 && threshold == 0;
  }
  // A smooth step that the compiler knows to be one: it leaves out what is off.
  WDOPS_FN Step Smooth() const {
    Step step = *this;
    step.l1 = step.clip_value = step.threshold = 0;
    return step;
  }

  template <class V>
  WDOPS_FN V Clip(V g) const {
    return ClipValue(clip_scale * g, clip_value);
  }
  template <class V>
  WDOPS_FN V Decay(V param) const {
    return param - Term(decay, param);
  }
  template <bool kScaled, class V>
  WDOPS_FN V Proximal(V p, const V* slot) const {
    if constexpr (kScaled) {
      const V rate = rule.Rate(slot);
      return SoftThreshold(p, rate * proximal_l1) / (1 + rate * slope);
    } else {
      return shrink * SoftThreshold(p, threshold);
    }
  }

  // All but the proximal step. `total` is Total(param, ...).
  template <class V>
  WDOPS_FN V Move(V param, V total, V* slot) const {
    return rule(Decay(param), Clip(total), slot);
  }

  // All of it. kScaled: in the metric of the rule's preconditioner.
  template <bool kScaled, class V>
  WDOPS_FN void Apply(V& param, V total, V* slot) const {
    param = Proximal<kScaled>(Move(param, total, slot), slot);
  }

  template <class V>
  WDOPS_FN void Average(V& param, V& average) const {
    average = ema_momentum * average + ema_rest * param;
    param = Select(ema_overwrite != 0, average, param);
  }
};

}  // namespace wdops
