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

// How many elements are staged at a time where a chunk lacks an array: a
// scratch array, which stays in L1, stands for it.
constexpr int64_t kBlock = 1024;

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

// What most steps are: no accumulator, no average, one direct loop. The step is
// taken by value here, so that no store can change it and its constants stay in
// registers.
template <bool kStochastic, bool kSmooth, template <class> class Rule, class T,
          class SlotT>
void SweepPlain(const Step<Rule, Compute<T>> given, const Chunk& chunk) {
  using S = Compute<T>;
  const auto step = kSmooth ? given.Smooth() : given;
  constexpr int kSlots = Step<Rule, S>::kSlots;
  const Arrays<T, SlotT, kSlots> a(chunk, 0);
  const uint32_t high = static_cast<uint64_t>(chunk.begin) >> 32;
  const uint32_t low = chunk.begin;
  const int n = chunk.n, asked = ElementsAsked(n);
  for (int begin = 0; begin < n; begin += asked) {
    FetchAhead(a, begin);
    const int end = std::min(begin + asked, n);
#pragma GCC ivdep
    for (int i = begin; i < end; ++i) {
      S p = Load(a.param[i]);
      S s[kSlots + 1];
      for (int k = 0; k < kSlots; ++k) s[k] = Load(a.slot[k][i]);
      step.Plain(p, Load(a.grad[i]), s);
      const uint32_t bits = RandomBits(step.key, high, low + i);
      for (int k = 0; k < kSlots; ++k) {
        StoreRounded<kStochastic>(s[k], &a.slot[k][i], bits, k);
      }
      StoreRounded<kStochastic>(p, &a.param[i], bits, kSlots);
    }
  }
}

// Steps elements [begin, end). With kSquares, those are a multiple of kLanes,
// and the squares of the parameter are added up.
template <bool kStochastic, bool kSmooth, bool kScaled, bool kSquares,
          template <class> class Rule, class T, class SlotT>
void SweepFull(const Step<Rule, Compute<T>> given, const Chunk& chunk,
               int64_t begin, int64_t end, double* squares = nullptr) {
  if (begin == end) return;
  using S = Compute<T>;
  auto step = kSmooth ? given.Smooth() : given;
  constexpr int kSlots = Step<Rule, S>::kSlots;
  static_assert(kBlock % kLanes == 0);
  T no_accumulator[kBlock] = {}, no_average[kBlock] = {};
  // What stands for a list that there is not must not count.
  if (!chunk.accumulator) step.accumulation_scale = 0;
  if (!chunk.average) step.ema_overwrite = 0;
  const uint32_t high = static_cast<uint64_t>(chunk.begin) >> 32;
  for (; begin < end; begin += kBlock) {
    Arrays<T, SlotT, kSlots> a(chunk, begin);
    if (!chunk.accumulator) a.accumulator = no_accumulator;
    if (!chunk.average) a.average = no_average;
    const uint32_t low = chunk.begin + begin;
    const int n = std::min(kBlock, end - begin);
    const auto element = [&](int i) {
      S p = Load(a.param[i]), average = Load(a.average[i]);
      S s[kSlots + 1];
      for (int k = 0; k < kSlots; ++k) s[k] = Load(a.slot[k][i]);
      step.template Full<kScaled>(p, Load(a.grad[i]), s,
                                  Load(a.accumulator[i]));
      step.Average(p, average);
      const uint32_t bits = RandomBits(step.key, high, low + i);
      for (int k = 0; k < kSlots; ++k) {
        StoreRounded<kStochastic>(s[k], &a.slot[k][i], bits, k);
      }
      StoreRounded<kStochastic>(p, &a.param[i], bits, kSlots);
      StoreRounded<kStochastic>(average, &a.average[i], bits, 1 + kSlots);
      Store(S(0), &a.accumulator[i]);
    };
    const int asked = kSquares ? kLanes : ElementsAsked(n);
    for (int i = 0; i < n; i += asked) {
      FetchAhead(a, i);
      if (chunk.accumulator) FetchAhead(a.accumulator, i);
      if (chunk.average) FetchAhead(a.average, i);
      const int last = std::min(i + asked, n);
#pragma GCC ivdep
      for (int j = i; j < last; ++j) element(j);
      if constexpr (kSquares) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const double p = a.param[i + lane];
          squares[lane] += p * p;
        }
      }
    }
  }
}

template <bool kStochastic, bool kSmooth, template <class> class Rule, class T,
          class SlotT>
void SweepRounded(const Step<Rule, Compute<T>>& step, const Chunk& chunk) {
  constexpr bool kRate = kHasRate<Rule<float>, float>;
  if (kRate && step.options.scaled_proximal) {
    SweepFull<kStochastic, false, kRate, false, Rule, T, SlotT>(step, chunk, 0,
                                                                chunk.n);
  } else if (chunk.accumulator || chunk.average) {
    SweepFull<kStochastic, kSmooth, false, false, Rule, T, SlotT>(step, chunk,
                                                                  0, chunk.n);
  } else {
    SweepPlain<kStochastic, kSmooth, Rule, T, SlotT>(step, chunk);
  }
}

