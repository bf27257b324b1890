// The loop over a GPU's memory: the same rules as cpu/sweep.cc, one thread an
// element. No TensorFlow here.
#include <cuda_runtime.h>

#include <algorithm>

#include "rules/table.h"

namespace wdops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

// One variable of a step. Null where there is no such array.
struct Arrays {
  int64_t n;  // elements
  DType dtype, slot_dtype;
  void* param;
  const void* grad;
  void* slot[kMaxSlots];
  void* accumulator;
  void* average;
};

// A kernel for each pair of storage types would be hundreds of them: a branch
// that all threads take alike costs nothing beside the memory.
template <class S>
__device__ S LoadAs(DType dtype, const void* from, int64_t i) {
  switch (dtype) {
#define DTYPE(name, Type) \
  case k_##name:          \
    return Load(static_cast<const Type*>(from)[i]);
#include "rules/dtypes.inc"
    default:
      return 0;
  }
}

template <class S>
__device__ void StoreAs(DType dtype, S value, void* to, int64_t i,
                        bool stochastic, uint32_t bits, int k) {
  switch (dtype) {
    case k_float32:
      return Store(static_cast<float>(value), static_cast<float*>(to) + i);
    case k_float64:
      return Store(static_cast<double>(value), static_cast<double*>(to) + i);
    case k_float16:
      return Store(static_cast<float>(value), static_cast<float16*>(to) + i);
    case k_bfloat16: {
      const float x = value;
      const uint32_t nearest = ToNearest(BitCast<uint32_t>(x));
      return Store(x, static_cast<bfloat16*>(to) + i,
                   stochastic ? Addend(bits, k) : nearest);
    }
    default:
      return;
  }
}

template <template <class> class Rule, class S>
__global__ void __launch_bounds__(kThreads)
    SweepKernel(const Step<Rule, S> step, const Arrays a) {
  constexpr int kSlots = Rule<float>::kSlots.size;
  constexpr bool kScaled = kHasRate<Rule<float>, float>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < a.n; i += stride) {
    S p = LoadAs<S>(a.dtype, a.param, i);
    S s[kSlots + 1];
    for (int k = 0; k < kSlots; ++k) {
      s[k] = LoadAs<S>(a.slot_dtype, a.slot[k], i);
    }
    const S grad = LoadAs<S>(a.dtype, a.grad, i);
    const S accumulated =
        a.accumulator ? LoadAs<S>(a.dtype, a.accumulator, i) : S(0);
    if (kScaled && step.options.scaled_proximal) {
      step.template Full<kScaled>(p, grad, s, accumulated);
    } else if (a.accumulator) {
      step.template Full<false>(p, grad, s, accumulated);
    } else {
      step.Plain(p, grad, s);
    }
    const bool stochastic = step.options.stochastic;
    const uint32_t bits = RandomBits(step.key, static_cast<uint32_t>(i >> 32),
                                     static_cast<uint32_t>(i));
    if (a.average) {
      S average = LoadAs<S>(a.dtype, a.average, i);
      step.Average(p, average);
      StoreAs(a.dtype, average, a.average, i, stochastic, bits, 1 + kSlots);
    }
    for (int k = 0; k < kSlots; ++k) {
      StoreAs(a.slot_dtype, s[k], a.slot[k], i, stochastic, bits, k);
    }
    StoreAs(a.dtype, p, a.param, i, stochastic, bits, kSlots);
    if (a.accumulator) {
      StoreAs(a.dtype, S(0), a.accumulator, i, false, bits, 0);
    }
  }
}

template <template <class> class Rule, class S>
int Launch(const void* step, const Arrays& arrays, cudaStream_t stream) {
  if (arrays.n == 0) return cudaSuccess;
  const int64_t blocks =
      std::min((arrays.n + kThreads - 1) / kThreads, kMaxBlocks);
  SweepKernel<Rule, S><<<blocks, kThreads, 0, stream>>>(
      *static_cast<const Step<Rule, S>*>(step), arrays);
  return cudaGetLastError();
}

using LaunchFunction = int (*)(const void*, const Arrays&, cudaStream_t);

constexpr LaunchFunction kTable[][2] = {
#define RULE(name, Class) {&Launch<Class, float>, &Launch<Class, double>},
#include "rules/rules.inc"
};

}  // namespace
}  // namespace wdops::cuda

// Steps `n` elements of one variable in the card's memory, as cpu::Sweep does
// on the host; returns a cudaError_t. `rule`, `dtype` and `slot_dtype` count as
// in rules.inc and dtypes.inc; `step` is read on the host; `accumulator` and
// `average` may be null.
extern "C" __attribute__((visibility("default"))) int wdops_cuda_sweep(
    int rule, int dtype, int slot_dtype, const void* step, int64_t n,
    void* param, const void* grad, void* const* slots, void* accumulator,
    void* average, cudaStream_t stream) {
  using namespace wdops;
  if (rule < 0 || rule >= kRuleCount || dtype < 0 || dtype >= kDTypeCount ||
      FindLayout(static_cast<DType>(dtype), static_cast<DType>(slot_dtype)) ==
          kLayoutCount) {
    return cudaErrorInvalidValue;
  }
  cuda::Arrays arrays{n,
                      static_cast<DType>(dtype),
                      static_cast<DType>(slot_dtype),
                      param,
                      grad,
                      {},
                      accumulator,
                      average};
  for (int k = 0; k < kRules[rule].slots.size; ++k) arrays.slot[k] = slots[k];
  return cuda::kTable[rule][dtype == k_float64](step, arrays, stream);
}
