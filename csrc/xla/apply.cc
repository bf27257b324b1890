// The op of every rule under jit_compile=True: the functors of rules/ build the
// HLO, and XLA fuses it.
#include "ops/apply.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo.h"

namespace wdops {
namespace {

using tensorflow::DataType;
using tensorflow::TensorShape;
using tensorflow::XlaOpKernelContext;

template <template <class> class Rule>
class ApplyXla : public tensorflow::XlaOpKernel {
 public:
  explicit ApplyXla(tensorflow::OpKernelConstruction* ctx)
      : XlaOpKernel(ctx),
        rule_(*FindRule(ctx->def().op())),
        hypers_(HyperNames(rule_)) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtypes_));
    int n;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("N", &n));
    OP_REQUIRES_OK(ctx, CheckLengths({rule_, n}, dtypes_.size()));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Apply(ctx));
  }

 private:
  absl::Status Apply(XlaOpKernelContext* ctx) {
    const ApplyInputs inputs{rule_, static_cast<int>(dtypes_.size())};
    TF_RETURN_IF_ERROR(CheckHypers(
        inputs, hypers_, [&](int input) { return ctx->InputShape(input); }));
    TF_RETURN_IF_ERROR(CheckVariables(ctx, inputs));

    bool scalars = true;
    for (size_t j = 0; j < hypers_.size(); ++j) {
      scalars &= ctx->InputShape(inputs.Hyper(j)).dims() == 0;
    }
    // Where every hyperparameter is a scalar, all variables share one set of
    // constants, which keeps the HLO small.
    std::optional<Step<Rule, Hlo<float>>> step32;
    std::optional<Step<Rule, Hlo<double>>> step64;
    for (int i = 0; i < inputs.n; ++i) {
      if (!scalars || i == 0) {
        const auto hyper = Hypers(ctx, inputs, i);
        step32.emplace(hyper.data());
        step64.emplace(hyper.data());
      }
      TF_RETURN_IF_ERROR(dtypes_[i] == tensorflow::DT_DOUBLE
                             ? Update<double>(ctx, inputs, i, *step64)
                             : Update<float>(ctx, inputs, i, *step32));
    }
    return absl::OkStatus();
  }

  absl::Status CheckVariables(XlaOpKernelContext* ctx,
                              const ApplyInputs& inputs) const {
    std::vector<std::pair<tensorflow::XlaResource*, int>> resources;
    std::vector<Spec<TensorShape>> specs(inputs.Grad(inputs.n));
    for (size_t input = 0; input < specs.size(); ++input) {
      if (static_cast<int>(input) >= inputs.Resources()) {
        specs[input] = {ctx->input_type(input), ctx->InputShape(input)};
        continue;
      }
      tensorflow::XlaResource* resource;
      TF_RETURN_IF_ERROR(ctx->GetResourceInput(input, &resource));
      resources.emplace_back(resource, input);
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(
          input, &specs[input].dtype, &specs[input].shape));
    }
    std::sort(resources.begin(), resources.end());
    for (size_t r = 1; r < resources.size(); ++r) {
      if (resources[r - 1].first == resources[r].first) {
        return ListedTwice(inputs, resources[r - 1].second,
                           resources[r].second);
      }
    }
    return CheckTensors(inputs, [&](int input) -> const Spec<TensorShape>& {
      return specs[input];
    });
  }

  // The hyperparameters of variable i, as scalars.
  std::vector<Hlo<double>> Hypers(XlaOpKernelContext* ctx,
                                  const ApplyInputs& inputs, int i) const {
    std::vector<Hlo<double>> hypers;
    for (size_t j = 0; j < hypers_.size(); ++j) {
      xla::XlaOp value = ctx->Input(inputs.Hyper(j));
      if (ctx->InputShape(inputs.Hyper(j)).dims() == 1) {
        value = xla::Reshape(xla::Slice(value, {i}, {i + 1}, {1}), {});
      }
      hypers.push_back({value});
    }
    return hypers;
  }

  template <class S>
  absl::Status Update(XlaOpKernelContext* ctx, const ApplyInputs& inputs, int i,
                      const Step<Rule, Hlo<S>>& step) const {
    const auto compute = xla::primitive_util::NativeToPrimitiveType<S>();
    Hlo<S> values[1 + Step<Rule, float>::kSlots];
    for (int k = 0; k <= rule_.slots.size; ++k) {
      xla::XlaOp stored;
      TF_RETURN_IF_ERROR(ctx->ReadVariableInput(k * inputs.n + i, dtypes_[i],
                                                nullptr, &stored));
      values[k] = {xla::ConvertElementType(stored, compute)};
    }
    const Hlo<S> grad = {
        xla::ConvertElementType(ctx->Input(inputs.Grad(i)), compute)};
    step(values[0], grad, values + 1);
    xla::PrimitiveType storage;
    TF_RETURN_IF_ERROR(
        tensorflow::DataTypeToPrimitiveType(dtypes_[i], &storage));
    for (int k = 0; k <= rule_.slots.size; ++k) {
      TF_RETURN_IF_ERROR(
          ctx->AssignVariable(k * inputs.n + i, dtypes_[i],
                              xla::ConvertElementType(values[k].op, storage)));
    }
    return absl::OkStatus();
  }

  const RuleInfo& rule_;
  const std::vector<std::string> hypers_;
  std::vector<DataType> dtypes_;
};

#define RULE(name, Class) \
  REGISTER_XLA_OP(Name("Wdops>Apply" #Class), ApplyXla<Class>);
#include "rules/rules.inc"

}  // namespace
}  // namespace wdops
