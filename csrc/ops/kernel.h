// What the CPU kernels of all ops need: the instruction set in use, and the
// threads that share the work.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/claims.h"
#include "cpu/dispatch.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/threadpool.h"

namespace wdops {

inline char* Data(const tensorflow::Tensor& tensor) {
  return static_cast<char*>(tensor.data());
}

// Asks for large pages where a tensor has just been allocated and is about to
// be written. malloc maps memory of its own for one of more than 32 MiB, and
// gives it back with the tensor: then the system clears pages in every step,
// and takes three quarters of its time for the faults of small ones.
inline void AskForLargePages(const tensorflow::Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kBytes = 2 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(Data(fresh));
  const uintptr_t begin = (data + kBytes - 1) / kBytes * kBytes;
  const uintptr_t end = (data + fresh.TotalBytes()) / kBytes * kBytes;
  // A hint: it may fail, and the pages are then small.
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

inline absl::Status FindKernels(const cpu::Kernels** kernels) {
  *kernels = cpu::ActiveKernels();
  if (*kernels) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "no instruction set is in use: import wdops before the op runs");
}

// Calls run(begin, end) in TensorFlow's pool until [0, count) is covered, for
// work that takes as long as to read and write so many bytes.
template <class Run>
void Share(tensorflow::OpKernelContext* ctx, int64_t count, int64_t bytes,
           const Run& run) {
  auto* pool = ctx->device()->tensorflow_cpu_worker_threads()->workers;
  cpu::ShareAmong(
      cpu::WorthWaking(pool->NumThreads(), count, bytes), count,
      [&](auto task) { pool->Schedule(std::move(task)); }, run);
}

}  // namespace wdops
