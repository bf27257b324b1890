// The loop over a CPU's memory. Compiled once per instruction set, which the
// flags of the target and WDOPS_ISA name; nothing that is compiled here is
// visible to another library but wdops_cpu_kernels.
#include "cpu/sweep.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace wdops::cpu {
namespace {

// For its lifetime: round to nearest, flush subnormals to zero, as TensorFlow's
// threads do. A caller with NumPy arrays is none of them, and would get other
// bits; and slots that decay towards zero would stay subnormal for ever, at
// many times the cost of an element.
class FloatMode {
 public:
#if defined(__SSE2__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{1} << 24) : "memory");
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_) : "memory"); }

 private:
  uint64_t saved_;
#else
  FloatMode() {}
#endif
};

template <template <class> class Rule, class T>
void SweepRule(const void* step_bytes, int64_t n, void* param_bytes,
               const void* grad_bytes, void* const* slots) {
  using S = Compute<T>;
  constexpr int kSlots = Step<Rule, S>::kSlots;
  const FloatMode mode;
  const auto step = *static_cast<const Step<Rule, S>*>(step_bytes);
  T* const param = static_cast<T*>(param_bytes);
  const T* const grad = static_cast<const T*>(grad_bytes);
  T* slot[kSlots + 1];
  for (int k = 0; k < kSlots; ++k) slot[k] = static_cast<T*>(slots[k]);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    S p = Load(param[i]);
    S s[kSlots + 1];
    for (int k = 0; k < kSlots; ++k) s[k] = Load(slot[k][i]);
    step(p, Load(grad[i]), s);
    for (int k = 0; k < kSlots; ++k) Store(s[k], &slot[k][i]);
    Store(p, &param[i]);
  }
}

template <template <class> class Rule>
constexpr SweepPerDType kSweeps = {
#define DTYPE(name, Type) &SweepRule<Rule, Type>,
#include "rules/dtypes.inc"
};

constexpr Kernels kKernels = {WDOPS_ISA,
                              {
#define RULE(name, Class) kSweeps<Class>,
#include "rules/rules.inc"
                              }};

}  // namespace
}  // namespace wdops::cpu

const wdops::cpu::Kernels* wdops_cpu_kernels() { return &wdops::cpu::kKernels; }
