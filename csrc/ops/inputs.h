// The inputs of the ops, and the checks that kernels, shape functions and
// XLA lowerings share.
#pragma once

#include <string>
#include <string_view>
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

// What an op takes: lists of n entries each, of which the last are the
// gradients and those before are variables, then factors, then hyperparameters.
// They are counted as if each entry were one tensor, but a list of variables
// may come as one vector of handles: what TensorFlow passes on, a function's
// captures above all, has a price for each tensor. A list that is not given is
// not counted.
struct Inputs {
  int n = 0;
  std::vector<tensorflow::DataType> dtypes;  // of the gradients
  std::vector<std::string> lists;
  std::vector<int> begin = {0};  // of each list, among the op's tensors
  std::vector<std::string> hypers;
  int slots = 0;                       // lists 1 to `slots` are slots
  int accumulator = -1, average = -1;  // the index of a list, or -1
  // Of variables whose gradient is factored: the input that is dz, while that
  // in the list of gradients is x; or -1. An op decides at run time if dz is an
  // empty vector: then the gradient is a tensor after all.
  std::vector<int> factor;
  std::vector<tensorflow::DataType> factor_dtypes;

  int At(int list, int i) const { return list * n + i; }
  int Grad(int i) const { return Resources() + i; }
  int Hyper(int j) const { return Grad(n) + factor_dtypes.size() + j; }
  // The variables are the inputs from 0 on.
  int Resources() const { return (lists.size() - 1) * n; }
  // Of a variable: whether it comes with the others of its list.
  bool IsPacked(int input) const {
    return begin[input / n + 1] - begin[input / n] != n;
  }
  // Which of the op's tensors an input is, or is in.
  int Tensor(int input) const {
    if (input >= Resources()) return begin.back() + input - Resources();
    return begin[input / n] + (IsPacked(input) ? 0 : input % n);
  }
  // As a message names it: "m[3]".
  std::string Name(int input) const {
    return lists[input / n] + "[" + std::to_string(input % n) + "]";
  }
};

inline absl::Status WrongCount(const Inputs& inputs, const std::string& name,
                               int64_t count) {
  return absl::InvalidArgumentError(absl::StrCat(
      "grad has ", inputs.n, " entries, but ", name, " has ", count));
}

// Takes the attributes of an op from a context of whichever kind: T, and in how
// many tensors each list comes: n, 1 or, where it is optional, 0. Without a
// rule it is the op of norms, whose variables are optional too.
template <class Context>
absl::Status MakeInputs(const RuleInfo* rule, Context* ctx, Inputs* inputs) {
  TF_RETURN_IF_ERROR(ctx->GetAttr("T", &inputs->dtypes));
  inputs->n = inputs->dtypes.size();
  const auto add = [&](const char* attr, const char* name,
                       int* place) -> absl::Status {
    int tensors;
    TF_RETURN_IF_ERROR(ctx->GetAttr(attr, &tensors));
    if (tensors == 0) return absl::OkStatus();
    // Tracing knows more of a variable that comes by itself, and the rest of a
    // training step takes each as a tensor anyway.
    const bool may_be_packed = name != std::string_view("var");
    if (tensors != inputs->n && !(tensors == 1 && may_be_packed)) {
      return WrongCount(*inputs, name, tensors);
    }
    *place = inputs->lists.size();
    inputs->lists.push_back(name);
    inputs->begin.push_back(inputs->begin.back() + tensors);
    return absl::OkStatus();
  };
  inputs->hypers = HyperNames(rule);
  int place;
  TF_RETURN_IF_ERROR(add("V", "var", &place));
  if (rule) {
    for (const char* slot : rule->slots) {
      TF_RETURN_IF_ERROR(add("S", slot, &place));
    }
    inputs->slots = rule->slots.size;
  }
  TF_RETURN_IF_ERROR(add("A", "accumulator", &inputs->accumulator));
  if (rule) TF_RETURN_IF_ERROR(add("E", "average", &inputs->average));
  inputs->lists.push_back("grad");
  std::vector<int> factored;
  TF_RETURN_IF_ERROR(ctx->GetAttr("factored", &factored));
  TF_RETURN_IF_ERROR(ctx->GetAttr("U", &inputs->factor_dtypes));
  if (factored.size() != inputs->factor_dtypes.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "factored has ", factored.size(), " entries, but factor has ",
        inputs->factor_dtypes.size()));
  }
  inputs->factor.assign(inputs->n, -1);
  for (size_t f = 0; f < factored.size(); ++f) {
    const int i = factored[f];
    if (i < 0 || i >= inputs->n || inputs->factor[i] >= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("factored[", f, "] is ", i,
                       ", but must be another variable of the ", inputs->n));
    }
    inputs->factor[i] = inputs->Grad(inputs->n) + f;
  }
  return absl::OkStatus();
}

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

