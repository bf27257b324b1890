// What the CPU kernels of all ops need: the instruction set in use, and the
// threads that share the work.
#pragma once

#include <algorithm>
#include <atomic>

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
// work that reads and writes so many bytes in all.
template <class Run>
void Share(tensorflow::OpKernelContext* ctx, int64_t count, int64_t bytes,
           const Run& run) {
  // A core moves about 8 bytes a cycle, and waking a thread costs as much as
  // 2^17 cycles of sweeping.
  auto* pool = ctx->device()->tensorflow_cpu_worker_threads()->workers;
  const int64_t threads =
      std::min<int64_t>({pool->NumThreads(), count, 1 + (bytes / 8 >> 17)});
  // Each thread claims a share of what is left: long runs at first, which the
  // processor prefetches through, and single steps at the end, so that little
  // is waited for where one thread is slow.
  std::atomic<int64_t> claimed{0};
  const auto work = [&](int64_t, int64_t) {
    int64_t begin = claimed;
    while (begin < count) {
      const int64_t end =
          begin + std::max<int64_t>(1, (count - begin) / (2 * threads));
      if (!claimed.compare_exchange_weak(begin, end)) continue;
      run(begin, end);
      begin = claimed;
    }
  };
  if (count == 0) return;
  pool->ParallelFor(threads,
                    tensorflow::thread::ThreadPool::SchedulingParams::Fixed(1),
                    work);
}

}  // namespace wdops
