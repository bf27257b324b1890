// The op that makes one vector of the handles of a list of variables, wherever
// they are: TensorFlow's own has no kernel for handles of a GPU.
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

class PackOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tensorflow::OpKernelContext* ctx) override {
    const int n = ctx->num_inputs();
    tensorflow::Tensor* packed;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {n}, &packed));
    for (int i = 0; i < n; ++i) {
      packed->vec<tensorflow::ResourceHandle>()(i) =
          ctx->input(i).scalar<tensorflow::ResourceHandle>()();
    }
  }
};

REGISTER_OP("Wdops>Pack")
    .Attr("N: int >= 1")
    .Input("handles: N * resource")
    .Output("packed: resource")
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Vector(c->num_inputs()));
      return absl::OkStatus();
    });

REGISTER_KERNEL_BUILDER(Name("Wdops>Pack")
                            .Device(tensorflow::DEVICE_DEFAULT)
                            .HostMemory("handles")
                            .HostMemory("packed"),
                        PackOp);

}  // namespace
}  // namespace wdops
