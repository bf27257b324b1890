// Variables and hyperparameters of the optimizers' ops, as the kernels of every
// device take them: looked up, locked, checked, and copied before they are
// written to where a tensor shares their buffer.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "ops/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
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
    const auto handles =
        ctx->input(inputs.Tensor(input)).flat<tensorflow::ResourceHandle>();
    const bool packed = inputs.IsPacked(input);
    if (handles.size() != (packed ? inputs.n : 1)) {
      return WrongCount(inputs, inputs.lists[input / inputs.n], handles.size());
    }
    const auto& handle = handles(packed ? input % inputs.n : 0);
    if (!LookupResource(ctx, handle, &(*vars)[input]).ok()) {
      return Uninitialized(inputs, input);
    }
  }
  return absl::OkStatus();
}

// In the order of the mutexes' addresses, as every op of TensorFlow does;
// otherwise two ops could wait for each other.
inline absl::Status LockVariables(const Inputs& inputs, const Vars& vars,
                                  std::vector<tensorflow::mutex_lock>* locks) {
  std::vector<int> order(vars.size());
  for (size_t input = 0; input < vars.size(); ++input) order[input] = input;
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return vars[a]->mu() < vars[b]->mu(); });
  for (size_t o = 1; o < order.size(); ++o) {
    if (vars[order[o - 1]].get() == vars[order[o]].get()) {
      return ListedTwice(inputs, order[o - 1], order[o]);
    }
  }
  locks->reserve(order.size());
  for (int input : order) locks->emplace_back(*vars[input]->mu());
  for (size_t input = 0; input < vars.size(); ++input) {
    if (!vars[input]->is_initialized) return Uninitialized(inputs, input);
  }
  return absl::OkStatus();
}

// New buffers for the variables whose buffer a tensor shares that was read from
// it, by input. What is written to is then the variable's alone.
using Fresh = std::vector<std::pair<int, tensorflow::Tensor>>;

inline absl::Status AllocateFresh(tensorflow::OpKernelContext* ctx,
                                  const Vars& vars, Fresh* fresh) {
  for (size_t input = 0; input < vars.size(); ++input) {
    const tensorflow::Tensor& value = *vars[input]->tensor();
    if (value.NumElements() == 0 || value.RefCountIsOne()) continue;
    tensorflow::AllocatorAttributes attributes;
    attributes.set_gpu_compatible(true);
    attributes.set_nic_compatible(true);
    fresh->emplace_back(input, tensorflow::Tensor());
    TF_RETURN_IF_ERROR(ctx->allocate_temp(value.dtype(), value.shape(),
                                          &fresh->back().second, attributes));
  }
  return absl::OkStatus();
}

// Whether gradient i of an op is factored in this run.
inline bool IsFactored(tensorflow::OpKernelContext* ctx, const Inputs& inputs,
                       int i) {
  return inputs.factor[i] >= 0 &&
         !IsNoFactor(ctx->input(inputs.Tensor(inputs.factor[i])).shape());
}

// The hyperparameters of a step, checked: one set for all variables, or one for
// each.
class Hypers {
 public:
  // `shareable`: whether one set may do. `scales_on_card`: grad_scale and
  // clip_scale are not in the host's memory, and count as 1 here.
  absl::Status Make(tensorflow::OpKernelContext* ctx, const Inputs& inputs,
                    bool shareable, bool scales_on_card) {
    const auto tensor = [&](int input) -> const tensorflow::Tensor& {
      return ctx->input(inputs.Tensor(input));
    };
    bool scalars;
    TF_RETURN_IF_ERROR(CheckHypers(
        inputs, [&](int input) { return tensor(input).shape(); }, &scalars));
    shared_ = scalars && shareable;
    count_ = inputs.hypers.size();
    const std::vector<double> minima = Minima(inputs.hypers);
    const int sets = shared_ ? 1 : inputs.n;
    values_.assign(sets * count_, 1);
    for (int j = 0; j < count_; ++j) {
      if (scales_on_card && (j == kGradScale || j == kClipScale)) continue;
      const auto value = tensor(inputs.Hyper(j)).flat<double>();
      const int step = tensor(inputs.Hyper(j)).dims();
      for (int s = 0; s < sets; ++s) values_[s * count_ + j] = value(s * step);
    }
    for (int s = 0; s < sets; ++s) {
      const std::string error = HyperError(inputs.hypers, minima, Of(s));
      if (error.empty()) continue;
      return absl::InvalidArgumentError(
          shared_ ? error : absl::StrCat(error, " (", inputs.Name(s), ")"));
    }
    return absl::OkStatus();
  }

  bool shared() const { return shared_; }
  int count() const { return count_; }
  // Those of variable i, in the order of `Inputs::hypers`.
  const double* Of(int i) const { return &values_[(shared_ ? 0 : i) * count_]; }

 private:
  bool shared_;
  int count_;
  std::vector<double> values_;
};

}  // namespace wdops
