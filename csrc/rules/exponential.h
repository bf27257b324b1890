// Exponentials and powers, of sums, products and bits alone: libm's are a call
// for each element, and differ from machine to machine.
#pragma once

#include "rules/number.h"

namespace wdops {

// float or double: what V is, or the elements of an HLO.
template <class V>
struct Scalar {
  using type = V;
};

// x to nearest, for |x| < 2^22, and 2 to that power if it is a normal number: a
// sum with `whole` has no bits for a fraction, and ends in those of the result.
template <class V>
WDOPS_FN V Round(V x, V* power) {
  constexpr bool kDouble = std::is_same_v<V, double>;
  using Bits = std::conditional_t<kDouble, uint64_t, uint32_t>;
  constexpr V whole = kDouble ? 0x1.8p52 : 0x1.8p23;
  const V sum = x + whole;
  *power = BitCast<V>((BitCast<Bits>(sum) << (kDouble ? 52 : 23)) +
                      BitCast<Bits>(V(1)));
  return sum - whole;
}

// first + x*second + x^2*third ..., two terms at a time: a pair does not wait
// for the one before, as a term does in Horner's.
template <class V>
WDOPS_FN V Polynomial(V x, V, double first) {
  return Like(x, first);
}
template <class V, class... More>
WDOPS_FN V Polynomial(V x, V square, double first, double second,
                      More... more) {
  const V pair = x * Like(x, second) + Like(x, first);
  if constexpr (sizeof...(more) == 0) {
    return pair;
  } else {
    return square * Polynomial(x, square, more...) + pair;
  }
}

// scale * (e^x - 1) for x < 0, any number for other x. With a scale of 1 it is
// within 0.98 ULP in float and 1.2 in double. Sums and products alone, so that
// the loop around it is vectorized, and as few behind each other as can be: it
// is those that the loop waits for. With x = n*ln(2) + r, |r| <= ln(2)/2, it is
// scale*2^n * (e^r - 1) + (scale*2^n - scale).
template <class S, class V>
WDOPS_FN V ScaledExpm1(S scale, V x) {
  constexpr bool kDouble = std::is_same_v<typename Scalar<V>::type, double>;
  // e^x is less than half an ULP of 1 below this.
  constexpr double kLeast = kDouble ? -38 : -18;
  // n*kLn2 is exact, and so is its difference from x. In float, what ln(2) has
  // beyond it counts for 0.03 ULP.
  constexpr double kLn2 = kDouble ? 0x1.62e42feep-1 : 0x1.62e43p-1;
  constexpr double kLn2Beyond = 0x1.a39ef35793c76p-33;

  const V bounded = Select(x < Like(x, kLeast), Like(x, kLeast), x);
  V power = x;
  const V n = Round(bounded * Like(x, 1.4426950408889634), &power);
  V r = bounded - n * Like(x, kLn2);
  if constexpr (kDouble) r = r - n * Like(x, kLn2Beyond);
  const V r2 = r * r, scaled = scale * power;
  // (e^r - 1 - r)/r^2: Taylor's in double; in float what was found to make the
  // ULPs of the result least.
  const V series =
      kDouble ? Polynomial(r, r2, 1 / 2., 1 / 6., 1 / 24., 1 / 120., 1 / 720.,
                           1 / 5040., 1 / 40320., 1 / 362880., 1 / 3628800.,
                           1 / 39916800., 1 / 479001600., 1 / 6227020800.)
              : Polynomial(r, r2, 0.5, 0.166665286, 0.0416666567, 0.00836690608,
                           0.00139131094);
  return scaled * (r + r2 * series) + (scaled - scale);
}

// x^y = 2^(y*log2(x)), in the same bits everywhere and of arithmetic that the
// loop around it is vectorized with: libm's powf is a call for each element.
// Within 0.63 ULP for |y| <= 1 and 0.82 for |y| <= 8: what a float would round
// too early is a double, and only that. A subnormal x counts as 0, and so does
// a subnormal power; 0 and infinity have the powers that powf gives them; those
// of x < 0 and of NaN are NaN, with no exception for y = 0.
WDOPS_FN float Pow(float x, float y) {
  // x is 2^exponent * (1 + t), with 1 + t from sqrt(1/2) to sqrt(2). That of
  // 0 and infinity takes y*log2(x) out of range, for every |y| >= 2^-119.
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t power_of_2 = (bits - 0x3f3504f3) & 0xff800000;
  const float t = BitCast<float>(bits - power_of_2) - 1;
  const float exponent =
      Select(x < 0x1p-126f, -0x1p127f,
             Select(x > 0x1.fffffep127f, 0x1p127f,
                    float(static_cast<int32_t>(power_of_2) >> 23)));

  // log2(1 + t) = t*(1.44 - 0.72*t + tail). Both polynomials are minimax, and
  // summed as a tree: their latency is what the loop waits for.
  const float t2 = t * t, t4 = t2 * t2;
  const float tail = t2 * (((0.48089815f - 0.36070881f * t) +
                            t2 * (0.28857918f - 0.23939290f * t)) +
                           t4 * ((0.20428941f - 0.19235298f * t) +
                                 t2 * (0.18839046f - 0.10975116f * t)));
  const double wide = t;
  const double log2 = exponent + wide * (1.4426950408470334 +
                                         (tail - 0.72134716012004763 * wide));

  // Adding 1.5*2^23 rounds to a whole number, which then stands in the lowest
  // bits.
  const double product = y * log2;
  const float sum = product;
  const float rounded = sum + 0x1.8p23f;
  const double f = product - (rounded - 0x1.8p23f);

  // 2^f = 1 + f*(0.69 + tail), |f| <= 1/2.
  const float narrow = f, f2 = narrow * narrow;
  const float power_tail =
      narrow *
      ((0.24022648f + 0.055503324f * narrow) +
       f2 * ((0.0096184376f + 0.00133989f * narrow) + f2 * 0.00015353341f));
  const float power = 1 + f * (0.69314720288100762 + power_tail);
  const uint32_t infinity = 0x7f800000;
  const uint32_t scaled =
      BitCast<uint32_t>(power) + (BitCast<uint32_t>(rounded) << 23);
  const float finite = BitCast<float>(scaled < infinity ? scaled : infinity);
  const float result = Select(sum > 128.5f, BitCast<float>(infinity),
                              Select(sum < -126, 0.0f, finite));
  return Select(x >= 0, result, BitCast<float>(0x7fc00000));
}

// By libm, because only constants of a step are made by it and, in float64,
// ftrl_power. That of a card rounds the last bit otherwise than that of a CPU,
// in a few of a million: so float64 ftrl_power has not all bits of the CPU's
// there, as everything else has.
WDOPS_FN double Pow(double x, double y) { return pow(x, y); }

}  // namespace wdops
