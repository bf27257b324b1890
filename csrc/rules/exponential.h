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

// A sum with this has no bits for a fraction: its last bits are the whole part.
template <class V>
inline constexpr V kWhole = std::is_same_v<V, double> ? 0x1.8p52 : 0x1.8p23;

// To nearest, for |x| < 2^22.
template <class V>
WDOPS_FN V Round(V x) {
  return (x + kWhole<V>)-kWhole<V>;
}

// 2^n for a whole number n, if it is a normal number.
template <class V>
WDOPS_FN V PowerOfTwo(V n) {
  constexpr bool kDouble = std::is_same_v<V, double>;
  using Bits = std::conditional_t<kDouble, uint64_t, uint32_t>;
  return BitCast<V>((BitCast<Bits>(n + kWhole<V>) << (kDouble ? 52 : 23)) +
                    BitCast<Bits>(V(1)));
}

// e^x - 1 for x <= 0 or NaN, within 0.90 ULP in float and 1.2 in double; any
// number for other x. Sums and products alone, so that the loop around it is
// vectorized: with x = n*ln(2) + r, |r| <= ln(2)/2, it is
// 2^n * (e^r - 1) + (2^n - 1), and e^r - 1 is Taylor's series.
template <class V>
WDOPS_FN V Expm1(V x) {
  constexpr bool kDouble = std::is_same_v<typename Scalar<V>::type, double>;
  constexpr int kTerms = kDouble ? 13 : 7;
  // e^x is less than half an ULP of 1 below this.
  constexpr double kLeast = kDouble ? -38 : -18;
  // Here x is the result, and 0 keeps its sign, which a sum would lose.
  constexpr double kLinear = kDouble ? -0x1p-54 : -0x1p-25;
  // n*kLn2High is exact, and so is its difference from x.
  constexpr double kLn2High = kDouble ? 0x1.62e42feep-1 : 0x1.62e4p-1;
  constexpr double kLn2Low =
      kDouble ? 0x1.a39ef35793c76p-33 : 0x1.7f7d1cf79abcap-20;

  const V bounded = Select(x < Like(x, kLeast), Like(x, kLeast), x);
  const V n = Round(bounded * Like(x, 1.4426950408889634));
  const V r = (bounded - n * Like(x, kLn2High)) - n * Like(x, kLn2Low);
  double factorial = 1;
  for (int k = 2; k <= kTerms; ++k) factorial *= k;
  V series = Like(x, 1 / factorial);
  for (int k = kTerms; k > 2; --k) {
    factorial /= k;
    series = series * r + Like(x, 1 / factorial);
  }
  const V power = PowerOfTwo(n);
  const V result = power * (r + r * r * series) + (power - Like(x, 1));
  return Select(x > Like(x, kLinear), x, result);
}

// x^y = 2^(y*log2(x)), in the same bits everywhere and of arithmetic that the
// loop around it is vectorized with: libm's powf is a call for each element.
// Within 1.6 ULP for |y| <= 1, and 0.3 in the mean; beyond, within |y| + 1. A
// subnormal x counts as 0, and so does a subnormal power; 0 and infinity have
// the powers that powf gives them; those of x < 0 and of NaN are NaN, with no
// exception for y = 0.
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

  // log2(1 + t) is t + t*r(t), and |t*r(t)| <= 0.21, so that rounding it
  // hurts little. Both polynomials are minimax, and summed as a tree: their
  // latency is what the loop waits for.
  const float t2 = t * t, t4 = t2 * t2;
  const float r =
      ((0.44269487f - 0.72134715f * t) + t2 * (0.48092243f - 0.36072114f * t)) +
      t4 * (((0.28765872f - 0.23852128f * t) +
             t2 * (0.21736604f - 0.21028927f * t)) +
            t4 * 0.12542647f);

  // y*log2(x) as a sum of two: `coarse` is exact, since 16 bits of y and 8 of
  // the exponent make up a float. Adding 1.5*2^23 rounds to a whole number,
  // which then stands in the lowest bits.
  const float high = BitCast<float>(BitCast<uint32_t>(y) & 0xffffff00);
  const float coarse = high * exponent;
  const float yt = y * t;
  const float fine = ((y - high) * exponent + yt) + yt * r;
  const float sum = coarse + fine;
  const float rounded = sum + 0x1.8p23f;
  const float f = (coarse - (rounded - 0x1.8p23f)) + fine;

  // 2^f, |f| <= 1/2.
  const float f2 = f * f;
  const float power =
      1 + (0.6931472f * f + f2 * ((0.24022648f + 0.055503324f * f) +
                                  f2 * ((0.009618436f + 0.0013398853f * f) +
                                        f2 * 0.00015353598f)));
  const uint32_t infinity = 0x7f800000;
  const uint32_t scaled =
      BitCast<uint32_t>(power) + (BitCast<uint32_t>(rounded) << 23);
  const float finite = BitCast<float>(scaled < infinity ? scaled : infinity);
  const float result = Select(sum > 128.5f, BitCast<float>(infinity),
                              Select(sum < -126, 0.0f, finite));
  return Select(x >= 0, result, BitCast<float>(0x7fc00000));
}

// By libm, because only constants of a step are made by it and, in float64,
// ftrl_power.
WDOPS_FN double Pow(double x, double y) { return pow(x, y); }

}  // namespace wdops
