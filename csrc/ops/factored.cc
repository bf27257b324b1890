// The op that keeps the factors of a gradient, or forms it where they have too
// many rows: then the ops of a step that follow make no product each.
#include <cstring>

#include "ops/step_ops.h"
#include "ops/sweep.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::OpKernelContext;
using tensorflow::Tensor;

class FactoredGradientCpu : public FactoredGradientOp {
 public:
  using FactoredGradientOp::FactoredGradientOp;

 private:
  absl::Status Form(OpKernelContext* ctx, Tensor* grad) const override {
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    Gradients product;
    TF_RETURN_IF_ERROR(
        product.Make(ctx, inputs_, *kernels, [](int) { return true; }));
    const int size = DataTypeSize(grad->dtype());
    product.ForChunks(
        ctx, 2, [](int) { return Tensor(); },
        [&](int, int64_t, int64_t begin, int64_t n, const char* run) {
          memcpy(Data(*grad) + begin * size, run, n * size);
        });
    return absl::OkStatus();
  }
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
    FactoredGradientCpu);

}  // namespace
}  // namespace wdops
