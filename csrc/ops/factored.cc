// The op that keeps the factors of a gradient, or forms it where they have too
// many rows: then the ops of a step that follow make no product each.
#include <cstring>

#include "ops/sweep.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

class FactoredGradientOp : public tensorflow::OpKernel {
 public:
  explicit FactoredGradientOp(tensorflow::OpKernelConstruction* ctx)
      : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("most_rows", &most_rows_));
    inputs_.n = 1;
    inputs_.lists = {"grad"};
    inputs_.dtypes = {ctx->input_type(0)};
    inputs_.factor = {1};
    inputs_.factor_dtypes = {ctx->input_type(1)};
  }

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Form(ctx));
  }

 private:
  absl::Status Form(OpKernelContext* ctx) const {
    TF_RETURN_IF_ERROR(CheckTensors(inputs_, [&](int input) {
      return Spec<const TensorShape&>{ctx->input_dtype(input),
                                      ctx->input(input).shape()};
    }));
    const Tensor &x = ctx->input(0), &dz = ctx->input(1);
    if (x.dim_size(0) <= most_rows_) {
      ctx->set_output(0, x);
      ctx->set_output(1, dz);
      return absl::OkStatus();
    }
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    Tensor *grad, *none;
    TF_RETURN_IF_ERROR(ctx->allocate_output(
        0, TensorShape({x.dim_size(1), dz.dim_size(1)}), &grad));
    TF_RETURN_IF_ERROR(ctx->allocate_output(1, TensorShape({0}), &none));
    Gradients product;
    TF_RETURN_IF_ERROR(
        product.Make(ctx, inputs_, *kernels, [](int) { return true; }));
    const int size = DataTypeSize(grad->dtype());
    product.ForChunks(
        ctx, 2, [&](int, int64_t, int64_t begin, int64_t n, const char* run) {
          memcpy(Data(*grad) + begin * size, run, n * size);
        });
    return absl::OkStatus();
  }

  Inputs inputs_;
  int64_t most_rows_;
};

REGISTER_OP("Wdops>FactoredGradient")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("most_rows: int")
    .Input("x: T")
    .Input("dz: T")
    .Output("grad: T")
    .Output("factor: T")
    .SetShapeFn(tensorflow::shape_inference::UnknownShape);

REGISTER_KERNEL_BUILDER(
    Name("Wdops>FactoredGradient").Device(tensorflow::DEVICE_CPU),
    FactoredGradientOp);

}  // namespace
}  // namespace wdops
