// How a kernel's floating-point arithmetic rounds, and what becomes of
// subnormals.
#pragma once

#include <cstdint>

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

}  // namespace
}  // namespace wdops::cpu
