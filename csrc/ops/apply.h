// The inputs of the op of a rule, and the checks that its CPU kernel, its shape
// function and its XLA lowering share.
#pragma once

#include <string>
#include <vector>

#include "rules/table.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"

namespace wdops {

inline const RuleInfo* FindRule(const std::string& op) {
  for (const RuleInfo& rule : kRules) {
    if (op == rule.op) return &rule;
  }
  return nullptr;
}

inline DType FromTensorFlow(tensorflow::DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_FLOAT:
      return k_float32;
    case tensorflow::DT_DOUBLE:
      return k_float64;
    case tensorflow::DT_BFLOAT16:
      return k_bfloat16;
    case tensorflow::DT_HALF:
      return k_float16;
    default:
      return kDTypeCount;
  }
}

// Where each input of the op stands: n variables, n of each slot, n gradients,
// the hyperparameters.
struct ApplyInputs {
  const RuleInfo& rule;
  int n;

  int Var(int i) const { return i; }
  int Slot(int k, int i) const { return (1 + k) * n + i; }
  int Grad(int i) const { return Slot(rule.slots.size, i); }
  int Hyper(int j) const { return Grad(n) + j; }
  // The variables and slots are the inputs from 0 on.
  int Resources() const { return Grad(0); }
  // As a message names it: "m[3]".
  std::string Name(int input) const {
    const int list = input / n;
    const char* name = list == 0                 ? "var"
                       : list <= rule.slots.size ? rule.slots[list - 1]
                                                 : "grad";
    return std::string(name) + "[" + std::to_string(input % n) + "]";
  }
};

inline bool Agree(const tensorflow::TensorShape& a,
                  const tensorflow::TensorShape& b) {
  return a == b;
}
inline bool Agree(const tensorflow::PartialTensorShape& a,
                  const tensorflow::PartialTensorShape& b) {
  return a.IsCompatibleWith(b);
}

// Dtype and shape of a tensor, or of the value of a variable. DT_INVALID: not
// known yet.
template <class Shape>
struct Spec {
  tensorflow::DataType dtype;
  Shape shape;
};

// Whether the gradient and the slots of every variable have its dtype and
// shape. `spec_of(input)` is a Spec.
template <class SpecOf>
absl::Status CheckTensors(const ApplyInputs& inputs, const SpecOf& spec_of) {
  for (int i = 0; i < inputs.n; ++i) {
    const auto& var = spec_of(inputs.Var(i));
    for (int list = 1; list <= inputs.rule.slots.size + 1; ++list) {
      const int input = list * inputs.n + i;
      const auto& other = spec_of(input);
      if (other.dtype != var.dtype && other.dtype != tensorflow::DT_INVALID &&
          var.dtype != tensorflow::DT_INVALID) {
        return absl::InvalidArgumentError(absl::StrCat(
            inputs.Name(input), " has dtype ",
            tensorflow::DataTypeString(other.dtype), ", but ", inputs.Name(i),
            " has dtype ", tensorflow::DataTypeString(var.dtype)));
      }
      if (!Agree(other.shape, var.shape)) {
        return absl::InvalidArgumentError(absl::StrCat(
            inputs.Name(input), " has shape ", other.shape.DebugString(),
            ", but ", inputs.Name(i), " has shape ", var.shape.DebugString()));
      }
    }
  }
  return absl::OkStatus();
}

// Whether every hyperparameter is a scalar or has one entry per variable.
// `shape_of(input)` is a TensorShape.
template <class ShapeOf>
absl::Status CheckHypers(const ApplyInputs& inputs,
                         const std::vector<std::string>& names,
                         const ShapeOf& shape_of) {
  for (size_t j = 0; j < names.size(); ++j) {
    const tensorflow::TensorShape& shape = shape_of(inputs.Hyper(j));
    if (shape.dims() == 0) continue;
    if (shape.dims() != 1 || shape.dim_size(0) != inputs.n) {
      return absl::InvalidArgumentError(absl::StrCat(
          names[j], " has shape ", shape.DebugString(),
          ", but must be a scalar or have one entry for each of the ", inputs.n,
          " variables"));
    }
  }
  return absl::OkStatus();
}

// Whether there are as many gradients as variables: they are two lists of the
// op, and nothing else ties their lengths together.
inline absl::Status CheckLengths(const ApplyInputs& inputs, size_t grads) {
  if (static_cast<size_t>(inputs.n) == grads) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("grad has ", grads, " entries, but var has ", inputs.n));
}

inline absl::Status ListedTwice(const ApplyInputs& inputs, int first,
                                int second) {
  return absl::InvalidArgumentError(
      absl::StrCat(inputs.Name(first), " and ", inputs.Name(second),
                   " are the same variable; each may be listed once"));
}

}  // namespace wdops
