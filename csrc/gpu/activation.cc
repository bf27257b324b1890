// The ops of activations behind a bias, and of their gradients, on a GPU.
#include "gpu/card.h"
#include "ops/activation_ops.h"

namespace wdops {
namespace {

using tensorflow::OpKernelContext;
using tensorflow::Tensor;

class OutputGpu : public OutputOp {
 public:
  using OutputOp::OutputOp;

 private:
  absl::Status Activate(OpKernelContext* ctx, const double* hyper,
                        const ActivationShape& shape, const Tensor& x,
                        const Tensor* bias, Tensor* output) const override {
    return Check(wdops_cuda_activate(
        inputs_.activation, FromTensorFlow(x.dtype()), hyper, shape.outer,
        shape.channels, shape.inner, x.data(), bias ? bias->data() : nullptr,
        output->data(), Card(ctx).stream()));
  }
};

class GradGpu : public GradOp {
 public:
  using GradOp::GradOp;

 private:
  absl::Status Differentiate(OpKernelContext* ctx, const double* hyper,
                             const ActivationShape& shape, const Tensor& grad,
                             const Tensor& output, Tensor* x_grad,
                             Tensor* bias_grad) const override {
    const Card card(ctx);
    if (shape.Elements() == 0) {
      return bias_grad ? card.Clear(bias_grad) : absl::OkStatus();
    }
    Tensor scratch;
    if (bias_grad) {
      TF_RETURN_IF_ERROR(
          card.Allocate(wdops_cuda_activate_scratch_bytes(
                            shape.outer, shape.channels, shape.inner),
                        &scratch));
    }
    return Check(wdops_cuda_activate_grad(
        inputs_.activation, FromTensorFlow(output.dtype()), hyper, shape.outer,
        shape.channels, shape.inner, grad.data(), output.data(), x_grad->data(),
        bias_grad ? bias_grad->data() : nullptr, scratch.data(),
        card.stream()));
  }
};

const bool activations_registered = [] {
  for (const ActivationInfo& info : kActivations) {
    const std::vector<std::string> hypers(info.hypers.begin(),
                                          info.hypers.end());
    RegisterOnCard<OutputGpu>(info.op, hypers);
    RegisterOnCard<GradGpu>(std::string(info.op) + "Grad", hypers);
  }
  return true;
}();

}  // namespace
}  // namespace wdops
