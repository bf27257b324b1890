// The optimizers' ops on a GPU: what the host has checked, as tables for the
// kernels of cuda/.
#include <vector>

#include "gpu/card.h"
#include "ops/step_ops.h"
#include "rules/sums.h"

namespace wdops {
namespace {

using tensorflow::DataType;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

// An empty tensor has no address, but is not an array that there is not.
void* AddressOf(const Tensor& tensor) {
  static double nowhere[2];
  return tensor.data() ? tensor.data() : nowhere;
}

// The gradient of variable i, and what all calls say of a variable.
WdopsVariable WithGradient(OpKernelContext* ctx, const Inputs& inputs, int i,
                           DataType slot_dtype) {
  const Tensor& grad = ctx->input(inputs.Tensor(inputs.Grad(i)));
  WdopsVariable variable = {};
  variable.n = grad.NumElements();
  variable.dtype = FromTensorFlow(grad.dtype());
  variable.slot_dtype = FromTensorFlow(slot_dtype);
  if (!IsFactored(ctx, inputs, i)) {
    variable.grad = AddressOf(grad);
    return variable;
  }
  const Tensor& dz = ctx->input(inputs.Tensor(inputs.factor[i]));
  variable.x = AddressOf(grad);
  variable.dz = AddressOf(dz);
  variable.batch = grad.dim_size(0);
  variable.width = dz.dim_size(1);
  variable.n = grad.dim_size(1) * variable.width;
  return variable;
}

// The tables of a call, on the host and on the card, and its scratch.
class Tables {
 public:
  // rule < 0: for norms. `hyper` are those of all variables if `shared`, else
  // of each.
  absl::Status Make(const Card& card,
                    const std::vector<WdopsVariable>& variables, int rule,
                    const double* hyper, bool shared, int options) {
    const int count = variables.size();
    constexpr int64_t kAlignment = 64;
    table_bytes_ = Ceil(wdops_cuda_table_bytes(count), kAlignment) * kAlignment;
    const int64_t bytes =
        table_bytes_ + wdops_cuda_steps_bytes(shared ? 1 : count);
    TF_RETURN_IF_ERROR(card.AllocatePinned(bytes, &host_));
    TF_RETURN_IF_ERROR(
        Check(wdops_cuda_fill_table(variables.data(), count, host())));
    TF_RETURN_IF_ERROR(Check(wdops_cuda_fill_steps(
        rule, host(), hyper, shared, options, host() + table_bytes_)));
    TF_RETURN_IF_ERROR(card.Allocate(bytes, &card_));
    TF_RETURN_IF_ERROR(
        card.Allocate(wdops_cuda_scratch_bytes(host()), &scratch_));
    return card.Send(host_, &card_);
  }

  char* host() const { return static_cast<char*>(host_.data()); }
  char* table() const { return static_cast<char*>(card_.data()); }
  char* steps() const { return table() + table_bytes_; }
  void* scratch() const { return scratch_.data(); }

 private:
  int64_t table_bytes_;
  Tensor host_, card_, scratch_;
};

// A hyperparameter that is on the card.
const Tensor& Scale(OpKernelContext* ctx, const Inputs& inputs, int j) {
  return ctx->input(inputs.Tensor(inputs.Hyper(j)));
}

class ApplyGpu : public ApplyOp {
 public:
  explicit ApplyGpu(OpKernelConstruction* ctx) : ApplyOp(ctx, true) {}

 private:
  absl::Status Step(OpKernelContext* ctx, const Hypers& hypers,
                    const Vars& vars, Tensor* penalty) override {
    const Card card(ctx);
    Fresh fresh;
    TF_RETURN_IF_ERROR(AllocateFresh(ctx, vars, &fresh));
    std::vector<void*> values(vars.size());
    for (size_t input = 0; input < vars.size(); ++input) {
      values[input] = AddressOf(*vars[input]->tensor());
    }
    for (const auto& [input, value] : fresh) values[input] = AddressOf(value);

    std::vector<WdopsVariable> variables(inputs_.n);
    for (int i = 0; i < inputs_.n; ++i) {
      const auto value = [&](int list) {
        return list < 0 ? nullptr : values[inputs_.At(list, i)];
      };
      variables[i] = WithGradient(ctx, inputs_, i, SlotDType(vars, i));
      variables[i].param = value(0);
      for (int k = 0; k < inputs_.slots; ++k) {
        variables[i].slot[k] = value(1 + k);
      }
      variables[i].accumulator = value(inputs_.accumulator);
      variables[i].average = value(inputs_.average);
    }
    const int rule = &rule_ - kRules;
    const int options = options_.scaled_proximal * WDOPS_SCALED_PROXIMAL |
                        options_.stochastic * WDOPS_STOCHASTIC;
    Tables tables;
    TF_RETURN_IF_ERROR(tables.Make(card, variables, rule, hypers.Of(0),
                                   hypers.shared(), options));

    // All copies before the first change: what may fail comes first.
    for (auto& [input, value] : fresh) {
      TF_RETURN_IF_ERROR(card.Copy(*vars[input]->tensor(), &value));
    }
    for (auto& [input, value] : fresh) *vars[input]->tensor() = value;
    const Tensor& grad_scale = Scale(ctx, inputs_, kGradScale);
    const Tensor& clip_scale = Scale(ctx, inputs_, kClipScale);
    return Check(wdops_cuda_apply(
        rule, tables.host(), tables.table(), tables.steps(),
        grad_scale.flat<double>().data(), grad_scale.dims(),
        clip_scale.flat<double>().data(), clip_scale.dims(),
        report_penalty_ ? penalty->flat<double>().data() : nullptr,
        tables.scratch(), card.stream()));
  }
};

class NormsGpu : public NormsOp {
 public:
  explicit NormsGpu(OpKernelConstruction* ctx) : NormsOp(ctx, true) {}

