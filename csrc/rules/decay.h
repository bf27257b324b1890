// L1 and L2 decay of one element: the penalty's gradient, decoupled decay
// (Loshchilov and Hutter, arXiv:1711.05101) and the proximal step of the
// elastic net (Parikh and Boyd, Proximal Algorithms, 2014, section 6.5).
#pragma once

#include "rules/number.h"

namespace wdops {

// `coefficient * x`, and 0 for a coefficient of 0 also where x is infinite: a
// term that is off makes no NaN.
template <class S, class V>
WDOPS_FN V Term(S coefficient, V x) {
  return Select(coefficient == 0, Like(x, 0), coefficient * x);
}

// -1, 0 or 1; x itself where it is 0 or NaN, so that NaN propagates.
template <class V>
WDOPS_FN V Sign(V x) {
  return Select(x > 0, Like(x, 1), Select(x < 0, Like(x, -1), x));
}

// sign(x) * max(|x| - threshold, 0), written so that |x| <= threshold gives an
// exact 0 and NaN propagates; x itself for a threshold of 0.
template <class S, class V>
WDOPS_FN V SoftThreshold(V x, S threshold) {
  const V shrunk = x - Select(x > threshold, threshold,
                              Select(x < -threshold, -threshold, x));
  return Select(threshold == 0, x, shrunk);
}

// The penalty of elements whose sums of |x| and of x^2 these are.
template <class S>
WDOPS_FN S PenaltyOf(S l1, S l2, S absolute, S squares) {
  return Term(l1, absolute) + Term(l2, squares);
}

// `x` within [-limit, limit]; a limit of 0 is none. NaN propagates.
template <class S, class V>
WDOPS_FN V ClipValue(V x, S limit) {
  const V clipped = Select(x > limit, Like(x, 0) + limit,
                           Select(x < -limit, Like(x, 0) - limit, x));
  return Select(limit > 0, clipped, x);
}

}  // namespace wdops
