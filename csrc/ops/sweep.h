// Variables and chunks for the CPU kernels of the optimizers' ops.
#pragma once

#include <algorithm>
#include <memory>

#include "ops/inputs.h"
#include "ops/kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/platform/mutex.h"

namespace wdops {

using Vars = std::vector<tensorflow::core::RefCountPtr<tensorflow::Var>>;

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

// The constants of a rule's step: one for each dtype where every hyperparameter
// is a scalar and the rule wants no norm of each variable, else one for each
// variable.
class Steps {
 public:
  absl::Status Make(tensorflow::OpKernelContext* ctx, const Inputs& inputs,
                    const RuleInfo& rule, StepOptions options) {
    bool scalars;
    TF_RETURN_IF_ERROR(CheckHypers(
        inputs, [&](int input) { return ctx->input(input).shape(); },
        &scalars));
    shared_ = scalars && !rule.trust;
    steps_.resize(shared_ ? kDTypeCount : inputs.n);
    const size_t given = inputs.hypers.size();
    const std::vector<double> minima = Minima(inputs.hypers);
    std::vector<double> hyper(std::max<size_t>(given, kStepHyperCount));
    for (size_t s = 0; s < steps_.size(); ++s) {
      for (size_t j = 0; j < given; ++j) {
        hyper[j] = HyperOf(ctx, inputs, j, s);
      }
      const std::string error = HyperError(inputs.hypers, minima, hyper.data());
      if (!error.empty()) {
        return absl::InvalidArgumentError(
            shared_ ? error : absl::StrCat(error, " (", inputs.Name(s), ")"));
      }
      const int dtype = shared_ ? s : FromTensorFlow(inputs.dtypes[s]);
      rule.make_step[dtype](hyper.data(), options, &steps_[s]);
    }
    return absl::OkStatus();
  }
  AnyStep* Of(int i, DType dtype) { return &steps_[shared_ ? dtype : i]; }

 private:
  bool shared_;
  std::vector<AnyStep> steps_;
};

// The chunks of all variables, one variable behind the other.
struct Places {
  std::vector<int64_t> n;      // elements of each variable
  std::vector<int64_t> first;  // chunk of each variable, then how many in all
  int64_t bytes = 0;           // of the gradients

  Places(tensorflow::OpKernelContext* ctx, const Inputs& inputs) : first({0}) {
    for (int i = 0; i < inputs.n; ++i) {
      const tensorflow::Tensor& grad = ctx->input(inputs.Grad(i));
      n.push_back(grad.NumElements());
      first.push_back(first[i] + cpu::Chunks(n[i]));
      bytes += grad.TotalBytes();
    }
  }
  int64_t Chunks() const { return first.back(); }

  // The sums of variable i, over its chunks in their order.
  cpu::Sums SumOver(int i, const std::vector<cpu::Sums>& of_chunks) const {
    cpu::Sums sums;
    for (int64_t c = first[i]; c < first[i + 1]; ++c) sums += of_chunks[c];
    return sums;
  }
};

// Calls run(variable, chunk, begin, n) for every chunk, in TensorFlow's pool.
// `chunk` counts over all variables; `begin` and `n` are elements of its own.
// `passes`: how often as much as the gradients is read or written.
template <class Run>
void ForChunks(tensorflow::OpKernelContext* ctx, const Places& places,
               int passes, const Run& run) {
  Share(ctx, places.Chunks(), places.bytes * passes,
        [&](int64_t chunk, int64_t end) {
          const auto& first = places.first;
          size_t i = std::upper_bound(first.begin(), first.end(), chunk) - 1 -
                     first.begin();
          for (; chunk < end; ++chunk) {
            while (chunk >= first[i + 1]) ++i;
            const int64_t begin = (chunk - first[i]) * cpu::kChunk;
            run(i, chunk, begin, std::min(cpu::kChunk, places.n[i] - begin));
          }
        });
}

}  // namespace wdops
