// The loop over a GPU's memory: the same rules as cpu/sweep.cc, one thread an
// element. No TensorFlow here.
#include <cuda_runtime.h>

#include <algorithm>

#include "rules/table.h"

namespace wdops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

template <int kSlots>
struct SlotPointers {
  void* slot[kSlots + 1];
};

template <template <class> class Rule, class T>
__global__ void __launch_bounds__(kThreads)
    SweepKernel(const Step<Rule, Compute<T>> step, int64_t n, T* param,
                const T* grad, SlotPointers<Rule<float>::kSlots.size> slots) {
  using S = Compute<T>;
  constexpr int kSlots = Rule<float>::kSlots.size;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < n; i += stride) {
    S p = Load(param[i]);
    S s[kSlots + 1];
    for (int k = 0; k < kSlots; ++k) {
      s[k] = Load(static_cast<T*>(slots.slot[k])[i]);
    }
    step(p, Load(grad[i]), s);
    for (int k = 0; k < kSlots; ++k) {
      Store(s[k], static_cast<T*>(slots.slot[k]) + i);
    }
    Store(p, param + i);
  }
}

template <template <class> class Rule, class T>
int Launch(const void* step, int64_t n, void* param, const void* grad,
           void* const* slots, cudaStream_t stream) {
  constexpr int kSlots = Rule<float>::kSlots.size;
  if (n == 0) return cudaSuccess;
  SlotPointers<kSlots> pointers;
  for (int k = 0; k < kSlots; ++k) pointers.slot[k] = slots[k];
  const int64_t blocks = std::min((n + kThreads - 1) / kThreads, kMaxBlocks);
  SweepKernel<Rule, T><<<blocks, kThreads, 0, stream>>>(
      *static_cast<const Step<Rule, Compute<T>>*>(step), n,
      static_cast<T*>(param), static_cast<const T*>(grad), pointers);
  return cudaGetLastError();
}

using LaunchFunction = int (*)(const void*, int64_t, void*, const void*,
                               void* const*, cudaStream_t);

template <template <class> class Rule>
constexpr std::array<LaunchFunction, kDTypeCount> kLaunches = {
#define DTYPE(name, Type) &Launch<Rule, Type>,
#include "rules/dtypes.inc"
};

constexpr std::array<LaunchFunction, kDTypeCount> kTable[] = {
#define RULE(name, Class) kLaunches<Class>,
#include "rules/rules.inc"
};

}  // namespace
}  // namespace wdops::cuda

// Steps `n` elements of one variable in the card's memory, as cpu::Sweep does
// on the host; returns a cudaError_t. `rule` and `dtype` count as in rules.inc
// and dtypes.inc; `step` is read on the host.
extern "C" __attribute__((visibility("default"))) int wdops_cuda_sweep(
    int rule, int dtype, const void* step, int64_t n, void* param,
    const void* grad, void* const* slots, cudaStream_t stream) {
  using wdops::cuda::kTable;
  if (rule < 0 || rule >= wdops::kRuleCount || dtype < 0 ||
      dtype >= wdops::kDTypeCount) {
    return cudaErrorInvalidValue;
  }
  return kTable[rule][dtype](step, n, param, grad, slots, stream);
}
