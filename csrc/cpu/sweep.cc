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

// How many elements are swept at a time by the loop of another type. With all
// their arrays they stay in L1; of 512, the loads from memory came too late.
constexpr int kBlock = 256;

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

// Below, loops over slots are told to be unrolled: GCC does so by itself at -O3
// alone, and with a loop in it a loop over elements is not vectorized.

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
#pragma GCC unroll 8
      for (int k = 0; k < kSlots; ++k) s[k] = Load(a.slot[k][i]);
      step.template Apply<false>(p, step.Total(p, Load(a.grad[i])), s);
      const uint32_t bits = RandomBits(step.key, high, low + i);
#pragma GCC unroll 8
      for (int k = 0; k < kSlots; ++k) {
        StoreRounded<kStochastic>(s[k], &a.slot[k][i], bits, k);
      }
      StoreRounded<kStochastic>(p, &a.param[i], bits, kSlots);
    }
  }
}

// Every step but stochastic ones. Without kAccumulated, only one that has no
// accumulator.
template <bool kSmooth, bool kScaled, bool kAccumulated,
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
  for (; begin < end; begin += kStandIns) {
    Arrays<T, SlotT, kSlots> a(chunk, begin);
    if (!chunk.accumulator) a.accumulator = no_accumulator<T>;
    if (!chunk.average) a.average = no_average<T>;
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
#pragma GCC unroll 8
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
#pragma GCC unroll 8
        for (int k = 0; k < kSlots; ++k) Store(s[k], &a.slot[k][i]);
        Store(p, &a.param[i]);
        Store(average, &a.average[i]);
      }
    }
  }
}

// n numbers of an array as S: themselves where they are, else in `room`.
template <class T, class S>
S* Widen(T* from, int n, S* room) {
  if constexpr (std::is_same_v<std::remove_const_t<T>, S>) {
    return const_cast<S*>(from);  // a sweep only reads the gradient
  } else {
    // Unlike FetchAhead on every processor: between two blocks of an array,
    // none loads it ahead by itself.
    for (int i = 0; i < kBlock; i += kLine / sizeof(T)) {
      __builtin_prefetch(from + kBlock + i);
    }
    for (int i = 0; i < n; ++i) room[i] = Load(from[i]);
    return room;
  }
}

// Stores tensor k, if Widen has made others of its numbers.
template <bool kStochastic, int k, class S, class T>
void Narrow(const void* widened, int n, const uint32_t* bits, T* to) {
  if constexpr (!std::is_same_v<T, S>) {
    const S* const from = static_cast<const S*>(widened);
    for (int i = 0; i < n; ++i) {
      StoreRounded<kStochastic>(from[i], &to[i], kStochastic ? bits[i] : 0, k);
    }
  }
}

template <bool kStochastic, class S, class T, class SlotT, int... k>
void NarrowAll(const Chunk& block, const uint32_t* bits,
               const Arrays<T, SlotT, sizeof...(k)>& a,
               std::integer_sequence<int, k...>) {
  constexpr int kSlots = sizeof...(k);
  const int n = block.n;
  (Narrow<kStochastic, k, S>(block.slot[k], n, bits, a.slot[k]), ...);
  Narrow<kStochastic, kSlots, S>(block.param, n, bits, a.param);
  if (block.average) {
    Narrow<kStochastic, 1 + kSlots, S>(block.average, n, bits, a.average);
  }
}

// A step of what is stored otherwise than it is computed in, by `sweep`, the
// step of what is not: for the rarer ones, of which there would else be more
// loops than of all others. Every rule shares this one.
template <bool kStochastic, int kSlots, class T, class SlotT>
void SweepInBlocks(void (*sweep)(const void*, const Chunk&), const void* step,
                   const Key<uint32_t>& key, const Chunk& chunk, int begin,
                   int end) {
  using S = Compute<T>;
  S room[kSlots + 4][kBlock];
  for (; begin < end; begin += kBlock) {
    const int n = std::min(kBlock, end - begin);
    const Arrays<T, SlotT, kSlots> a(chunk, begin);
    Chunk block = {chunk.begin + begin, n};
    block.param = Widen(a.param, n, room[0]);
    block.grad = Widen(a.grad, n, room[1]);
    for (int k = 0; k < kSlots; ++k) {
      block.slot[k] = Widen(a.slot[k], n, room[2 + k]);
    }
    if (chunk.accumulator) {
      block.accumulator = Widen(a.accumulator, n, room[kSlots + 2]);
    }
    if (chunk.average) {
      block.average = Widen(a.average, n, room[kSlots + 3]);
    }
    sweep(step, block);
    uint32_t bits[kBlock];
    if constexpr (kStochastic) {
      const uint32_t high = static_cast<uint64_t>(chunk.begin) >> 32;
      const uint32_t low = block.begin;
      for (int i = 0; i < n; ++i) bits[i] = RandomBits(key, high, low + i);
    }
    NarrowAll<kStochastic, S>(block, bits, a,
                              std::make_integer_sequence<int, kSlots>());
    if (chunk.accumulator) std::fill_n(a.accumulator, n, T{});
  }
}

template <bool kStochastic, template <class> class Rule, class T, class SlotT>
void SweepRounded(const Step<Rule, Compute<T>>& step, const Chunk& chunk,
                  int begin, int end) {
  using S = Compute<T>;
  constexpr bool kIsComputed = std::is_same_v<T, S> && std::is_same_v<SlotT, S>;
  // The integer arithmetic of a half takes too many registers for a step beside
  // it: in blocks most steps took 0.65 to 1.15 times as long.
  constexpr bool kHalf =
      std::is_same_v<T, float16> || std::is_same_v<SlotT, float16>;
  constexpr bool kRate = kHasRate<Rule<S>, S>;
  const bool scaled = kRate && step.options.scaled_proximal;
  const bool full = chunk.accumulator || chunk.average;
  const auto sweep = [&](auto loop) { loop(step, chunk, begin, end); };
  const bool smooth = step.IsSmooth();
  if constexpr (!kHalf) {
    if (!full && smooth && !scaled) {
      return sweep(SweepPlain<kStochastic, true, Rule, T, SlotT>);
    }
  }
  if constexpr (!kHalf && !kStochastic) {
    if (!full && !scaled)
      return sweep(SweepPlain<false, false, Rule, T, SlotT>);
    if (smooth && !scaled) {
      // In a cache, the stand-in for an accumulator would add a third to it.
      return sweep(chunk.accumulator
                       ? SweepFull<true, false, true, Rule, T, SlotT>
                       : SweepFull<true, false, false, Rule, T, SlotT>);
    }
  }
  if constexpr (kIsComputed) {
    sweep(scaled ? SweepFull<false, kRate, true, Rule, T, SlotT>
                 : SweepFull<false, false, true, Rule, T, SlotT>);
  } else {
    SweepInBlocks<kStochastic, Step<Rule, S>::kSlots, T, SlotT>(
        [](const void* step, const Chunk& block) {
          SweepRounded<false, Rule, S, S>(
              *static_cast<const Step<Rule, S>*>(step), block, 0, block.n);
        },
        &step, step.key, chunk, begin, end);
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
#pragma GCC unroll 8
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
