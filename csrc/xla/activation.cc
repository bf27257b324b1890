// The activation ops under jit_compile=True. On a CPU too they are HLO, unlike
// the steps: XLA fuses it with a model's other elementwise ops. Only the
// gradient behind a bias is a call of the kernel there, since XLA sums up
// columns one by one, or in float.
#include "ops/activation.h"

#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo.h"

namespace wdops {
namespace {

using tensorflow::XlaOpKernelContext;

template <template <class> class Activation>
class ActivationXla : public tensorflow::XlaOpKernel {
 public:
  explicit ActivationXla(tensorflow::OpKernelConstruction* ctx)
      : XlaOpKernel(ctx),
        on_cpu_(ctx->device_type() == tensorflow::DEVICE_CPU_XLA_JIT) {
    OP_REQUIRES_OK(ctx, MakeActivationInputs(ctx->def().op(), ctx, &inputs_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    const bool wide = ctx->input_type(0) == tensorflow::DT_DOUBLE;
    const bool call =
        inputs_.gradient && inputs_.biased && on_cpu_ && !WithoutCalls();
    OP_REQUIRES_OK(ctx, call   ? CallGradient(ctx)
                        : wide ? Lower<double>(ctx)
                               : Lower<float>(ctx));
  }

 private:
  // Calls the handler of xla/calls.cc.
  absl::Status CallGradient(XlaOpKernelContext* ctx) const {
    TF_RETURN_IF_ERROR(CheckOutput(ctx->InputShape(0), ctx->InputShape(1)));
    ActivationShape shape;
    TF_RETURN_IF_ERROR(ShapeOf(inputs_, ctx->InputShape(1), &shape));
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> shapes;
    for (int input = 0; input < ctx->num_inputs(); ++input) {
      operands.push_back(ctx->Input(input));
      shapes.push_back(RowMajor(operands.back()));
    }
    const xla::Shape bias_grad =
        xla::ShapeUtil::MakeShape(shapes[0].element_type(), {shape.channels});
    const xla::XlaOp call = xla::CustomCallWithLayout(
        ctx->builder(), "wdops_activation_grad", operands,
        xla::ShapeUtil::MakeTupleShape({shapes[0], bias_grad}), shapes,
        absl::StrCat("{activation = ", inputs_.activation, " : i32, outer = ",
                     shape.outer, " : i64, channels = ", shape.channels,
                     " : i64, inner = ", shape.inner, " : i64}"),
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{},
        /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < 2; ++i) {
      ctx->SetOutput(i, xla::GetTupleElement(call, i));
    }
    return absl::OkStatus();
  }

  template <class S>
  absl::Status Lower(XlaOpKernelContext* ctx) const {
    std::vector<Hlo<double>> hyper;
    for (int j = 0; j < inputs_.info->hypers.size; ++j) {
      hyper.push_back({ctx->Input(inputs_.Hyper(j))});
    }
    const Activation<Hlo<S>> activation(hyper.data());
    const auto read = [&](int input) -> Hlo<S> {
      return {xla::ConvertElementType(
          ctx->Input(input), xla::primitive_util::NativeToPrimitiveType<S>())};
    };
    const xla::PrimitiveType storage = ctx->input_xla_type(0);
    int axis = -1;
    if (inputs_.biased) {
      TF_RETURN_IF_ERROR(
          ChannelAxis(inputs_, ctx->InputShape(0).dims(), &axis));
    }
    if (!inputs_.gradient) {
      Hlo<S> z = read(0);
      if (inputs_.biased) {
        TF_RETURN_IF_ERROR(
            CheckBias(inputs_, ctx->InputShape(0), ctx->InputShape(1)));
        z = {xla::Add(z.op, read(1).op, {axis})};
      }
      ctx->SetOutput(0,
                     xla::ConvertElementType(activation.Output(z).op, storage));
      return absl::OkStatus();
    }
    TF_RETURN_IF_ERROR(CheckOutput(ctx->InputShape(0), ctx->InputShape(1)));
    const Hlo<S> x_grad = activation.Gradient(read(0), read(1));
    ctx->SetOutput(0, xla::ConvertElementType(x_grad.op, storage));
    if (!inputs_.biased) return absl::OkStatus();
    ctx->SetOutput(
        1,
        xla::ConvertElementType(
            SumOfChannels(static_cast<Hlo<double>>(x_grad).op, axis), storage));
    return absl::OkStatus();
  }

  static xla::XlaOp SumOfChannels(xla::XlaOp x, int axis) {
    std::vector<int64_t> others;
    for (int64_t i = 0; i < int64_t(Dimensions(x).size()); ++i) {
      if (i != axis) others.push_back(i);
    }
    return SumOver(x, others);
  }

  const bool on_cpu_;
  ActivationInputs inputs_;
};

#define ACTIVATION(Class)                                       \
  REGISTER_XLA_OP(Name("Wdops>" #Class), ActivationXla<Class>); \
  REGISTER_XLA_OP(Name("Wdops>" #Class "Grad"), ActivationXla<Class>);
#include "rules/activations.inc"

}  // namespace
}  // namespace wdops
