// The step of every rule over a card's memory: one launch for all variables,
// from the same rules as cpu/sweep.cc.
#include "cuda/sums.h"

namespace wdops::cuda {
namespace {

// Vector `lane` of a piece: where it is in the gradient and in all other
// arrays.
template <class S>
__device__ bool FindPlace(const Variable& v, int piece, int lane, Place* grad,
                          Place* place) {
  int64_t column, row_begin = 0, place_begin = 0;
  if (v.IsFactored()) {
    const int across = v.across;  // fewer than there are blocks in a grid
    const int64_t row =
        int64_t{piece / across} * kTileRows + lane / kTileVectors;
    if (row >= v.height) return false;
    column = int64_t{piece % across} * kTileColumns<S> +
             lane % kTileVectors * kWidth<S>;
    row_begin = place_begin = row * v.width;
  } else {
    int64_t vector = int64_t{piece} * (kThreads * kVectors) + lane;
    if (v.rows) {
      const int64_t row = vector / v.across;
      if (row >= v.height) return false;
      vector -= row * v.across;
      row_begin = row * v.width;
      place_begin = v.rows[row] * v.width;
    }
    column = vector * kWidth<S>;
  }
  if (column >= v.width) return false;
  const int64_t left = v.width - column;
  const int count = left < kWidth<S> ? left : kWidth<S>;
  *grad = {row_begin + column, count,
           static_cast<bool>(v.aligned & (count == kWidth<S>))};
  *place = {place_begin + column, grad->count, grad->whole};
  return true;
}

// As Find, by all threads of a block together: so a block does not begin with a
// load that waits for another for every bit of `count`. Not inlined: a kernel
// that needs all registers would find one fewer.
__device__ __noinline__ int FindTogether(const int64_t* first, int count,
                                         int64_t at) {
  __shared__ int found;
  int64_t low = 0, step = count;
  while (step > 1) {
    step = Ceil(step, kThreads);
    const int64_t begin = low + threadIdx.x * step;
    const int64_t end = begin + step < count ? begin + step : count;
    if (begin < end && first[begin] <= at && at < first[end]) found = begin;
    __syncthreads();
    low = found;
    __syncthreads();
  }
  return low;
}

// Copies whole words, each of which a thread moves.
template <int kBytes>
__device__ void Copy(const void* from, void* to) {
  constexpr int kWords = kBytes / sizeof(uint32_t);
  static_assert(kBytes % sizeof(uint32_t) == 0 && kWords <= kThreads);
  const int w = threadIdx.x;
  if (w >= kWords) return;
  static_cast<uint32_t*>(to)[w] = static_cast<const uint32_t*>(from)[w];
}

// What the registers of a multiprocessor must do for: with as many threads, and
// their loads under way, its share of the memory is busy.
template <class S>
constexpr int kBlocks = std::is_same_v<S, double> ? 2 : 4;

// The variable and the constants lie in shared memory, and all else is reached
// by pointers of which the compiler does not know that they are not: so it
// reads them where they are used, and keeps no registers for them.
template <template <class> class Rule, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    SweepKernel(const Table* table, const Steps* steps, const Scales scales) {
  constexpr int kSlots = Step<Rule, S>::kSlots;
  constexpr bool kRate = kHasRate<Rule<S>, S>;
  constexpr bool kDouble = std::is_same_v<S, double>;
  __shared__ Variable v;
  __shared__ AnyStep any_step;
  const int variable =
      FindTogether(table->FirstPiece(), table->count, blockIdx.x);
  // A grid has fewer blocks than 2^31.
  const int piece = blockIdx.x - table->FirstPiece()[variable];
  const OneStep& one = *steps->Of(variable, kDouble);
  Copy<sizeof v>(&table->Variables()[variable], &v);
  Copy<sizeof(Step<Rule, S>)>(one.step.bytes, any_step.bytes);
  __syncthreads();
  if (v.IsDouble() != kDouble) return;
  auto& step = *reinterpret_cast<Step<Rule, S>*>(any_step.bytes);
  if (scales.grad || scales.clip) {
    if (threadIdx.x == 0) scales.Scale(one, variable, &step);
    __syncthreads();
  }
  if (v.IsFactored()) FormTile<S>(v, piece);

#pragma unroll 1
  for (int j = 0; j < kVectors; ++j) {
    const int lane = j * kThreads + threadIdx.x;
    Place at_grad, at;
    if (!FindPlace<S>(v, piece, lane, &at_grad, &at)) return;
    Raw<S> raw_grad, raw_slot[kSlots + 1], raw_accumulator = {};
    const Raw<S> raw_param = LoadRaw<S>(v.bytes, v.param, at);
    if (!v.IsFactored()) raw_grad = LoadRaw<S>(v.bytes, v.grad, at_grad);
    for (int k = 0; k < kSlots; ++k) {
      raw_slot[k] = LoadRaw<S>(v.slot_bytes, v.slot[k], at);
    }
    if (v.accumulator) {
      raw_accumulator = LoadRaw<S>(v.bytes, v.accumulator, at);
    }

    Vector<S> param = Convert<S>(v.dtype, raw_param), total, slot[kSlots + 1];
    total = v.IsFactored() ? SharedRoom<S>().tile[lane]
                           : Convert<S>(v.dtype, raw_grad);
    if (v.accumulator) {
      const auto accumulator = Convert<S>(v.dtype, raw_accumulator);
      for (int w = 0; w < kWidth<S>; ++w) {
        total.of[w] = step.Mean(total.of[w], accumulator.of[w]);
      }
    } else {
      for (int w = 0; w < kWidth<S>; ++w) {
        total.of[w] = step.Scaled(total.of[w]);
      }
    }
    for (int k = 0; k < kSlots; ++k) {
      slot[k] = Convert<S>(v.slot_dtype, raw_slot[k]);
    }
    const bool scaled = kRate && step.options.scaled_proximal;
    const auto move = [&](const auto& step, bool scaled) {
      for (int w = 0; w < kWidth<S>; ++w) {
        S s[kSlots + 1];
        for (int k = 0; k < kSlots; ++k) s[k] = slot[k].of[w];
        const S penalty = step.Penalty(param.of[w]);
        const S p = step.Move(param.of[w], total.of[w] + penalty, s);
        param.of[w] = scaled ? step.template Proximal<kRate>(p, s)
                             : step.template Proximal<false>(p, s);
        for (int k = 0; k < kSlots; ++k) slot[k].of[w] = s[k];
      }
    };
    if (!scaled && step.IsSmooth()) {
      move(step.Smooth(), false);
    } else {
      move(step, scaled);
    }

    Rounding<S> rounding = {step.options.stochastic};
    if (rounding.stochastic) {
      for (int w = 0; w < kWidth<S>; ++w) {
        const int64_t element = at.at + w;
        rounding.bits[w] =
            RandomBits(step.key, static_cast<uint32_t>(element >> 32),
                       static_cast<uint32_t>(element));
      }
    }
    for (int k = 0; k < kSlots; ++k) {
      const auto raw = Convert(v.slot_dtype, slot[k], rounding, k);
      StoreRaw(v.slot_bytes, raw, v.slot[k], at);
    }
    if (v.average) {
      auto average = Convert<S>(v.dtype, LoadRaw<S>(v.bytes, v.average, at));
      for (int w = 0; w < kWidth<S>; ++w) {
        step.Average(param.of[w], average.of[w]);
      }
      const auto raw = Convert(v.dtype, average, rounding, 1 + kSlots);
      StoreRaw(v.bytes, raw, v.average, at);
    }
    if (v.accumulator) {
      StoreRaw(v.bytes, Raw<S>{}, v.accumulator, at);  // 0 in every type
    }
    const auto raw = Convert(v.dtype, param, rounding, kSlots);
    StoreRaw(v.bytes, raw, v.param, at);
  }
}

template <template <class> class Rule>
struct FinishTrust {
  template <class S>
  using Terms = TrustTerms<Rule, S>;

