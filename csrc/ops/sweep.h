// Variables and chunks for the CPU kernels of the ops: lookup, locks, and
// threads that share the chunks of many variables.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/dispatch.h"
#include "ops/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/platform/mutex.h"
#include "tensorflow/core/platform/threadpool.h"

namespace wdops {

using Vars = std::vector<tensorflow::core::RefCountPtr<tensorflow::Var>>;

inline char* Data(const tensorflow::Tensor& tensor) {
  return static_cast<char*>(tensor.data());
}

inline absl::Status FindKernels(const cpu::Kernels** kernels) {
  *kernels = cpu::ActiveKernels();
  if (*kernels) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "no instruction set is in use: import wdops before the op runs");
}

inline absl::Status Uninitialized(const Inputs& inputs, int input) {
  return absl::InvalidArgumentError(
      absl::StrCat(inputs.Name(input), " is not initialized"));
}

inline absl::Status LookupVariables(tensorflow::OpKernelContext* ctx,
                                    const Inputs& inputs, Vars* vars) {
  vars->resize(inputs.Resources());
  for (int input = 0; input < inputs.Resources(); ++input) {
    const auto& handle = tensorflow::HandleFromInput(ctx, input);
    if (!LookupResource(ctx, handle, &(*vars)[input]).ok()) {
      return Uninitialized(inputs, input);
    }
  }
  return absl::OkStatus();
}

// The value of hyperparameter j of variable i.
inline double HyperOf(tensorflow::OpKernelContext* ctx, const Inputs& inputs,
                      int j, int i) {
  const tensorflow::Tensor& value = ctx->input(inputs.Hyper(j));
  return value.flat<double>()(value.dims() == 0 ? 0 : i);
}

// Makes the constants of a rule's step: one for each dtype where every
// hyperparameter is a scalar and `shared`, else one for each variable.
class Steps {
 public:
  absl::Status Make(tensorflow::OpKernelContext* ctx, const Inputs& inputs,
                    const RuleInfo& rule, StepOptions options, bool shared,
                    const std::vector<tensorflow::DataType>& dtypes) {
    shared_ = shared;
    steps_.resize(shared ? kDTypeCount : inputs.n);
    const size_t given = inputs.hypers.size();
    std::vector<double> hyper(std::max<size_t>(given, kStepHyperCount));
    for (size_t s = 0; s < steps_.size(); ++s) {
      for (size_t j = 0; j < given; ++j) {
        hyper[j] = HyperOf(ctx, inputs, j, s);
      }
      const std::string error = HyperError(inputs.hypers, hyper.data());
      if (!error.empty()) {
        return absl::InvalidArgumentError(
            shared ? error : absl::StrCat(error, " (", inputs.Name(s), ")"));
      }
      const int dtype = shared ? s : FromTensorFlow(dtypes[s]);
      rule.make_step[dtype](hyper.data(), options, &steps_[s]);
    }
    return absl::OkStatus();
  }
  AnyStep* Of(int i, DType dtype) { return &steps_[shared_ ? dtype : i]; }

 private:
  bool shared_;
  std::vector<AnyStep> steps_;
};

// The place of one variable in the table of chunks of all.
struct Place {
  int64_t n = 0;  // elements
  int64_t first_chunk = 0;
};

// Gives every variable its place; returns the number of chunks.
template <class NOf>
int64_t PlaceAll(const NOf& n_of, std::vector<Place>* places) {
  int64_t chunks = 0;
  for (size_t i = 0; i < places->size(); ++i) {
    (*places)[i] = {n_of(i), chunks};
    chunks += cpu::Chunks((*places)[i].n);
  }
  return chunks;
}

// Calls run(variable, chunk, begin, n) for every chunk, in TensorFlow's pool.
// `chunk` counts over all variables; `begin` and `n` are elements of its own.
// `bytes`: what is read and written in all.
template <class Run>
void ForChunks(tensorflow::OpKernelContext* ctx,
               const std::vector<Place>& places, int64_t chunks, int64_t bytes,
               const Run& run) {
  // A core moves about 8 bytes a cycle, and waking a thread costs as much as
  // 2^17 cycles of sweeping.
  auto* pool = ctx->device()->tensorflow_cpu_worker_threads()->workers;
  const int64_t threads =
      std::min<int64_t>({pool->NumThreads(), chunks, 1 + (bytes / 8 >> 17)});
  // Each thread claims a share of what is left: long runs at first, which the
  // processor prefetches through, and single chunks at the end, so that little
  // is waited for where one thread is slow.
  std::atomic<int64_t> claimed{0};
  const auto work = [&](int64_t, int64_t) {
    size_t i = 0;
    int64_t chunk = claimed;
    while (chunk < chunks) {
      const int64_t end =
          chunk + std::max<int64_t>(1, (chunks - chunk) / (2 * threads));
      if (!claimed.compare_exchange_weak(chunk, end)) continue;
      for (; chunk < end; ++chunk) {
        while (chunk >= places[i].first_chunk + cpu::Chunks(places[i].n)) ++i;
        const int64_t begin = (chunk - places[i].first_chunk) * cpu::kChunk;
        run(i, chunk, begin, std::min(cpu::kChunk, places[i].n - begin));
      }
      chunk = claimed;
    }
  };
  if (chunks == 0) return;
  pool->ParallelFor(threads,
                    tensorflow::thread::ThreadPool::SchedulingParams::Fixed(1),
                    work);
}

// The sums of one variable, over its chunks in their order.
inline cpu::Sums SumOver(const Place& place,
                         const std::vector<cpu::Sums>& of_chunks) {
  cpu::Sums sums;
  for (int64_t c = 0; c < cpu::Chunks(place.n); ++c) {
    sums.a += of_chunks[place.first_chunk + c].a;
    sums.b += of_chunks[place.first_chunk + c].b;
  }
  return sums;
}

}  // namespace wdops
