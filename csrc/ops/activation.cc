// The ops of activations behind a bias, and of their gradients: one pass each.
#include "cpu/activation.h"

#include <vector>

#include "cpu/float_mode.h"
#include "ops/activation_ops.h"
#include "ops/kernel.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

Blocks BlocksOf(const ActivationShape& shape) {
  return Blocks(shape.outer, shape.channels, shape.inner);
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
    const Blocks blocks = BlocksOf(shape);
    const DType dtype = FromTensorFlow(x.dtype());
    const int64_t size = kDTypeBytes[dtype];
    const Tensor biases = bias ? Repeated(*bias, blocks) : Tensor();
    const cpu::Activate activate =
        kernels->activations->output[inputs_.activation][dtype];
    Share(ctx, blocks.Count(), 2 * x.TotalBytes(),
          [&](int64_t block, int64_t end) {
            for (; block < end; ++block) {
              const Rows rows = blocks.At(block);
              const int64_t entry = blocks.Uniform()
                                        ? blocks.ChannelAt(rows.begin)
                                        : blocks.Column(block);
              activate(hyper, rows, Data(x) + rows.begin * size,
                       bias ? Data(biases) + entry * size : nullptr,
                       blocks.Uniform(), Data(*output) + rows.begin * size);
            }
          });
    return absl::OkStatus();
  }

  // The bias of each element of a period, where a block has rows of them.
  static Tensor Repeated(const Tensor& bias, const Blocks& blocks) {
    const int64_t period = blocks.Period();
    if (blocks.Uniform() || bias.NumElements() == period) return bias;
    Tensor repeated(bias.dtype(), TensorShape({period}));
    const int64_t size = DataTypeSize(bias.dtype());
    for (int64_t i = 0; i < period; ++i) {
      memcpy(Data(repeated) + i * size, Data(bias) + blocks.ChannelAt(i) * size,
             size);
    }
    return repeated;
  }
};

template <class T>
void StoreTotals(const std::vector<double>& totals, Tensor* to) {
  const cpu::FloatMode mode;
  T* entry = static_cast<T*>(to->data());
  for (double total : totals) Store(static_cast<Compute<T>>(total), entry++);
}

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
    std::vector<double> totals(bias_grad ? shape.channels : 0);
    if (shape.Elements() > 0) {
      Sweep(ctx, kernels->activations->gradient[inputs_.activation], hyper,
            BlocksOf(shape), grad, output, x_grad, &totals);
    }
    if (!bias_grad) return absl::OkStatus();
    switch (FromTensorFlow(output.dtype())) {
#define DTYPE(name, Type)                 \
  case k_##name:                          \
    StoreTotals<Type>(totals, bias_grad); \
    break;
#include "rules/dtypes.inc"
      case kDTypeCount:
        break;
    }
    return absl::OkStatus();
  }

  template <class PerDType>
  void Sweep(OpKernelContext* ctx, const PerDType& kernels, const double* hyper,
             const Blocks& blocks, const Tensor& grad, const Tensor& y,
             Tensor* x_grad, std::vector<double>* totals) const {
    const DType dtype = FromTensorFlow(y.dtype());
    const int64_t size = kDTypeBytes[dtype];
    const cpu::ActivateGrad activate = kernels[dtype];
    std::vector<double> sums(inputs_.biased ? blocks.SumCount() : 0);
    Share(ctx, blocks.Count(), 3 * y.TotalBytes(),
          [&](int64_t block, int64_t end) {
            for (; block < end; ++block) {
              Rows rows = blocks.At(block);
              const int64_t at = rows.begin * size;
              const auto run = [&](double* column_sums) {
                activate(hyper, rows, Data(grad) + at, Data(y) + at,
                         Data(*x_grad) + at, column_sums);
              };
              if (!inputs_.biased) {
                run(nullptr);
              } else if (blocks.Uniform()) {
                sums[blocks.FirstSum(block)] = cpu::SumOfColumns(&rows, run);
              } else {
                run(&sums[blocks.FirstSum(block)]);
              }
            }
          });
    for (size_t i = 0; i < sums.size(); ++i) {
      (*totals)[i / blocks.SumRun() % totals->size()] += sums[i];
    }
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

const bool registered = [] {
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
