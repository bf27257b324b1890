// The op of norms: the norm of every gradient of a list with its penalty, the
// penalties, and whether all is finite, in one read.
#include <cmath>

#include "ops/sweep.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::DataType;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

class NormsOp : public tensorflow::OpKernel {
 public:
  explicit NormsOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, MakeInputs(nullptr, ctx, &inputs_));
  }

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Measure(ctx));
  }

 private:
  absl::Status Measure(OpKernelContext* ctx) {
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    Steps steps;
    TF_RETURN_IF_ERROR(steps.Make(ctx, inputs_, kRules[0], {}));
    // A tensor that shares a variable's buffer makes whoever writes to the
    // variable in the meantime copy it, so no lock is held while it is read.
    std::vector<Tensor> values(inputs_.Grad(inputs_.n));
    for (int i = 0; i < inputs_.n; ++i) {
      values[inputs_.Grad(i)] = ctx->input(inputs_.Grad(i));
    }
    {
      Vars vars;
      TF_RETURN_IF_ERROR(LookupVariables(ctx, inputs_, &vars));
      for (size_t input = 0; input < vars.size(); ++input) {
        tensorflow::tf_shared_lock lock(*vars[input]->mu());
        if (!vars[input]->is_initialized) return Uninitialized(inputs_, input);
        values[input] = *vars[input]->tensor();
      }
    }
    TF_RETURN_IF_ERROR(CheckTensors(inputs_, [&](int input) {
      return Spec<const TensorShape&>{values[input].dtype(),
                                      values[input].shape()};
    }));
    Tensor *norm, *penalty, *finite;
    TF_RETURN_IF_ERROR(
        ctx->allocate_output(0, TensorShape({inputs_.n}), &norm));
    TF_RETURN_IF_ERROR(
        ctx->allocate_output(1, TensorShape({inputs_.n}), &penalty));
    TF_RETURN_IF_ERROR(ctx->allocate_output(2, TensorShape({}), &finite));

    const Places places(ctx, inputs_);
    const bool has_var = inputs_.lists[0] == "var";
    std::vector<cpu::Sums> sums(places.Chunks());
    ForChunks(ctx, places, inputs_.lists.size(),
              [&](int i, int64_t c, int64_t begin, int64_t n) {
                const DType dtype = FromTensorFlow(inputs_.dtypes[i]);
                const auto data = [&](int input) {
                  return Data(values[input]) + begin * kDTypeBytes[dtype];
                };
                cpu::Chunk chunk{begin, n, has_var ? data(i) : nullptr,
                                 data(inputs_.Grad(i))};
                if (inputs_.accumulator >= 0) {
                  chunk.accumulator = data(inputs_.At(inputs_.accumulator, i));
                }
                sums[c] = kernels->gradient[dtype](steps.Of(i, dtype), chunk);
              });
    bool all_finite = true;
    for (int i = 0; i < inputs_.n; ++i) {
      const cpu::Sums sum = places.SumOver(i, sums);
      all_finite &= cpu::IsFinite(sum, FromTensorFlow(inputs_.dtypes[i]));
      norm->vec<double>()(i) = std::sqrt(sum.a);
      penalty->vec<double>()(i) =
          PenaltyOf(HyperOf(ctx, inputs_, kL1, i),
                    HyperOf(ctx, inputs_, kL2, i), sum.b, sum.c);
    }
    finite->scalar<bool>()() = all_finite;
    return absl::OkStatus();
  }

  Inputs inputs_;
};

const bool registered = [] {
  tensorflow::register_op::OpDefBuilderWrapper op("Wdops>Norms");
  op.Attr("V: int >= 0");
  op.Attr("A: int >= 0");
  op.Attr("T: list({float, double, bfloat16, half}) >= 1");
  op.Input("var: V * resource");
  op.Input("accumulator: A * resource");
  op.Input("grad: T");
  for (const std::string& hyper : HyperNames(nullptr)) {
    op.Input(absl::StrCat(hyper, ": double"));
  }
  op.Output("norm: double");
  op.Output("penalty: double");
  op.Output("finite: bool");
  op.SetIsStateful();
  op.SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
    std::vector<DataType> dtypes;
    TF_RETURN_IF_ERROR(c->GetAttr("T", &dtypes));
    c->set_output(0, c->Vector(dtypes.size()));
    c->set_output(1, c->Vector(dtypes.size()));
    c->set_output(2, c->Scalar());
    return absl::OkStatus();
  });
  op();
  return true;
}();

REGISTER_KERNEL_BUILDER(Name("Wdops>Norms").Device(tensorflow::DEVICE_CPU),
                        NormsOp);

}  // namespace
}  // namespace wdops
