// The tree of rules/sums.h as a loop.
#pragma once

#include <tuple>
#include <utility>

#include "cpu/ahead.h"
#include "rules/sums.h"

namespace wdops::cpu {
namespace {

#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// A term that is not there.
struct Nothing {};
// A term that is the square of a number.
template <class S>
struct Square {
  S root;
};
template <class S>
Square(S) -> Square<S>;

WDOPS_FN void AddTo(double&, Nothing) {}
WDOPS_FN void AddTo(double& sum, double term) { sum += term; }
WDOPS_FN void AddTo(double& sum, Square<double> term) {
  sum += term.root * term.root;
}
// The square of a float is exact in a double, so one rounding gives the same
// bits as two.
WDOPS_FN void AddTo(double& sum, Square<float> term) {
  const double root = term.root;
  sum = kHasFma ? Fma(root, root, sum) : sum + root * root;
}

// The sums of a tree before its halves are added up.
template <int kTerms>
struct Lanes {
  double sums[kTerms][kLanes] = {};

  // Adds each of the terms, a tuple or an array, of every i below n, of which
  // all but the last call's is a multiple of kLanes. `read`: the arrays that
  // the terms are made of.
  template <class Term, class... Read>
  void Add(int64_t n, const Term& term, const Read&... read) {
    const auto add = [&](int64_t i, int lane) {
      AddEach(term(i), lane, std::make_index_sequence<kTerms>());
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      (FetchAhead(read, i), ...);
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
    }
    for (int lane = 0; i + lane < n; ++lane) add(i + lane, lane);
  }

  Sums Total() {
    double total[4] = {};
    for (int t = 0; t < kTerms; ++t) {
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
          sums[t][lane] += sums[t][lane + half];
        }
      }
      total[t] = sums[t][0];
    }
    return {total[0], total[1], total[2], total[3]};
  }

 private:
  template <class Terms, size_t... kTerm>
  WDOPS_FN void AddEach(const Terms& terms, int lane,
                        std::index_sequence<kTerm...>) {
    (AddTo(sums[kTerm][lane], std::get<kTerm>(terms)), ...);
  }
};

template <class Term, class... Read>
Sums AddUp(int64_t n, const Term& term, const Read&... read) {
  Lanes<std::tuple_size_v<decltype(term(0))>> lanes;
  lanes.Add(n, term, read...);
  return lanes.Total();
}

// Adds up the square of each number of the array value(i) for every i below n.
// Values that take long to make are not made where they are widened to double:
// GCC then vectorizes all of it in the lanes of a double.
template <class Value, class... Read>
Sums AddUpSquares(int64_t n, const Value& value, const Read&... read) {
  using Values = decltype(value(0));
  constexpr int kValues = std::tuple_size_v<Values>;
  using S = typename Values::value_type;
  S made[kValues][kLanes];
  Lanes<kValues> lanes;
  const auto squares = [&](int64_t lane) {
    std::array<Square<S>, kValues> terms;
    for (int k = 0; k < kValues; ++k) terms[k] = {made[k][lane]};
    return terms;
  };
  const auto add = [&](int64_t i, int count) {
#pragma GCC ivdep
    for (int lane = 0; lane < count; ++lane) {
      const Values values = value(i + lane);
      for (int k = 0; k < kValues; ++k) made[k][lane] = values[k];
    }
    lanes.Add(count, squares);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    (FetchAhead(read, i), ...);
    add(i, kLanes);
  }
  add(i, n - i);
  return lanes.Total();
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
