// The ops of activations behind a bias, and of their gradients: one pass each.
#include "cpu/activation.h"

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/float_mode.h"
#include "ops/activation.h"
#include "ops/inputs.h"
#include "ops/kernel.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// What the op and that of its gradient share.
class ActivationOp : public tensorflow::OpKernel {
 public:
  explicit ActivationOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, MakeActivationInputs(ctx->def().op(), ctx, &inputs_));
  }

  void Compute(OpKernelContext* ctx) override {
    const cpu::Kernels* kernels;
    OP_REQUIRES_OK(ctx, FindKernels(&kernels));
    double hyper[kMaxActivationHypers];
    OP_REQUIRES_OK(ctx, Hypers(ctx, hyper));
    OP_REQUIRES_OK(ctx, Run(ctx, *kernels->activations, hyper));
  }

 protected:
  virtual absl::Status Run(OpKernelContext* ctx,
                           const cpu::ActivationKernels& kernels,
                           const double* hyper) = 0;

  absl::Status Hypers(OpKernelContext* ctx, double* hyper) const {
    for (int j = 0; j < inputs_.info->hypers.size; ++j) {
      const Tensor& value = ctx->input(inputs_.Hyper(j));
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

  // Of an array that is not empty.
  absl::Status BlocksOf(const TensorShape& shape,
                        std::optional<Blocks>* blocks) const {
    if (!inputs_.biased) {
      blocks->emplace(1, 1, shape.num_elements());
      return absl::OkStatus();
    }
    int axis;
    TF_RETURN_IF_ERROR(ChannelAxis(inputs_, shape.dims(), &axis));
    int64_t outer = 1, inner = 1;
    for (int i = 0; i < axis; ++i) outer *= shape.dim_size(i);
    for (int i = axis + 1; i < shape.dims(); ++i) inner *= shape.dim_size(i);
    blocks->emplace(outer, shape.dim_size(axis), inner);
    return absl::OkStatus();
  }

  ActivationInputs inputs_;
};

class OutputOp : public ActivationOp {
 public:
  using ActivationOp::ActivationOp;

 private:
  absl::Status Run(OpKernelContext* ctx, const cpu::ActivationKernels& kernels,
                   const double* hyper) override {
    const Tensor& x = ctx->input(0);
    if (inputs_.biased) {
      TF_RETURN_IF_ERROR(CheckBias(inputs_, x.shape(), ctx->input(1).shape()));
    }
    Tensor* output;
    TF_RETURN_IF_ERROR(
        ctx->forward_input_or_allocate_output({0}, 0, x.shape(), &output));
    if (x.NumElements() == 0) return absl::OkStatus();
    std::optional<Blocks> blocks;
    TF_RETURN_IF_ERROR(BlocksOf(x.shape(), &blocks));
    const DType dtype = FromTensorFlow(x.dtype());
    const int64_t size = kDTypeBytes[dtype];
    const Tensor bias =
        inputs_.biased ? Repeated(ctx->input(1), *blocks) : Tensor();
    const cpu::Activate activate = kernels.output[inputs_.activation][dtype];
    Share(ctx, blocks->Count(), 2 * x.TotalBytes(),
          [&](int64_t block, int64_t end) {
            for (; block < end; ++block) {
              const Rows rows = blocks->At(block);
              const int64_t entry = blocks->Uniform()
                                        ? blocks->ChannelAt(rows.begin)
                                        : blocks->Column(block);
              activate(hyper, rows, Data(x) + rows.begin * size,
                       inputs_.biased ? Data(bias) + entry * size : nullptr,
                       blocks->Uniform(), Data(*output) + rows.begin * size);
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

class GradOp : public ActivationOp {
 public:
  using ActivationOp::ActivationOp;

 private:
  absl::Status Run(OpKernelContext* ctx, const cpu::ActivationKernels& kernels,
                   const double* hyper) override {
    const Tensor &grad = ctx->input(0), &y = ctx->input(1);
    TF_RETURN_IF_ERROR(CheckOutput(grad.shape(), y.shape()));
    int64_t channels = 0;
    if (inputs_.biased) {
      int axis;
      TF_RETURN_IF_ERROR(ChannelAxis(inputs_, y.dims(), &axis));
      channels = y.dim_size(axis);
    }
    Tensor *x_grad, *bias_grad = nullptr;
    TF_RETURN_IF_ERROR(
        ctx->forward_input_or_allocate_output({0, 1}, 0, y.shape(), &x_grad));
    if (inputs_.biased) {
      TF_RETURN_IF_ERROR(
          ctx->allocate_output(1, TensorShape({channels}), &bias_grad));
    }
    std::vector<double> totals(channels);
    if (y.NumElements() > 0) {
      std::optional<Blocks> blocks;
      TF_RETURN_IF_ERROR(BlocksOf(y.shape(), &blocks));
      Sweep(ctx, kernels.gradient[inputs_.activation], hyper, *blocks, grad, y,
            x_grad, &totals);
    }
    if (!inputs_.biased) return absl::OkStatus();
    switch (FromTensorFlow(y.dtype())) {
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
    // Of each block's one channel, or of its columns.
    const int64_t of_blocks = !inputs_.biased ? 0
                              : blocks.Uniform()
                                  ? blocks.Count()
                                  : blocks.Period() * blocks.BlocksDown();
    std::vector<double> sums(of_blocks);
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
                sums[block] = cpu::SumOfColumns(&rows, run);
              } else {
                run(&sums[blocks.FirstSum(block)]);
              }
            }
          });
    for (int64_t i = 0; i < of_blocks; ++i) {
      const int64_t element =
          blocks.Uniform() ? blocks.At(i).begin : i % blocks.Period();
      (*totals)[blocks.ChannelAt(element)] += sums[i];
    }
  }
};

// What tracing can already tell.
absl::Status ActivationShape(const std::string& op, InferenceContext* c) {
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
      [name](InferenceContext* c) { return ActivationShape(name, c); });
  op();
}

const bool registered = [] {
  for (const ActivationInfo& info : kActivations) {
    RegisterActivation(info, false);
    RegisterActivation(info, true);
  }
  return true;
}();

#define ACTIVATION(Class)                                              \
  REGISTER_KERNEL_BUILDER(                                             \
      Name("Wdops>" #Class).Device(tensorflow::DEVICE_CPU), OutputOp); \
  REGISTER_KERNEL_BUILDER(                                             \
      Name("Wdops>" #Class "Grad").Device(tensorflow::DEVICE_CPU), GradOp);
#include "rules/activations.inc"

}  // namespace
}  // namespace wdops