// The sum of the squares of the new parameter, which is made while the sweep
// waits for memory: in a loop of its own it takes 3 % of a large step.
template <bool kSmooth, template <class> class Rule, class T, class SlotT>
double SweepSquares(const Step<Rule, Compute<T>>& step, const Chunk& chunk) {
  double lanes[kLanes] = {};
  const int64_t whole = chunk.n - chunk.n % kLanes;
  SweepFull<false, kSmooth, false, true, Rule, T, SlotT>(step, chunk, 0, whole,
                                                         lanes);
  SweepFull<false, kSmooth, false, false, Rule, T, SlotT>(step, chunk, whole,
                                                          chunk.n);
  for (int64_t i = whole; i < chunk.n; ++i) {
    const double p = static_cast<const T*>(chunk.param)[i];
    lanes[i - whole] += p * p;
  }
  return AddLanes(lanes);
}

template <class T>
Sums PenaltySums(const void* gradient_bytes, const Chunk& chunk) {
  const FloatMode mode;
  const auto& gradient =
      *static_cast<const Gradient<Compute<T>>*>(gradient_bytes);
  const T* param = static_cast<const T*>(chunk.param);
  if (gradient.l1 == 0 && gradient.l2_slope == 0) return {};
  if (gradient.l1 == 0) {
    const auto square = [&](int64_t i) {
      const double p = Load(param[i]);
      return std::array{p * p};
    };
    return {0, AddUp(chunk.n, square, param).a};
  }
  const auto both = [&](int64_t i) {
    const double p = Load(param[i]);
    return std::array{Abs(p), p * p};
  };
  return AddUp(chunk.n, both, param);
}

template <bool kSmooth, template <class> class Rule, class T, class SlotT>
void SweepKnown(const Step<Rule, Compute<T>>& step, const Chunk& chunk,
                Sums* penalty) {
  constexpr bool kBfloat16 =
      std::is_same_v<T, bfloat16> || std::is_same_v<SlotT, bfloat16>;
  const bool stochastic = kBfloat16 && step.options.stochastic;
  if constexpr (std::is_same_v<T, Compute<T>>) {
    if (penalty && step.l1 == 0 && step.l2_slope != 0 && !stochastic &&
        !step.options.scaled_proximal) {
      *penalty = {0, SweepSquares<kSmooth, Rule, T, SlotT>(step, chunk)};
      return;
    }
  }
  if (stochastic) {
    SweepRounded<kBfloat16, kSmooth, Rule, T, SlotT>(step, chunk);
  } else {
    SweepRounded<false, kSmooth, Rule, T, SlotT>(step, chunk);
  }
  if (penalty) *penalty = PenaltySums<T>(&step, chunk);
}

template <template <class> class Rule, class T, class SlotT>
void SweepRule(const void* step_bytes, const Chunk& chunk, Sums* penalty) {
  const FloatMode mode;
  const auto& step = *static_cast<const Step<Rule, Compute<T>>*>(step_bytes);
  step.IsSmooth() ? SweepKnown<true, Rule, T, SlotT>(step, chunk, penalty)
                  : SweepKnown<false, Rule, T, SlotT>(step, chunk, penalty);
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
Sums GradientSums(const void* step_bytes, const Chunk& chunk) {
  using S = Compute<T>;
  const FloatMode mode;
  const auto gradient = *static_cast<const Gradient<S>*>(step_bytes);
  const Arrays<T, T, 0> a(chunk, 0);
  const auto mean = [&](int64_t i) {
    return gradient.Mean(Load(a.grad[i]), Load(a.accumulator[i]));
  };
  const auto scaled = [&](int64_t i) {
    return gradient.Scaled(Load(a.grad[i]));
  };
  // The square of a float does not overflow as a double, and tells by itself
  // whether all is finite.
  const auto squares = [&](const auto& total, const auto*... read) {
    const auto terms = [&](int64_t i) {
      const double g = total(i);
      if constexpr (std::is_same_v<T, double>) {
        return std::array{g * g, 0.0, 0.0, g - g};
      } else {
        return std::array{g * g};
      }
    };
    return AddUp(chunk.n, terms, a.grad, read...);
  };
  const auto with_penalty = [&](const auto& total, const auto*... read) {
    const auto sums = [&](const auto&... of_param) {
      const auto terms = [&](int64_t i) {
        const S param = Load(a.param[i]);
        const double g = total(i) + gradient.Penalty(param);
        if constexpr (std::is_same_v<T, double>) {
          return std::array{g * g, of_param(param)..., g - g};
        } else {
          return std::array{g * g, of_param(param)...};
        }
      };
      return AddUp(chunk.n, terms, a.grad, a.param, read...);
    };
    const auto square = [](double p) { return p * p; };
    if (gradient.l1 != 0) return sums([](double p) { return Abs(p); }, square);
    const Sums found = sums(square);
    return Sums{found.a, 0, found.b, found.c};
  };
  if (chunk.param) {
    return chunk.accumulator ? with_penalty(mean, a.accumulator)
                             : with_penalty(scaled);
  }
  return chunk.accumulator ? squares(mean, a.accumulator) : squares(scaled);
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

#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

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
