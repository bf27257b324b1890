// The ops of activations behind a bias, and of their gradients: one pass each.
#include "cpu/activate.h"
#include "ops/activation_ops.h"
#include "ops/kernel.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

auto ShareOf(OpKernelContext* ctx) {
  return [ctx](int64_t count, int64_t bytes, const auto& run) {
    Share(ctx, count, bytes, run);
  };
}

class OutputCpu : public OutputOp {
 public:
  using OutputOp::OutputOp;

 private:
  absl::Status Activate(OpKernelContext* ctx, const double* hyper,
                        const ActivationShape& shape, const Tensor& x,
                        const Tensor* bias, Tensor* output) const override {
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    cpu::ActivateAll(*kernels->activations, inputs_.activation, hyper, shape,
                     FromTensorFlow(x.dtype()), Data(x),
                     bias ? Data(*bias) : nullptr, Data(*output), ShareOf(ctx));
    return absl::OkStatus();
  }
};

class GradCpu : public GradOp {
 public:
  using GradOp::GradOp;

 private:
  absl::Status Differentiate(OpKernelContext* ctx, const double* hyper,
                             const ActivationShape& shape, const Tensor& grad,
                             const Tensor& output, Tensor* x_grad,
                             Tensor* bias_grad) const override {
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    cpu::DifferentiateAll(*kernels->activations, inputs_.activation, hyper,
                          shape, FromTensorFlow(output.dtype()), Data(grad),
                          Data(output), Data(*x_grad),
                          bias_grad ? Data(*bias_grad) : nullptr, ShareOf(ctx));
    return absl::OkStatus();
  }
};

// What tracing can already tell.
absl::Status InferActivation(const std::string& op, InferenceContext* c) {
  ActivationInputs inputs;
  TF_RETURN_IF_ERROR(MakeActivationInputs(op, c, &inputs));
  ShapeHandle shape = c->input(0);
  if (inputs.gradient) TF_RETURN_IF_ERROR(c->Merge(shape, c->input(1), &shape));
  ShapeHandle channels = c->UnknownShapeOfRank(1);
  if (inputs.biased && c->RankKnown(shape)) {
    int axis;
    TF_RETURN_IF_ERROR(ChannelAxis(inputs, c->Rank(shape), &axis));
    channels = c->Vector(c->Dim(shape, axis));
    if (!inputs.gradient) {
      TF_RETURN_IF_ERROR(c->Merge(channels, c->input(1), &channels));
      TF_RETURN_IF_ERROR(
          c->ReplaceDim(shape, axis, c->Dim(channels, 0), &shape));
    }
  }
  c->set_output(0, shape);
  if (inputs.gradient && inputs.biased) c->set_output(1, channels);
  for (int j = 0; j < inputs.info->hypers.size; ++j) {
    ShapeHandle scalar;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(inputs.Hyper(j)), 0, &scalar));
  }
  return absl::OkStatus();
}

void RegisterActivation(const ActivationInfo& info, bool gradient) {
  const std::string name = absl::StrCat(info.op, gradient ? "Grad" : "");
  tensorflow::register_op::OpDefBuilderWrapper op(name.c_str());
  op.Attr("T: {float, double, bfloat16, half}");
  op.Attr("B: int >= 0");
  op.Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'");
  if (gradient) {
    op.Input("grad: T").Input("output: T");
  } else {
    op.Input("x: T").Input("bias: B * T");
  }
  for (const char* hyper : info.hypers) {
    op.Input(absl::StrCat(hyper, ": double"));
  }
  if (gradient) {
    op.Output("x_grad: T").Output("bias_grad: B * T");
  } else {
    op.Output("output: T");
  }
  op.SetShapeFn(
      [name](InferenceContext* c) { return InferActivation(name, c); });
  op();
}

const bool activations_registered = [] {
  for (const ActivationInfo& info : kActivations) {
    RegisterActivation(info, false);
    RegisterActivation(info, true);
  }
  return true;
}();

#define ACTIVATION(Class)                                               \
  REGISTER_KERNEL_BUILDER(                                              \
      Name("Wdops>" #Class).Device(tensorflow::DEVICE_CPU), OutputCpu); \
  REGISTER_KERNEL_BUILDER(                                              \
      Name("Wdops>" #Class "Grad").Device(tensorflow::DEVICE_CPU), GradCpu);
#include "rules/activations.inc"

}  // namespace
}  // namespace wdops
