// The kernels of the activation ops, up to where a device begins: inputs,
// checks and outputs.
#pragma once

#include <cmath>

#include "ops/activation.h"
#include "ops/inputs.h"
#include "ops/kept.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace wdops {

// What the op and that of its gradient share.
class ActivationOp : public tensorflow::OpKernel {
 public:
  explicit ActivationOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, MakeActivationInputs(ctx->def().op(), ctx, &inputs_));
  }

  // Stays in the thread that made its input. To hand one that fits in a cache
  // to another thread, as TensorFlow else does where others are ready too, took
  // a sixth of a step; a large one shares its work by itself.
  bool IsExpensive() final { return false; }

  void Compute(tensorflow::OpKernelContext* ctx) final {
    double hyper[kMaxActivationHypers];
    OP_REQUIRES_OK(ctx, Hypers(ctx, hyper));
    OP_REQUIRES_OK(ctx, CheckAndRun(ctx, hyper));
  }

 protected:
  virtual absl::Status CheckAndRun(tensorflow::OpKernelContext* ctx,
                                   const double* hyper) = 0;

  ActivationInputs inputs_;

 private:
  absl::Status Hypers(tensorflow::OpKernelContext* ctx, double* hyper) const {
    for (int j = 0; j < inputs_.info->hypers.size; ++j) {
      const tensorflow::Tensor& value = ctx->input(inputs_.Hyper(j));
      const char* name = inputs_.info->hypers[j];
      if (value.dims() > 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, " has shape ", value.shape().DebugString(),
                         ", but must be a scalar"));
      }
      hyper[j] = value.scalar<double>()();
      if (std::isfinite(hyper[j]) && hyper[j] >= 0) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          name, " is ", ToString(hyper[j]), ", but must be finite and ",
          "not negative: the gradient takes the sign of the input from that ",
          "of the output"));
    }
    return absl::OkStatus();
  }
};

class OutputOp : public ActivationOp {
 public:
  using ActivationOp::ActivationOp;

 protected:
  // Of an array that is not empty. `bias` is null where there is none; x may be
  // the output.
  virtual absl::Status Activate(tensorflow::OpKernelContext* ctx,
                                const double* hyper,
                                const ActivationShape& shape,
                                const tensorflow::Tensor& x,
                                const tensorflow::Tensor* bias,
                                tensorflow::Tensor* output) const = 0;

 private:
  absl::Status CheckAndRun(tensorflow::OpKernelContext* ctx,
                           const double* hyper) final {
    const tensorflow::Tensor& x = ctx->input(0);
    const tensorflow::Tensor* bias = inputs_.biased ? &ctx->input(1) : nullptr;
    if (bias) TF_RETURN_IF_ERROR(CheckBias(inputs_, x.shape(), bias->shape()));
    tensorflow::Tensor* output;
    if (!ctx->forward_input_to_output_with_shape(0, 0, x.shape(), &output)) {
      TF_RETURN_IF_ERROR(AllocateOutput(ctx, 0, x.shape(), &output));
    }
    if (x.NumElements() == 0) return absl::OkStatus();
    ActivationShape shape;
    TF_RETURN_IF_ERROR(ShapeOf(inputs_, x.shape(), &shape));
    return Activate(ctx, hyper, shape, x, bias, output);
  }
};

class GradOp : public ActivationOp {
 public:
  using ActivationOp::ActivationOp;

 protected:
  // The array may be empty. `bias_grad` is null where there is no bias; grad
  // and output may be x_grad.
  virtual absl::Status Differentiate(tensorflow::OpKernelContext* ctx,
                                     const double* hyper,
                                     const ActivationShape& shape,
                                     const tensorflow::Tensor& grad,
                                     const tensorflow::Tensor& output,
                                     tensorflow::Tensor* x_grad,
                                     tensorflow::Tensor* bias_grad) const = 0;

 private:
  absl::Status CheckAndRun(tensorflow::OpKernelContext* ctx,
                           const double* hyper) final {
    const tensorflow::Tensor &grad = ctx->input(0), &output = ctx->input(1);
    TF_RETURN_IF_ERROR(CheckOutput(grad.shape(), output.shape()));
    ActivationShape shape;
    TF_RETURN_IF_ERROR(ShapeOf(inputs_, output.shape(), &shape));
    tensorflow::Tensor *x_grad, *bias_grad = nullptr;
    const auto forward = [&](int input) {
      return ctx->forward_input_to_output_with_shape(input, 0, output.shape(),
                                                     &x_grad);
    };
    if (!forward(0) && !forward(1)) {
      TF_RETURN_IF_ERROR(AllocateOutput(ctx, 0, output.shape(), &x_grad));
    }
    if (inputs_.biased) {
      TF_RETURN_IF_ERROR(ctx->allocate_output(1, {shape.channels}, &bias_grad));
    }
    return Differentiate(ctx, hyper, shape, grad, output, x_grad, bias_grad);
  }
};

}  // namespace wdops