// Whether x and dz of a factored gradient go together, and make a gradient of
// `var` if there is one.
template <class AnySpec>
absl::Status CheckFactors(const Inputs& inputs, int i, const AnySpec& x,
                          const AnySpec& dz, const AnySpec* var) {
  const std::string name = inputs.Name(inputs.Grad(i));
  if (x.dtype != dz.dtype) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": dz has dtype ", tensorflow::DataTypeString(dz.dtype),
        ", but x has dtype ", tensorflow::DataTypeString(x.dtype)));
  }
  if (x.shape.dims() < 0 || dz.shape.dims() < 0) return absl::OkStatus();
  const auto agree = [](int64_t a, int64_t b) {
    return a == b || a < 0 || b < 0;
  };
  if (x.shape.dims() != 2 || dz.shape.dims() != 2 ||
      !agree(x.shape.dim_size(0), dz.shape.dim_size(0))) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": x has shape ", x.shape.DebugString(), " and dz has shape ",
        dz.shape.DebugString(), ", but they must be [batch, rows] and ",
        "[batch, columns]"));
  }
  if (!var || var->shape.dims() < 0) return absl::OkStatus();
  if (var->shape.dims() != 2 ||
      !agree(var->shape.dim_size(0), x.shape.dim_size(1)) ||
      !agree(var->shape.dim_size(1), dz.shape.dim_size(1))) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": x has shape ", x.shape.DebugString(),
                     " and dz has shape ", dz.shape.DebugString(), ", but ",
                     inputs.Name(i), " has shape ", var->shape.DebugString()));
  }
  return absl::OkStatus();
}

// Whether dz says that the gradient is a tensor after all.
template <class Shape>
bool IsNoFactor(const Shape& dz) {
  return dz.dims() == 1 && dz.dim_size(0) <= 0;
}

// Whether everything that belongs to a variable has its shape, and its dtype;
// slots may all have another dtype of a layout. `spec_of(input)` is a Spec.
template <class SpecOf>
absl::Status CheckTensors(const Inputs& inputs, const SpecOf& spec_of) {
  for (int i = 0; i < inputs.n; ++i) {
    const auto& var = spec_of(i);
    for (size_t list = 0; list < inputs.lists.size(); ++list) {
      const int input = inputs.At(list, i);
      const auto& other = spec_of(input);
      const bool known = other.dtype != tensorflow::DT_INVALID &&
                         var.dtype != tensorflow::DT_INVALID;
      const bool slot = list > 0 && list <= static_cast<size_t>(inputs.slots);
      bool fits = other.dtype == var.dtype;
      if (slot && known) {
        fits = other.dtype == spec_of(inputs.At(1, i)).dtype &&
               FindLayout(FromTensorFlow(var.dtype),
                          FromTensorFlow(other.dtype)) < kLayoutCount;
      }
      if (known && !fits) {
        const bool unlike_first =
            slot && other.dtype != spec_of(inputs.At(1, i)).dtype;
        const int beside = unlike_first ? inputs.At(1, i) : i;
        return absl::InvalidArgumentError(
            absl::StrCat(inputs.Name(input), " has dtype ",
                         tensorflow::DataTypeString(other.dtype), ", but ",
                         inputs.Name(beside), " has dtype ",
                         tensorflow::DataTypeString(spec_of(beside).dtype)));
      }
      const int factor = input == inputs.Grad(i) ? inputs.factor[i] : -1;
      if (factor >= 0 && !IsNoFactor(spec_of(factor).shape)) {
        TF_RETURN_IF_ERROR(CheckFactors(inputs, i, other, spec_of(factor),
                                        list == 0 ? nullptr : &var));
      } else if (!Agree(other.shape, var.shape)) {
        return absl::InvalidArgumentError(absl::StrCat(
            inputs.Name(input), " has shape ", other.shape.DebugString(),
            ", but ", inputs.Name(i), " has shape ", var.shape.DebugString()));
      }
    }
  }
  return absl::OkStatus();
}

// Whether every hyperparameter is a scalar or has one entry per variable;
// `scalars`: whether all are scalars. `shape_of(input)` is a TensorShape.
template <class ShapeOf>
absl::Status CheckHypers(const Inputs& inputs, const ShapeOf& shape_of,
                         bool* scalars) {
  *scalars = true;
  for (size_t j = 0; j < inputs.hypers.size(); ++j) {
    const tensorflow::TensorShape& shape = shape_of(inputs.Hyper(j));
    if (shape.dims() == 0) continue;
    *scalars = false;
    if (shape.dims() != 1 || shape.dim_size(0) != inputs.n) {
      return absl::InvalidArgumentError(absl::StrCat(
          inputs.hypers[j], " has shape ", shape.DebugString(),
          ", but must be a scalar or have one entry for each of the ", inputs.n,
          " variables"));
    }
  }
  return absl::OkStatus();
}

inline absl::Status ListedTwice(const Inputs& inputs, int first, int second) {
  return absl::InvalidArgumentError(
      absl::StrCat(inputs.Name(first), " and ", inputs.Name(second),
                   " are the same variable; each may be listed once"));
}

}  // namespace wdops
