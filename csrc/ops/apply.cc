// The op of every rule: updates a list of variables in one parallel sweep, all
// or nothing.
#include <cstring>

#include "ops/step_ops.h"
#include "ops/sweep.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace wdops {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::PartialTensorShape;
using tensorflow::Tensor;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// One variable of a step.
struct Target {
  AnyStep* step;
  DType dtype;
  int layout;
};

class ApplyCpu : public ApplyOp {
 public:
  explicit ApplyCpu(OpKernelConstruction* ctx) : ApplyOp(ctx, false) {}

 private:
  absl::Status Step(OpKernelContext* ctx, const Hypers& hypers,
                    const Vars& vars, Tensor* penalty) override {
    const cpu::Kernels* kernels;
    TF_RETURN_IF_ERROR(FindKernels(&kernels));
    Steps steps(inputs_, rule_, options_, hypers);
    Gradients grads;
    TF_RETURN_IF_ERROR(
        grads.Make(ctx, inputs_, *kernels, [](int) { return true; }));
    std::vector<Target> targets(inputs_.n);
    for (int i = 0; i < inputs_.n; ++i) {
      const DType dtype = FromTensorFlow(inputs_.dtypes[i]);
      const DType slot = FromTensorFlow(SlotDType(vars, i));
      targets[i] = {steps.Of(i, dtype), dtype, FindLayout(dtype, slot)};
    }

    const auto value = [&](int input) -> const Tensor& {
      return *vars[input]->tensor();
    };

    const size_t rule = &rule_ - kRules;
    // Reads what has no fresh buffer yet, and writes nothing.
    if (rule_.trust) {
      std::vector<Sums> sums(grads.Chunks());
      grads.ForChunks(
          ctx, inputs_.lists.size(), value,
          [&](int i, int64_t c, int64_t begin, int64_t n, const char* grad) {
            const cpu::Chunk chunk = ChunkOf(vars, i, begin, n, grad);
            sums[c] +=
                kernels->trust[rule][targets[i].layout](targets[i].step, chunk);
          });
      for (int i = 0; i < inputs_.n; ++i) {
        rule_.set_trust[targets[i].dtype](targets[i].step,
                                          TrustRatio(grads.SumOver(i, sums)));
      }
    }

    // Keeps the old buffers alive until the sweep has read them: CopyChunk
    // copies each chunk just before it is swept.
    std::vector<Tensor> sources(inputs_.Resources());
    Fresh fresh;
    TF_RETURN_IF_ERROR(AllocateFresh(ctx, vars, &fresh));
    for (auto& [input, value] : fresh) {
      sources[input] = *vars[input]->tensor();
      *vars[input]->tensor() = value;
    }
    std::vector<Sums> sums(report_penalty_ ? grads.Chunks() : 0);
    grads.ForChunks(
        ctx, 2 * inputs_.lists.size() - 1, value,
        [&](int i, int64_t c, int64_t begin, int64_t n, const char* grad) {
          const Target& target = targets[i];
          CopyChunk(vars, sources, i, begin, n);
          const cpu::Chunk chunk = ChunkOf(vars, i, begin, n, grad);
          Sums of_run;
          kernels->sweep[rule][target.layout](
              target.step, chunk, report_penalty_ ? &of_run : nullptr);
          if (report_penalty_) sums[c] += of_run;
        });
    for (int i = 0; report_penalty_ && i < inputs_.n; ++i) {
      const Sums sum = grads.SumOver(i, sums);
      const double* hyper = hypers.Of(i);
      penalty->vec<double>()(i) =
          PenaltyOf(hyper[kL1], hyper[kL2], sum.a, sum.b);
    }
    return absl::OkStatus();
  }