  Steps* steps;

  __device__ void operator()(int variable, const Variable& v,
                             const Sums& sums) const {
    std::byte* const step = steps->Of(variable, v.IsDouble())->step.bytes;
    const double trust = TrustRatio(sums);
    if (v.IsDouble()) {
      reinterpret_cast<Step<Rule, double>*>(step)->rule.trust = trust;
    } else {
      reinterpret_cast<Step<Rule, float>*>(step)->rule.trust = trust;
    }
  }
};

struct FinishPenalty {
  const Steps* steps;
  double* penalty;

  __device__ void operator()(int variable, const Variable& v,
                             const Sums& sums) const {
    const double* const hyper = steps->Of(variable, v.IsDouble())->gradient;
    penalty[variable] = PenaltyOf(hyper[kL1], hyper[kL2], sums.a, sums.b);
  }
};

template <template <class> class Rule>
cudaError_t Sweep(const Table& host_table, const Table* table, Steps* steps,
                  const Scales& scales, void* scratch, cudaStream_t stream) {
  if constexpr (kHasTrust<Rule<float>>) {
    const cudaError_t error = SumUp<FinishTrust<Rule>::template Terms>(
        host_table, table, steps, scales, scratch, FinishTrust<Rule>{steps},
        stream);
    if (error != cudaSuccess) return error;
  }
  if (host_table.has_float) {
    const cudaError_t error =
        Launch(&SweepKernel<Rule, float>, host_table.Pieces(), kThreads, stream,
               table, steps, scales);
    if (error != cudaSuccess) return error;
  }
  if (!host_table.has_double) return cudaSuccess;
  return Launch(&SweepKernel<Rule, double>, host_table.Pieces(), kThreads,
                stream, table, steps, scales);
}

constexpr decltype(&Sweep<Sgd>) kSweeps[] = {
#define RULE(name, Class) &Sweep<Class>,
#include "rules/rules.inc"
};

bool HasArrays(const Table& table, int slots) {
  for (int i = 0; i < table.count; ++i) {
    const Variable& v = table.Variables()[i];
    if (v.n == 0) continue;
    if (!v.param) return false;
    for (int k = 0; k < slots; ++k) {
      if (!v.slot[k]) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace wdops::cuda

using namespace wdops;
using namespace wdops::cuda;

int wdops_cuda_apply(int rule, const void* host_table_bytes,
                     const void* table_bytes, void* steps_bytes,
                     const double* grad_scale, int grad_scales,
                     const double* clip_scale, int clip_scales, double* penalty,
                     void* scratch, WdopsStream stream) {
  const Table& host_table = *static_cast<const Table*>(host_table_bytes);
  if (rule < 0 || rule >= kRuleCount ||
      !HasArrays(host_table, kRules[rule].slots.size)) {
    return cudaErrorInvalidValue;
  }
  const Table* const table = static_cast<const Table*>(table_bytes);
  Steps* const steps = static_cast<Steps*>(steps_bytes);
  const Scales scales{grad_scale, grad_scales != 0, clip_scale,
                      clip_scales != 0};
  const cudaError_t error =
      kSweeps[rule](host_table, table, steps, scales, scratch, stream);
  if (error != cudaSuccess || !penalty) return error;
  return SumUp<PenaltyTerms>(host_table, table, steps, scales, scratch,
                             FinishPenalty{steps, penalty}, stream);
}
