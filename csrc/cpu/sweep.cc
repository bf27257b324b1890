// The loop of a step over a CPU's memory. Compiled, as what is included here,
// once per instruction set, which the flags of the target and WDOPS_ISA name;
// nothing that is compiled here is visible to another library but
// wdops_cpu_kernels.
#include "cpu/sweep.h"

#include "cpu/activation.h"
#include "cpu/add_up.h"
#include "cpu/ahead.h"
#include "cpu/factored.h"
#include "cpu/float_mode.h"
#include "cpu/stream.h"

namespace wdops::cpu {
namespace {

// What stands for the arrays that a chunk lacks, so many elements at a time: it
// stays in L1. One for all rules, since each thread has its own.
constexpr int kStandIns = 1024;
template <class T>
thread_local T no_accumulator[kStandIns];
template <class T>
thread_local T no_average[kStandIns];

// How many of a new parameter are swept before the sums of its penalty are
// made, from L1.
constexpr int kPenaltyBlock = 256;

// Not inlined where another call follows: the constants of a loop that live
// until then would be left on the stack. On AVX2 AdamW took 8 % longer.
#define WDOPS_LOOP __attribute__((noinline))

// Stores tensor k of an element whose random bits are `bits`.
template <bool kStochastic, class S, class T>
inline void StoreRounded(S value, T* to, uint32_t bits, int k) {
  if constexpr (kStochastic && std::is_same_v<T, bfloat16>) {
    Store(value, to, Addend(bits, k));
  } else {
    Store(value, to);
  }
}

template <class T, class SlotT, int kSlots>
struct Arrays {
  T* param;
  const T* grad;
  SlotT* slot[kSlots + 1];
  T* accumulator;
  T* average;

  Arrays(const Chunk& chunk, int64_t begin)
      : param(static_cast<T*>(chunk.param) + begin),
        grad(static_cast<const T*>(chunk.grad) + begin),
        accumulator(static_cast<T*>(chunk.accumulator) + begin),
        average(static_cast<T*>(chunk.average) + begin) {
    for (int k = 0; k < kSlots; ++k) {
      slot[k] = static_cast<SlotT*>(chunk.slot[k]) + begin;
    }
  }
};

// Of what every step reads.
template <class T, class SlotT, int kSlots>
WDOPS_FN void FetchAhead(const Arrays<T, SlotT, kSlots>& a, int64_t i) {
  FetchAhead(a.param, i);
  FetchAhead(a.grad, i);
  for (int k = 0; k < kSlots; ++k) FetchAhead(a.slot[k], i);
}

// The sums of the penalty of a new parameter. Made while a sweep waits for
// memory: a loop of its own behind a chunk takes 3 % of a large step.
class PenaltySums {
 public:
  explicit PenaltySums(bool has_l1) : has_l1_(has_l1) {}

  template <class T>
  WDOPS_LOOP void Add(const T* param, int n) {
    const auto square = [&](int64_t i) { return Square{Load(param[i])}; };
    if (has_l1_) {
      lanes_.Add(n, [&](int64_t i) {
        return std::tuple<double, decltype(square(i))>(Abs(Load(param[i])),
                                                       square(i));
      });
    } else {
      lanes_.Add(n,
                 [&](int64_t i) { return std::tuple(Nothing(), square(i)); });
    }
  }

  Sums Total() { return lanes_.Total(); }

