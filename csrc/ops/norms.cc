// The op of norms: the norm of every gradient of a list with its penalty, the
// penalties, and whether all is finite, in one read.
#include <algorithm>
#include <cmath>

#include "ops/step_ops.h"
#include "ops/sweep.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::DataType;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

class NormsCpu : public NormsOp {
 public:
  explicit NormsCpu(OpKernelConstruction* ctx) : NormsOp(ctx, false) {}

 private:
  absl::Status Measure(OpKernelContext* ctx, const Hypers& hypers,
                       const std::vector<Tensor>& values, Tensor* norm,
                       Tensor* penalty, Tensor* finite) override {
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    Steps steps(inputs_, kRules[0], {}, hypers);
    const std::vector<double> by_factors =
        SquaresByFactors(ctx, hypers, *kernels);
    const auto wanted = [&](int i) { return std::isnan(by_factors[i]); };
    Gradients grads;
    TF_RETURN_IF_ERROR(grads.Make(ctx, inputs_, *kernels, wanted));
    std::vector<Sums> sums(grads.Chunks());
    grads.ForChunks(
        ctx, inputs_.lists.size(),
        [&](int input) -> const Tensor& { return values[input]; },
        [&](int i, int64_t c, int64_t begin, int64_t n, const char* grad) {
          const DType dtype = FromTensorFlow(inputs_.dtypes[i]);
          const auto data = [&](int list) {
            return list < 0 ? nullptr
                            : Data(values[inputs_.At(list, i)]) +
                                  begin * kDTypeBytes[dtype];
          };
          cpu::Chunk chunk{begin, n, data(HasVar() ? 0 : -1), grad};
          chunk.accumulator = data(inputs_.accumulator);
          sums[c] += kernels->gradient[dtype](steps.Of(i, dtype), chunk,
                                              report_penalty_);
        });
    bool all_finite = true;
    for (int i = 0; i < inputs_.n; ++i) {
      if (!wanted(i)) {
        norm->vec<double>()(i) = std::sqrt(by_factors[i]);
        if (report_penalty_) penalty->vec<double>()(i) = 0;
        continue;
      }
      const Sums sum = grads.SumOver(i, sums);
      all_finite &= IsFinite(sum, inputs_.dtypes[i] == tensorflow::DT_DOUBLE);
      norm->vec<double>()(i) = std::sqrt(sum.a);
      if (!report_penalty_) continue;
      const double* hyper = hypers.Of(i);
      penalty->vec<double>()(i) =
          PenaltyOf(hyper[kL1], hyper[kL2], sum.b, sum.c);
    }
    finite->scalar<bool>()() = all_finite;
    return absl::OkStatus();
  }

  // The squared norms of factored gradients that have nothing added to them,
  // from the products of the rows of x and of dz with each other; NaN where
  // this cannot be, or is more work than to make the gradient.
  std::vector<double> SquaresByFactors(OpKernelContext* ctx,
                                       const Hypers& hypers,
                                       const cpu::Kernels& kernels) const {
    std::vector<double> squares(inputs_.n, NAN);
    if (inputs_.accumulator >= 0) return squares;
    for (int i = 0; i < inputs_.n; ++i) {
      if (!IsFactored(ctx, inputs_, i)) continue;
      const double* hyper = hypers.Of(i);
      if (HasVar() && (hyper[kL1] != 0 || hyper[kL2] != 0)) continue;
      const Tensor& x = ctx->input(inputs_.Tensor(inputs_.Grad(i)));
      const Tensor& dz = ctx->input(inputs_.Tensor(inputs_.factor[i]));
      const cpu::Factored shape = Gradients::ShapeOf(x, dz);
      const int64_t width = shape.rows + shape.columns;
      if (shape.batch * width > shape.rows * shape.columns) continue;
      const DType dtype = FromTensorFlow(x.dtype());
      std::vector<Sums> sums(shape.batch);
      // Half as many products are made, of which a core adds 8 in double a
      // cycle, while it moves 16 bytes.
      Share(ctx, shape.batch, shape.batch * shape.batch * width,
            [&](int64_t k, int64_t end) {
              for (; k < end; ++k) {
                sums[k] = (*kernels.factored)[dtype].gram(Data(x), Data(dz),
                                                          shape, k);
              }
            });
      const Sums sum = cpu::AddUp(sums.data(), sums.size());
      const double scale =
          std::abs(hyper[kAccumulationScale] * hyper[kGradScale]);
      // Where nothing can overflow, all is finite. Otherwise it takes the
      // elements to tell; and so it does where the rows of the batch cancel, or
      // the step's scale is no normal number.
      const bool safe =
          std::max(1.0, sum.b) * std::max(1.0, scale) < kSafe[dtype] &&
          scale >= 0x1p-126;
      if (safe && sum.a >= kLeastShare[dtype] * sum.b * sum.b) {
        squares[i] = sum.a * scale * scale;
      }
    }
    return squares;
  }

  // Half of what overflows; of a double, what has a square.
  static constexpr double kSafe[] = {0x1p127, 0x1p500, 0x1p127, 0x1p15};
  // Of the square of what bounds the norm. The sum over pairs of rows is off by
  // some 2^-53 of that: a norm of float64 loses 12 of its bits at most; of less
  // bits, it keeps more than the elements would, until it loses all.
  static constexpr double kLeastShare[] = {0x1p-44, 0x1p-12, 0x1p-44, 0x1p-44};
  static_assert(k_float32 == 0 && k_float64 == 1 && k_bfloat16 == 2 &&
                k_float16 == 3);
};

const bool norms_registered = [] {
  tensorflow::register_op::OpDefBuilderWrapper op("Wdops>Norms");
  op.Attr("V: int >= 0");
  op.Attr("A: int >= 0");
  op.Attr("T: list({float, double, bfloat16, half}) >= 1");
  op.Attr("U: list({float, double, bfloat16, half}) >= 0");
  op.Attr("factored: list(int) = []");
  op.Attr("report_penalty: bool = true");
  op.Input("var: V * resource");
  op.Input("accumulator: A * resource");
  op.Input("grad: T");
  op.Input("factor: U");
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
    bool report_penalty;
    TF_RETURN_IF_ERROR(c->GetAttr("report_penalty", &report_penalty));
    c->set_output(0, c->Vector(dtypes.size()));
    c->set_output(1, c->Vector(report_penalty ? dtypes.size() : 0));
    c->set_output(2, c->Scalar());
    return absl::OkStatus();
  });
  op();
  return true;
}();

REGISTER_KERNEL_BUILDER(Name("Wdops>Norms").Device(tensorflow::DEVICE_CPU),
                        NormsCpu);

}  // namespace
}  // namespace wdops