 private:
  // The stream reads `values` before it writes to what others make of them
  // afterwards.
  absl::Status Measure(OpKernelContext* ctx, const Hypers& hypers,
                       const std::vector<Tensor>& values, Tensor* norm,
                       Tensor* penalty, Tensor* finite) override {
    const Card card(ctx);
    std::vector<WdopsVariable> variables(inputs_.n);
    for (int i = 0; i < inputs_.n; ++i) {
      variables[i] = WithGradient(ctx, inputs_, i, inputs_.dtypes[i]);
      if (HasVar()) variables[i].param = AddressOf(values[inputs_.At(0, i)]);
      if (inputs_.accumulator >= 0) {
        variables[i].accumulator =
            AddressOf(values[inputs_.At(inputs_.accumulator, i)]);
      }
    }
    Tables tables;
    TF_RETURN_IF_ERROR(
        tables.Make(card, variables, -1, hypers.Of(0), hypers.shared(), 0));
    const Tensor& grad_scale = Scale(ctx, inputs_, kGradScale);
    return Check(wdops_cuda_norms(
        tables.host(), tables.table(), tables.steps(),
        grad_scale.flat<double>().data(), grad_scale.dims(),
        norm->flat<double>().data(),
        report_penalty_ ? penalty->flat<double>().data() : nullptr,
        static_cast<unsigned char*>(finite->data()), tables.scratch(),
        card.stream()));
  }
};

class FactoredGradientGpu : public FactoredGradientOp {
 public:
  using FactoredGradientOp::FactoredGradientOp;

 private:
  // A step of SGD from 0 along the factors, of -1 times them.
  absl::Status Form(OpKernelContext* ctx, Tensor* grad) const override {
    const Card card(ctx);
    const RuleInfo& rule = *FindRule("Wdops>ApplySgd");
    WdopsVariable variable = WithGradient(ctx, inputs_, 0, inputs_.dtypes[0]);
    variable.param = AddressOf(*grad);
    std::vector<double> hyper(HyperNames(&rule).size());
    hyper[kGradScale] = hyper[kAccumulationScale] = hyper[kClipScale] = 1;
    hyper[kLr] = -1;
    Tables tables;
    TF_RETURN_IF_ERROR(
        tables.Make(card, {variable}, &rule - kRules, hyper.data(), true, 0));
    TF_RETURN_IF_ERROR(card.Clear(grad));
    return Check(wdops_cuda_apply(&rule - kRules, tables.host(), tables.table(),
                                  tables.steps(), nullptr, 0, nullptr, 0,
                                  nullptr, tables.scratch(), card.stream()));
  }
};

// All but the scales, which are made of gradients, and would make the host wait
// for the card.
std::vector<std::string> HostHypers(const RuleInfo* rule) {
  std::vector<std::string> names;
  for (const std::string& name : HyperNames(rule)) {
    if (name != kStepHypers[kGradScale] && name != kStepHypers[kClipScale]) {
      names.push_back(name);
    }
  }
  return names;
}

const bool steps_registered = [] {
  for (const RuleInfo& rule : kRules) {
    std::vector<std::string> names = HostHypers(&rule);
    names.insert(names.end(), {"var", "accumulator", "average"});
    names.insert(names.end(), rule.slots.begin(), rule.slots.end());
    RegisterOnCard<ApplyGpu>(rule.op, names);
  }
  std::vector<std::string> names = HostHypers(nullptr);
  names.insert(names.end(), {"var", "accumulator"});
  RegisterOnCard<NormsGpu>("Wdops>Norms", names);
  RegisterOnCard<FactoredGradientGpu>("Wdops>FactoredGradient", {});
  return true;
}();

}  // namespace
}  // namespace wdops
