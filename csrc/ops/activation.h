// The inputs of the activation ops, and the checks that kernels, shape
// functions and XLA lowerings share.
#pragma once

#include <string>

#include "absl/strings/str_cat.h"
#include "rules/activation.h"
#include "rules/blocks.h"
#include "rules/table.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/platform/errors.h"

namespace wdops {

// What tensors stand before the hyperparameters, and where the channels are.
struct ActivationInputs {
  const ActivationInfo* info;
  int activation;  // its index in kActivations
  bool gradient;   // an op of grad and output, and not of x
  bool biased;
  bool channels_first;

  int Hyper(int j) const { return (gradient ? 2 : 1 + biased) + j; }
  const char* Tensor() const { return gradient ? "output" : "x"; }
};

// Of an op or a shape function's context.
template <class Context>
absl::Status MakeActivationInputs(const std::string& op, Context* ctx,
                                  ActivationInputs* inputs) {
  for (int i = 0; i < kActivationCount; ++i) {
    if (op.rfind(kActivations[i].op, 0) == 0) inputs->activation = i;
  }
  inputs->info = &kActivations[inputs->activation];
  inputs->gradient = op != inputs->info->op;
  int biases;
  std::string data_format;
  TF_RETURN_IF_ERROR(ctx->GetAttr("B", &biases));
  TF_RETURN_IF_ERROR(ctx->GetAttr("data_format", &data_format));
  inputs->biased = biases > 0;
  inputs->channels_first = data_format == "NCHW";
  if (biases <= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("there are ", biases, " biases, but may be one at most"));
}

// The axis of the channels; there is one only where there is a bias.
inline absl::Status ChannelAxis(const ActivationInputs& inputs, int rank,
                                int* axis) {
  const int least = inputs.channels_first ? 2 : 1;
  *axis = inputs.channels_first ? 1 : rank - 1;
  if (rank >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      inputs.Tensor(), " has rank ", rank, ", but must have at least ", least,
      " beside a bias with data_format ",
      inputs.channels_first ? "NCHW" : "NHWC"));
}

// Without a bias there is one channel.
inline absl::Status ShapeOf(const ActivationInputs& inputs,
                            const tensorflow::TensorShape& tensor,
                            ActivationShape* shape) {
  if (!inputs.biased) {
    shape->inner = tensor.num_elements();
    return absl::OkStatus();
  }
  int axis;
  TF_RETURN_IF_ERROR(ChannelAxis(inputs, tensor.dims(), &axis));
  shape->channels = tensor.dim_size(axis);
  for (int i = 0; i < axis; ++i) shape->outer *= tensor.dim_size(i);
  for (int i = axis + 1; i < tensor.dims(); ++i) {
    shape->inner *= tensor.dim_size(i);
  }
  return absl::OkStatus();
}

inline absl::Status CheckBias(const ActivationInputs& inputs,
                              const tensorflow::TensorShape& x,
                              const tensorflow::TensorShape& bias) {
  int axis;
  TF_RETURN_IF_ERROR(ChannelAxis(inputs, x.dims(), &axis));
  if (bias.dims() == 1 && bias.dim_size(0) == x.dim_size(axis)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("bias has shape ", bias.DebugString(), ", but x has shape ",
                   x.DebugString(), " with its channels on axis ", axis));
}

inline absl::Status CheckOutput(const tensorflow::TensorShape& grad,
                                const tensorflow::TensorShape& output) {
  if (grad == output) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("grad has shape ", grad.DebugString(),
                   ", but output has shape ", output.DebugString()));
}

}  // namespace wdops
