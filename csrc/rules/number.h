// The numbers of a sweep: the 16-bit storage types, and the few operations that
// a rule is written with.
//
// A rule never branches on a value: it calls Select, so that the same source is
// a vector loop on a CPU, a CUDA thread's body, and an HLO expression
// (xla/hlo.h overloads what stands here for xla::XlaOp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define WDOPS_FN __host__ __device__ inline
#else
// A call that is left in the loop of a long rule would stop the vectorizer.
#define WDOPS_FN inline __attribute__((always_inline))
#endif

namespace wdops {

template <class V>
WDOPS_FN V Select(bool condition, V yes, V no) {
  return condition ? yes : no;
}

// The constant `value`, of the type and shape of `like`.
template <class V>
WDOPS_FN V Like(V, double value) {
  return static_cast<V>(value);
}

WDOPS_FN float Sqrt(float x) { return sqrtf(x); }
WDOPS_FN double Sqrt(double x) { return sqrt(x); }
// a * b + c, rounded once.
WDOPS_FN float Fma(float a, float b, float c) { return fmaf(a, b, c); }
WDOPS_FN double Fma(double a, double b, double c) { return fma(a, b, c); }
WDOPS_FN double Floor(double x) { return floor(x); }
WDOPS_FN float Abs(float x) { return fabsf(x); }
WDOPS_FN double Abs(double x) { return fabs(x); }

// The larger of two, and NaN if either is: std::max drops a NaN on one side.
template <class V>
WDOPS_FN V Max(V a, V b) {
  return Select(a > b, a, Select(a != a, a, b));
}

template <class To, class From>
WDOPS_FN To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// f16, bf16 and f32 are computed in f32, f64 in f64.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

WDOPS_FN float Load(float x) { return x; }
WDOPS_FN double Load(double x) { return x; }
WDOPS_FN float Load(bfloat16 x) {
  return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Integer arithmetic instead of a conversion instruction: every instruction
// set gives the same bits, and the loop around it is vectorized on each. A
// subnormal half is made by a subtraction of normal floats, because the sweep
// runs with subnormal floats flushed to zero. A card has instructions that give
// the same, to the payload of a NaN, which no two agree on.
WDOPS_FN float Load(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  const float normal = BitCast<float>(magnitude + 0x38000000);
  const float infinite = BitCast<float>(magnitude + 0x70000000);
  const float subnormal =
      BitCast<float>(magnitude + 0x38800000) - BitCast<float>(0x38800000);
  const float absolute = exponent == 0x0f800000 ? infinite
                         : exponent == 0        ? subnormal
                                                : normal;
  return BitCast<float>(BitCast<uint32_t>(absolute) |
                        static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}

WDOPS_FN void Store(float value, float* to) { *to = value; }
WDOPS_FN void Store(double value, double* to) { *to = value; }

// What to add to a float's bits before its lower half is cut off: this rounds
// to nearest, ties to even, and 16 random bits round stochastically.
WDOPS_FN uint32_t ToNearest(uint32_t bits) { return 0x7fff + (bits >> 16 & 1); }

// A sum could carry a NaN over to 0, so nothing is added to one. It stays one
// when it is cut: arithmetic makes quiet NaNs, marked in the upper half.
WDOPS_FN void Store(float value, bfloat16* to, uint32_t addend) {
  const uint32_t rounded =
      BitCast<uint32_t>(value) + (value == value ? addend : 0);
  to->bits = static_cast<uint16_t>(rounded >> 16);
}
WDOPS_FN void Store(float value, bfloat16* to) {
#ifdef __CUDA_ARCH__
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  Store(value, to, ToNearest(BitCast<uint32_t>(value)));
#endif
}

// To nearest, ties to even.
WDOPS_FN void Store(float value, float16* to) {
#ifdef __CUDA_ARCH__
  to->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Adding 1/2 moves a magnitude below 2^-14 to where one unit in the last
  // place is 2^-24, the least half.
  const uint32_t subnormal =
      BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal =
      (magnitude - 0x38000000 + 0x0fff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude >= 0x47800000  ? special
                        : magnitude < 0x38800000 ? subnormal
                                                 : normal;
  to->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
#endif
}

}  // namespace wdops
