// The kernels of the optimizers' ops, up to where a device begins: attributes,
// inputs, checks, locks and outputs.
#pragma once

#include <vector>

#include "ops/kept.h"
#include "ops/variables.h"

namespace wdops {

// Updates a list of variables, all or nothing.
class ApplyOp : public tensorflow::OpKernel {
 public:
  ApplyOp(tensorflow::OpKernelConstruction* ctx, bool scales_on_card)
      : OpKernel(ctx),
        rule_(*FindRule(ctx->def().op())),
        scales_on_card_(scales_on_card) {
    OP_REQUIRES_OK(ctx, MakeInputs(&rule_, ctx, &inputs_));
    OP_REQUIRES_OK(ctx,
                   ctx->GetAttr("scaled_proximal", &options_.scaled_proximal));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("stochastic", &options_.stochastic));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("report_penalty", &report_penalty_));
  }

  void Compute(tensorflow::OpKernelContext* ctx) final {
    OP_REQUIRES_OK(ctx, Apply(ctx));
  }

 protected:
  // The variables are locked, and all is checked. `penalty` has no entries
  // where none is asked for.
  virtual absl::Status Step(tensorflow::OpKernelContext* ctx,
                            const Hypers& hypers, const Vars& vars,
                            tensorflow::Tensor* penalty) = 0;

  // The dtype of the slots of variable i, or its own where there are none.
  tensorflow::DataType SlotDType(const Vars& vars, int i) const {
    return vars[inputs_.At(inputs_.slots > 0 ? 1 : 0, i)]->tensor()->dtype();
  }

  const RuleInfo& rule_;
  Inputs inputs_;
  StepOptions options_;
  bool report_penalty_;

 private:
  absl::Status Apply(tensorflow::OpKernelContext* ctx) {
    Hypers hypers;
    TF_RETURN_IF_ERROR(
        hypers.Make(ctx, inputs_, !rule_.trust, scales_on_card_));
    tensorflow::Tensor* penalty;
    TF_RETURN_IF_ERROR(ctx->allocate_output(
        0, tensorflow::TensorShape({report_penalty_ ? inputs_.n : 0}),
        &penalty));
    // Declared before the locks, so that no variable is destroyed while its
    // lock is held.
    Vars vars;
    std::vector<tensorflow::mutex_lock> locks;
    TF_RETURN_IF_ERROR(LookupVariables(ctx, inputs_, &vars));
    TF_RETURN_IF_ERROR(LockVariables(inputs_, vars, &locks));
    TF_RETURN_IF_ERROR(CheckTensors(inputs_, [&](int input) {
      const tensorflow::Tensor& value = input < inputs_.Resources()
                                            ? *vars[input]->tensor()
                                            : ctx->input(inputs_.Tensor(input));
      return Spec<const tensorflow::TensorShape&>{value.dtype(), value.shape()};
    }));
    return Step(ctx, hypers, vars, penalty);
  }

  bool scales_on_card_;
};

// The norm of every gradient of a list with its penalty, the penalties, and
// whether all is finite.
class NormsOp : public tensorflow::OpKernel {
 public:
  NormsOp(tensorflow::OpKernelConstruction* ctx, bool scales_on_card)
      : OpKernel(ctx), scales_on_card_(scales_on_card) {
    OP_REQUIRES_OK(ctx, MakeInputs(nullptr, ctx, &inputs_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("report_penalty", &report_penalty_));
  }

  void Compute(tensorflow::OpKernelContext* ctx) final {
    OP_REQUIRES_OK(ctx, CheckAndMeasure(ctx));
  }

 protected:
  // `values`: of every input but the hyperparameters; each is alive and
  // unchanged until this returns. `penalty` has no entries where none is asked
  // for.
  virtual absl::Status Measure(tensorflow::OpKernelContext* ctx,
                               const Hypers& hypers,
                               const std::vector<tensorflow::Tensor>& values,
                               tensorflow::Tensor* norm,
                               tensorflow::Tensor* penalty,
                               tensorflow::Tensor* finite) = 0;

  bool HasVar() const { return inputs_.lists[0] == "var"; }

  Inputs inputs_;
  bool report_penalty_;

 private:
  absl::Status CheckAndMeasure(tensorflow::OpKernelContext* ctx) {
    Hypers hypers;
    TF_RETURN_IF_ERROR(hypers.Make(ctx, inputs_, true, scales_on_card_));
    // A tensor that shares a variable's buffer makes whoever writes to the
    // variable in the meantime copy it, so no lock is held while it is read.
    std::vector<tensorflow::Tensor> values(inputs_.Hyper(0));
    for (int input = inputs_.Grad(0); input < inputs_.Hyper(0); ++input) {
      values[input] = ctx->input(inputs_.Tensor(input));
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
      return Spec<const tensorflow::TensorShape&>{values[input].dtype(),
                                                  values[input].shape()};
    }));
    tensorflow::Tensor *norm, *penalty, *finite;
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, {inputs_.n}, &norm));
    TF_RETURN_IF_ERROR(
        ctx->allocate_output(1, {report_penalty_ ? inputs_.n : 0}, &penalty));
    TF_RETURN_IF_ERROR(ctx->allocate_output(2, {}, &finite));
    return Measure(ctx, hypers, values, norm, penalty, finite);
  }

  bool scales_on_card_;
};

// Keeps the factors of a gradient, or forms it where they have too many rows.
class FactoredGradientOp : public tensorflow::OpKernel {
 public:
  explicit FactoredGradientOp(tensorflow::OpKernelConstruction* ctx)
      : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("most_rows", &most_rows_));
    inputs_.n = 1;
    inputs_.lists = {"grad"};
    inputs_.dtypes = {ctx->input_type(0)};
    inputs_.factor = {1};
    inputs_.factor_dtypes = {ctx->input_type(1)};
  }

  void Compute(tensorflow::OpKernelContext* ctx) final {
    OP_REQUIRES_OK(ctx, KeepOrForm(ctx));
  }

 protected:
  // Writes x^T dz, of the op's inputs.
  virtual absl::Status Form(tensorflow::OpKernelContext* ctx,
                            tensorflow::Tensor* grad) const = 0;

  Inputs inputs_;

 private:
  absl::Status KeepOrForm(tensorflow::OpKernelContext* ctx) const {
    TF_RETURN_IF_ERROR(CheckTensors(inputs_, [&](int input) {
      return Spec<const tensorflow::TensorShape&>{ctx->input_dtype(input),
                                                  ctx->input(input).shape()};
    }));
    const tensorflow::Tensor &x = ctx->input(0), &dz = ctx->input(1);
    if (x.dim_size(0) <= most_rows_) {
      ctx->set_output(0, x);
      ctx->set_output(1, dz);
      return absl::OkStatus();
    }
    tensorflow::Tensor *grad, *none;
    TF_RETURN_IF_ERROR(
        AllocateOutput(ctx, 0, {x.dim_size(1), dz.dim_size(1)}, &grad));
    TF_RETURN_IF_ERROR(ctx->allocate_output(1, {0}, &none));
    return Form(ctx, grad);
  }

  int64_t most_rows_;
};

}  // namespace wdops
