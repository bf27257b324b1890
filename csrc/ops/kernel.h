// What the CPU kernels of all ops need: the instruction set in use, and the
// threads that share the work.
#pragma once

#include "cpu/claims.h"
#include "cpu/dispatch.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/threadpool.h"

namespace wdops {

inline char* Data(const tensorflow::Tensor& tensor) {
  return static_cast<char*>(tensor.data());
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
