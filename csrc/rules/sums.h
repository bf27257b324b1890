// How sums over arrays are added up: in an order that depends on sizes alone,
// so that all machines give the same bits.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "rules/number.h"

namespace wdops {

// How many of `size` hold n.
WDOPS_FN int64_t Ceil(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Elements of one variable that are swept at a time, the last time fewer: 28
// bytes each for Adam in f32 make half of a usual L2. Sums are made over each
// chunk, and then over the chunks of a variable.
inline constexpr int64_t kChunk = 16384;

WDOPS_FN int64_t Chunks(int64_t n) { return Ceil(n, kChunk); }

// Both are a fixed tree: so many sums side by side, of every kLanes'th term
// each, so that every width of a vector or a warp gives the same bits, and then
// their halves.
inline constexpr int kLanes = 64;

// Up to four sums.
struct Sums {
  double a = 0, b = 0, c = 0, d = 0;

  WDOPS_FN Sums& operator+=(const Sums& other) {
    a += other.a, b += other.b, c += other.c, d += other.d;
    return *this;
  }
};

// LAMB's ratio, of the sums of squares of the parameter behind its decay and of
// the rule's Direction.
WDOPS_FN double TrustRatio(const Sums& sums) {
  return sums.a > 0 && sums.b > 0 ? Sqrt(sums.a / sums.b) : 1;
}

// Whether every element was finite of which `a` is the sum of squares. The
// square of a float does not overflow as a double; for a double, `d` tells: 0,
// or NaN.
WDOPS_FN bool IsFinite(const Sums& sums, bool is_double) {
  return is_double ? sums.d == 0 : sums.a - sums.a == 0;
}

}  // namespace wdops
