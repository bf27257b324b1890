// The tree of rules/sums.h as a loop.
#pragma once

#include "cpu/ahead.h"
#include "rules/sums.h"

namespace wdops::cpu {
namespace {

// The rest of the tree, once every term is in its lane.
inline double AddLanes(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Adds up each number of the array term(i) for every i below n. `read`: the
// arrays that the terms are made of.
template <class Term, class... Read>
Sums AddUp(int64_t n, const Term& term, const Read&... read) {
  using Terms = decltype(term(0));
  constexpr int kTerms = std::tuple_size_v<Terms>;
  double sums[kTerms][kLanes] = {};
  const auto add = [&](int64_t i, int lane) {
    const Terms terms = term(i);
    for (int t = 0; t < kTerms; ++t) sums[t][lane] += terms[t];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    (FetchAhead(read, i), ...);
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i + lane < n; ++lane) add(i + lane, lane);
  double total[4] = {};
  for (int t = 0; t < kTerms; ++t) total[t] = AddLanes(sums[t]);
  return {total[0], total[1], total[2], total[3]};
}

// Adds up the square of each number of the array value(i) for every i below n.
// Values that take long to make are not made where they are widened to double:
// GCC then vectorizes all of it in the lanes of a double.
template <class Value, class... Read>
Sums AddUpSquares(int64_t n, const Value& value, const Read&... read) {
  using Values = decltype(value(0));
  constexpr int kValues = std::tuple_size_v<Values>;
  typename Values::value_type made[kValues][kLanes];
  double sums[kValues][kLanes] = {};
  const auto add = [&](int64_t i, int lanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < lanes; ++lane) {
      const Values values = value(i + lane);
      for (int k = 0; k < kValues; ++k) made[k][lane] = values[k];
    }
    for (int k = 0; k < kValues; ++k) {
      for (int lane = 0; lane < lanes; ++lane) {
        const double wide = made[k][lane];
        sums[k][lane] += wide * wide;
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    (FetchAhead(read, i), ...);
    add(i, kLanes);
  }
  add(i, n - i);
  double total[4] = {};
  for (int k = 0; k < kValues; ++k) total[k] = AddLanes(sums[k]);
  return {total[0], total[1], total[2], total[3]};
}

// Of a variable, from those of its chunks.
inline Sums AddUp(const Sums* of_chunks, int64_t chunks) {
  // Most variables of a model have one, which is its own sum.
  if (chunks == 1) return *of_chunks;
  return AddUp(chunks, [&](int64_t c) {
    const Sums& sums = of_chunks[c];
    return std::array{sums.a, sums.b, sums.c, sums.d};
  });
}

}  // namespace
}  // namespace wdops::cpu