  cpu::Chunk ChunkOf(const Vars& vars, int i, int64_t begin, int64_t n,
                     const char* grad) const {
    const auto data = [&](int list) -> char* {
      if (list < 0) return nullptr;
      const Tensor& value = *vars[inputs_.At(list, i)]->tensor();
      return Data(value) + begin * DataTypeSize(value.dtype());
    };
    cpu::Chunk chunk{begin, n, data(0), grad};
    for (int k = 0; k < inputs_.slots; ++k) chunk.slot[k] = data(1 + k);
    chunk.accumulator = data(inputs_.accumulator);
    chunk.average = data(inputs_.average);
    return chunk;
  }

  void CopyChunk(const Vars& vars, const std::vector<Tensor>& sources, int i,
                 int64_t begin, int64_t n) const {
    for (size_t list = 0; list + 1 < inputs_.lists.size(); ++list) {
      const int input = inputs_.At(list, i);
      const char* source = Data(sources[input]);
      if (!source) continue;
      const int size = DataTypeSize(sources[input].dtype());
      memcpy(Data(*vars[input]->tensor()) + begin * size, source + begin * size,
             n * size);
    }
  }
};

// What tracing can already tell.
absl::Status ApplyShape(const RuleInfo& rule, InferenceContext* c) {
  Inputs inputs;
  TF_RETURN_IF_ERROR(MakeInputs(&rule, c, &inputs));
  bool report_penalty;
  TF_RETURN_IF_ERROR(c->GetAttr("report_penalty", &report_penalty));
  c->set_output(0, c->Vector(report_penalty ? inputs.n : 0));
  const auto shape_of = [&](ShapeHandle shape) {
    return PartialTensorShape(c->ShapeHandleToProto(shape));
  };
  return CheckTensors(inputs, [&](int input) -> Spec<PartialTensorShape> {
    const int tensor = inputs.Tensor(input);
    if (input >= inputs.Grad(inputs.n)) {
      return {inputs.factor_dtypes[input - inputs.Grad(inputs.n)],
              shape_of(c->input(tensor))};
    }
    if (input >= inputs.Resources()) {
      return {inputs.dtypes[input % inputs.n], shape_of(c->input(tensor))};
    }
    if (inputs.IsPacked(input)) return {tensorflow::DT_INVALID, {}};
    const auto* value = c->input_handle_shapes_and_types(tensor);
    if (!value || value->size() != 1) return {tensorflow::DT_INVALID, {}};
    return {(*value)[0].dtype, shape_of((*value)[0].shape)};
  });
}

void RegisterApply(const RuleInfo& rule) {
  tensorflow::register_op::OpDefBuilderWrapper op(rule.op);
  op.Attr("V: int >= 1");
  if (rule.slots.size > 0) op.Attr("S: int >= 1");
  op.Attr("A: int >= 0");
  op.Attr("E: int >= 0");
  op.Attr("T: list({float, double, bfloat16, half}) >= 1");
  op.Attr("U: list({float, double, bfloat16, half}) >= 0");
  op.Attr("factored: list(int) = []");
  op.Attr("scaled_proximal: bool = false");
  op.Attr("stochastic: bool = false");
  op.Attr("report_penalty: bool = false");
  op.Input("var: V * resource");
  for (const char* slot : rule.slots) {
    op.Input(absl::StrCat(slot, ": S * resource"));
  }
  op.Input("accumulator: A * resource");
  op.Input("average: E * resource");
  op.Input("grad: T");
  op.Input("factor: U");
  for (const std::string& hyper : HyperNames(&rule)) {
    op.Input(absl::StrCat(hyper, ": double"));
  }
  op.Output("penalty: double");
  op.SetIsStateful();
  op.SetShapeFn([&rule](InferenceContext* c) { return ApplyShape(rule, c); });
  op();
}

const bool steps_registered = [] {
  for (const RuleInfo& rule : kRules) RegisterApply(rule);
  return true;
}();

#define RULE(name, Class)  \
  REGISTER_KERNEL_BUILDER( \
      Name("Wdops>Apply" #Class).Device(tensorflow::DEVICE_CPU), ApplyCpu);
#include "rules/rules.inc"

}  // namespace
}  // namespace wdops