 private:
  bool has_l1_;
  Lanes<2> lanes_;
};

// What most steps are: no accumulator, no average, one direct loop over
// [begin, end) of a chunk. The step is taken by value here, so that no store
// can change it and its constants stay in registers.
template <bool kStochastic, bool kSmooth, template <class> class Rule, class T,
          class SlotT>
WDOPS_LOOP void SweepPlain(const Step<Rule, Compute<T>> given,
                           const Chunk& chunk, int begin, int end) {
  using S = Compute<T>;
  const auto step = kSmooth ? given.Smooth() : given;
  constexpr int kSlots = Step<Rule, S>::kSlots;
  const Arrays<T, SlotT, kSlots> a(chunk, 0);
  const uint32_t high = static_cast<uint64_t>(chunk.begin) >> 32;
  const uint32_t low = chunk.begin;
  const int asked = ElementsAsked(end - begin);
  for (int first = begin; first < end; first += asked) {
    FetchAhead(a, first);
    const int last = std::min(first + asked, end);
#pragma GCC ivdep
    for (int i = first; i < last; ++i) {
      S p = Load(a.param[i]);
      S s[kSlots + 1];
      for (int k = 0; k < kSlots; ++k) s[k] = Load(a.slot[k][i]);
      step.template Apply<false>(p, step.Total(p, Load(a.grad[i])), s);
      const uint32_t bits = RandomBits(step.key, high, low + i);
      for (int k = 0; k < kSlots; ++k) {
        StoreRounded<kStochastic>(s[k], &a.slot[k][i], bits, k);
      }
      StoreRounded<kStochastic>(p, &a.param[i], bits, kSlots);
    }
  }
}

// Every step. Without kAccumulated, only one that has no accumulator.
template <bool kStochastic, bool kSmooth, bool kScaled, bool kAccumulated,
          template <class> class Rule, class T, class SlotT>
WDOPS_LOOP void SweepFull(const Step<Rule, Compute<T>> given,
                          const Chunk& chunk, int begin, int end) {
  using S = Compute<T>;
  auto step = kSmooth ? given.Smooth() : given;
  constexpr int kSlots = Step<Rule, S>::kSlots;
  // What stands for an array that there is not must not count: -0 is the number
  // that changes no other one when it is added.
  if (!chunk.accumulator) step.accumulation_scale = S(-0.0);
  if (!chunk.average) step.ema_overwrite = 0;
  const uint32_t high = static_cast<uint64_t>(chunk.begin) >> 32;
  for (; begin < end; begin += kStandIns) {
    Arrays<T, SlotT, kSlots> a(chunk, begin);
    if (!chunk.accumulator) a.accumulator = no_accumulator<T>;
    if (!chunk.average) a.average = no_average<T>;
    const uint32_t low = chunk.begin + begin;
    const int n = std::min(kStandIns, end - begin);
    const int asked = ElementsAsked(n);
    for (int first = 0; first < n; first += asked) {
      FetchAhead(a, first);
      if (kAccumulated && chunk.accumulator) FetchAhead(a.accumulator, first);
      if (chunk.average) FetchAhead(a.average, first);
      const int last = std::min(first + asked, n);
#pragma GCC ivdep
      for (int i = first; i < last; ++i) {
        S p = Load(a.param[i]), average = Load(a.average[i]);
        S s[kSlots + 1];
        for (int k = 0; k < kSlots; ++k) s[k] = Load(a.slot[k][i]);
        const S grad = Load(a.grad[i]);
        S total;
        if constexpr (kAccumulated) {
          total = step.Total(p, grad, Load(a.accumulator[i]));
          Store(S(0), &a.accumulator[i]);
        } else {
          total = step.Total(p, grad);
        }
        step.template Apply<kScaled>(p, total, s);
        step.Average(p, average);
        const uint32_t bits = RandomBits(step.key, high, low + i);
        for (int k = 0; k < kSlots; ++k) {
          StoreRounded<kStochastic>(s[k], &a.slot[k][i], bits, k);
        }
        StoreRounded<kStochastic>(p, &a.param[i], bits, kSlots);
        StoreRounded<kStochastic>(average, &a.average[i], bits, 1 + kSlots);
      }
    }
  }
}

template <bool kStochastic, template <class> class Rule, class T, class SlotT>
void SweepRounded(const Step<Rule, Compute<T>>& step, const Chunk& chunk,
                  int begin, int end) {
  constexpr bool kRate = kHasRate<Rule<float>, float>;
  const bool full = chunk.accumulator || chunk.average;
  const auto sweep = [&](auto loop) { loop(step, chunk, begin, end); };
  if (kRate && step.options.scaled_proximal) {
    sweep(SweepFull<kStochastic, false, kRate, true, Rule, T, SlotT>);
  } else if (!step.IsSmooth()) {
    sweep(full ? SweepFull<kStochastic, false, false, true, Rule, T, SlotT>
               : SweepPlain<kStochastic, false, Rule, T, SlotT>);
  } else if (chunk.accumulator) {
    sweep(SweepFull<kStochastic, true, false, true, Rule, T, SlotT>);
  } else {
    // In a cache, the stand-in for an accumulator would add a third to it.
    sweep(full ? SweepFull<kStochastic, true, false, false, Rule, T, SlotT>
               : SweepPlain<kStochastic, true, Rule, T, SlotT>);
  }
}

template <template <class> class Rule, class T, class SlotT>
void SweepRule(const void* step_bytes, const Chunk& chunk, Sums* penalty) {
  const FloatMode mode;
  const auto& step = *static_cast<const Step<Rule, Compute<T>>*>(step_bytes);
  constexpr bool kBfloat16 =
      std::is_same_v<T, bfloat16> || std::is_same_v<SlotT, bfloat16>;
  const auto sweep = [&](int begin, int end) {
    (kBfloat16 && step.options.stochastic)
        ? SweepRounded<kBfloat16, Rule, T, SlotT>(step, chunk, begin, end)
        : SweepRounded<false, Rule, T, SlotT>(step, chunk, begin, end);
  };
  if (penalty) *penalty = {};
  if (!penalty || (step.l1 == 0 && step.l2_slope == 0)) {
    return sweep(0, chunk.n);
  }
  PenaltySums sums(step.l1 != 0);
  for (int begin = 0, end; begin < chunk.n; begin = end) {
    end = std::min<int64_t>(begin + kPenaltyBlock, chunk.n);
    sweep(begin, end);
    sums.Add(static_cast<const T*>(chunk.param) + begin, end - begin);
  }
  *penalty = sums.Total();
}

template <bool kSmooth, bool kMean, template <class> class Rule, class T,
          class SlotT>
Sums TrustSumsOf(const Step<Rule, Compute<T>> given, const Chunk& chunk) {
  using S = Compute<T>;
  const auto step = kSmooth ? given.Smooth() : given;
  constexpr int kSlots = Step<Rule, S>::kSlots;
  const Arrays<T, SlotT, kSlots> a(chunk, 0);
  const auto values = [&](int64_t i) {
    S s[kSlots + 1];
    for (int k = 0; k < kSlots; ++k) s[k] = Load(a.slot[k][i]);
    const S p = Load(a.param[i]), grad = Load(a.grad[i]);
    S total;
    if constexpr (kMean) {
      total = step.Total(p, grad, Load(a.accumulator[i]));
    } else {
      total = step.Total(p, grad);
    }
    return std::array{step.Decay(p), step.rule.Direction(step.Clip(total), s)};
  };
  if constexpr (kMean) return AddUpSquares(chunk.n, values, a, a.accumulator);
  return AddUpSquares(chunk.n, values, a);
}

template <template <class> class Rule, class T, class SlotT>
Sums TrustSums(const void* step_bytes, const Chunk& chunk) {
  const FloatMode mode;
  const auto& step = *static_cast<const Step<Rule, Compute<T>>*>(step_bytes);
  if (chunk.accumulator) {
    return TrustSumsOf<false, true, Rule, T, SlotT>(step, chunk);
  }
  return step.IsSmooth()
             ? TrustSumsOf<true, false, Rule, T, SlotT>(step, chunk)
             : TrustSumsOf<false, false, Rule, T, SlotT>(step, chunk);
}

template <template <class> class Rule, class T, class SlotT>
constexpr Sum TrustOf() {
  if constexpr (kHasTrust<Rule<float>>) {
    return &TrustSums<Rule, T, SlotT>;
  } else {
    return nullptr;
  }
}

template <class T>
Sums GradientSums(const void* step_bytes, const Chunk& chunk, bool penalty) {
  using S = Compute<T>;
  const FloatMode mode;
  const auto gradient = *static_cast<const Gradient<S>*>(step_bytes);
  const Arrays<T, T, 0> a(chunk, 0);
  const auto none = [](int64_t) { return Nothing(); };
  const auto absolute = [&](int64_t i) -> double {
    return Abs(Load(a.param[i]));
  };
  const auto square = [&](int64_t i) { return Square{Load(a.param[i])}; };
  const auto add_up = [&](const auto& total, const auto*... read) {
    const auto beside = [&](const auto& absolute, const auto& square) {
      const auto terms = [&](int64_t i) {
        const S g = total(i);
        // The square of a float does not overflow as a double, and tells by
        // itself whether all is finite.
        if constexpr (std::is_same_v<T, double>) {
          return std::tuple(Square{g}, absolute(i), square(i), g - g);
        } else {
          return std::tuple(Square{g}, absolute(i), square(i));
        }
      };
      return AddUp(chunk.n, terms, a.grad, read...);
    };
    if (!penalty || !chunk.param) return beside(none, none);
    if (gradient.l1 != 0) return beside(absolute, square);
    if (gradient.l2_slope != 0) return beside(none, square);
    return beside(none, none);
  };
  const auto with_penalty = [&](const auto& mean, const auto*... read) {
    const auto total = [&](int64_t i) {
      return mean(i) + gradient.Penalty(Load(a.param[i]));
    };
    return add_up(total, a.param, read...);
  };
  const auto mean = [&](int64_t i) {
    return gradient.Mean(Load(a.grad[i]), Load(a.accumulator[i]));
  };
  const auto scaled = [&](int64_t i) {
    return gradient.Scaled(Load(a.grad[i]));
  };
  if (chunk.param) {
    return chunk.accumulator ? with_penalty(mean, a.accumulator)
                             : with_penalty(scaled);
  }
  return chunk.accumulator ? add_up(mean, a.accumulator) : add_up(scaled);
}

template <DType dtype>
using TypeOf = typename Storage<dtype>::type;

template <template <class> class Rule>
constexpr SweepPerLayout kSweeps = {
#define LAYOUT(Param, Slot) \
  &SweepRule<Rule, TypeOf<k_##Param>, TypeOf<k_##Slot>>,
#include "rules/layouts.inc"
};

template <template <class> class Rule>
constexpr SumPerLayout kTrusts = {
#define LAYOUT(Param, Slot) \
  TrustOf<Rule, TypeOf<k_##Param>, TypeOf<k_##Slot>>(),
#include "rules/layouts.inc"
};

constexpr Kernels kKernels = {WDOPS_ISA,
                              kHasFma,
                              {
#define RULE(name, Class) kSweeps<Class>,
#include "rules/rules.inc"
                              },
                              {
#define RULE(name, Class) kTrusts<Class>,
#include "rules/rules.inc"
                              },
                              {
#define DTYPE(name, Type) &GradientSums<Type>,
#include "rules/dtypes.inc"
                              },
                              &kFactoredKernels,
                              &kActivationKernels,
                              &kStreamKernels};

}  // namespace
}  // namespace wdops::cpu

const wdops::cpu::Kernels* wdops_cpu_kernels() { return &wdops::cpu::kKernels; }
