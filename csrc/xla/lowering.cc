// The ops under jit_compile=True. On a CPU they are calls of the kernels
// (xla/calls.cc): XLA would sweep each variable once for every array that it
// writes. Elsewhere the functors of rules/ build the HLO, and XLA fuses it. One
// file, because XLA's headers take half a minute to compile.
#include <algorithm>
#include <optional>
#include <utility>

#include "ops/inputs.h"
#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo.h"

namespace wdops {
namespace {

using tensorflow::DataType;
using tensorflow::TensorShape;
using tensorflow::XlaOpKernelContext;

// The sum of all elements, made in double.
template <class T>
Hlo<double> SumOf(Hlo<T> x) {
  const auto wide = static_cast<Hlo<double>>(x);
  int64_t n = 1;
  for (int64_t dimension : Dimensions(wide.op)) n *= dimension;
  return {SumOver(xla::Reshape(wide.op, {n}), {0})};
}

template <class T>
Hlo<double> SquaresOf(Hlo<T> x) {
  const auto wide = static_cast<Hlo<double>>(x);
  return SumOf(wide * wide);
}

Hlo<double> PenaltyOf(const std::vector<Hlo<double>>& hyper,
                      Hlo<double> param) {
  return PenaltyOf(hyper[kL1], hyper[kL2], SumOf(Abs(param)), SquaresOf(param));
}

// What the lowerings share: inputs, checks, and reading of variables.
class Lowering : public tensorflow::XlaOpKernel {
 public:
  Lowering(tensorflow::OpKernelConstruction* ctx, const RuleInfo* rule)
      : XlaOpKernel(ctx),
        on_cpu_(ctx->device_type() == tensorflow::DEVICE_CPU_XLA_JIT) {
    OP_REQUIRES_OK(ctx, MakeInputs(rule, ctx, &inputs_));
  }

  void Compile(XlaOpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Check(ctx));
    OP_REQUIRES_OK(ctx, on_cpu_ && !WithoutCalls() ? Call(ctx) : Lower(ctx));
  }

 protected:
  virtual absl::Status Lower(XlaOpKernelContext* ctx) = 0;
  virtual absl::Status Call(XlaOpKernelContext* ctx) = 0;

  // XLA's passes over a call take time with the square of its operands: a list
  // of 800 variables in one call would be compiled for a minute.
  static constexpr int kMostPerCall = 32;

  // Calls a handler of xla/calls.cc with the inputs of variables [begin, end)
  // and all hyperparameters. The first results are the variables, in place, if
  // it writes them; then come `results`, which are left in `call` from there
  // on.
  absl::Status CallKernels(XlaOpKernelContext* ctx, int begin, int end,
                           const char* name, const std::string& attributes,
                           bool writes, const std::vector<xla::Shape>& results,
                           std::vector<xla::XlaOp>* found) const {
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> shapes, made;
    std::vector<int> written;
    std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>>
        in_place;
    const auto add = [&](xla::XlaOp operand) {
      operands.push_back(operand);
      shapes.push_back(RowMajor(operand));
    };
    for (size_t list = 0; list < inputs_.lists.size(); ++list) {
      for (int i = begin; i < end; ++i) {
        const int input = inputs_.At(list, i);
        xla::XlaOp stored;
        TF_RETURN_IF_ERROR(ReadStored(ctx, input, &stored));
        add(stored);
        if (!writes || input >= inputs_.Resources()) continue;
        const int64_t k = written.size();
        in_place.emplace_back(xla::ShapeIndex{k},
                              std::pair(k, xla::ShapeIndex{}));
        written.push_back(input);
        made.push_back(shapes.back());
      }
    }
    for (size_t j = 0; j < inputs_.hypers.size(); ++j) {
      add(ctx->Input(inputs_.Hyper(j)));
    }
    made.insert(made.end(), results.begin(), results.end());
    const xla::XlaOp call = xla::CustomCallWithLayout(
        ctx->builder(), name, operands, xla::ShapeUtil::MakeTupleShape(made),
        shapes,
        absl::StrCat("{first = ", begin, " : i32, n = ", end - begin,
                     " : i32, ", attributes, "}"),
        /*has_side_effect=*/false, in_place, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t k = 0; k < written.size(); ++k) {
      TF_RETURN_IF_ERROR(ctx->AssignVariable(written[k],
                                             stored_dtypes_[written[k]],
                                             xla::GetTupleElement(call, k)));
    }
    for (size_t k = 0; k < results.size(); ++k) {
      found->push_back(xla::GetTupleElement(call, written.size() + k));
    }
    return absl::OkStatus();
  }

  // One number of each of n variables.
  static xla::Shape PerVariable(int n) {
    return xla::ShapeUtil::MakeShape(xla::F64, {n});
  }

  // A vector of the penalties of all variables, or an empty one.
  static void SetPenalties(XlaOpKernelContext* ctx, int output,
                           const std::vector<xla::XlaOp>& penalties) {
    xla::XlaBuilder* builder = ctx->builder();
    ctx->SetOutput(output, penalties.empty()
                               ? xla::ConstantR1<double>(builder, {})
                               : xla::ConcatInDim(builder, penalties, 0));
  }

  // An attribute of a call.
  static const char* Name(bool value) { return value ? "true" : "false"; }

  // The hyperparameters of variable i, as scalars; there are kStepHyperCount at
  // least.
  std::vector<Hlo<double>> Hypers(XlaOpKernelContext* ctx, int i) const {
    std::vector<Hlo<double>> hypers;
    for (size_t j = 0; j < inputs_.hypers.size(); ++j) {
      xla::XlaOp value = ctx->Input(inputs_.Hyper(j));
      if (ctx->InputShape(inputs_.Hyper(j)).dims() == 1) {
        value = xla::Reshape(xla::Slice(value, {i}, {i + 1}, {1}), {});
      }
      hypers.push_back({value});
    }
    while (hypers.size() < kStepHyperCount) {
      hypers.push_back({xla::ConstantR0<double>(ctx->builder(), 0)});
    }
    return hypers;
  }

  // Entry i of a list of variables, or of gradients, as a rule computes.
  template <class S>
  absl::Status Read(XlaOpKernelContext* ctx, int list, int i,
                    Hlo<S>* value) const {
    xla::XlaOp stored;
    TF_RETURN_IF_ERROR(ReadStored(ctx, inputs_.At(list, i), &stored));
    value->op = xla::ConvertElementType(
        stored, xla::primitive_util::NativeToPrimitiveType<S>());
    return absl::OkStatus();
  }

  absl::Status ReadStored(XlaOpKernelContext* ctx, int input,
                          xla::XlaOp* stored) const {
    if (input < inputs_.Resources()) {
      return ctx->ReadVariableInput(input, stored_dtypes_[input], nullptr,
                                    stored);
    }
    const int factor = inputs_.factor[input % inputs_.n];
    *stored = ctx->Input(input);
    if (factor >= 0 && !IsNoFactor(ctx->InputShape(factor))) {
      const bool wide = ctx->input_type(input) == tensorflow::DT_DOUBLE;
      *stored =
          Product(*stored, ctx->Input(factor), wide ? xla::F64 : xla::F32);
    }
    return absl::OkStatus();
  }

  // x^T dz, made in `type` and rounded to the dtype of both. XLA writes it to
  // memory.
  static xla::XlaOp Product(xla::XlaOp x, xla::XlaOp dz,
                            xla::PrimitiveType type) {
    xla::DotDimensionNumbers over_batch;
    over_batch.add_lhs_contracting_dimensions(0);
    over_batch.add_rhs_contracting_dimensions(0);
    const xla::XlaOp product =
        xla::DotGeneral(xla::ConvertElementType(x, type),
                        xla::ConvertElementType(dz, type), over_batch);
    return xla::ConvertElementType(
        product, x.builder()->GetShapePtr(x).value()->element_type());
  }

  Inputs inputs_;
  std::vector<DataType> stored_dtypes_;  // of the variables
  bool scalars_;

 private:
  const bool on_cpu_;

  absl::Status Check(XlaOpKernelContext* ctx) {
    if (inputs_.begin.back() != inputs_.Resources()) {
      return absl::InvalidArgumentError(
          "a list of variables is one vector of handles, which XLA cannot take "
          "apart: trace the step inside of the function that it compiles");
    }
    TF_RETURN_IF_ERROR(CheckHypers(
        inputs_, [&](int input) { return ctx->InputShape(input); }, &scalars_));
    std::vector<std::pair<tensorflow::XlaResource*, int>> resources;
    std::vector<Spec<TensorShape>> specs(inputs_.Hyper(0));
    stored_dtypes_.resize(inputs_.Resources());
    for (int input = 0; input < inputs_.Hyper(0); ++input) {
      if (input >= inputs_.Resources()) {
        specs[input] = {ctx->input_type(input), ctx->InputShape(input)};
        continue;
      }
      tensorflow::XlaResource* resource;
      TF_RETURN_IF_ERROR(ctx->GetResourceInput(input, &resource));
      resources.emplace_back(resource, input);
      TF_RETURN_IF_ERROR(ctx->GetVariableTypeAndShape(
          input, &specs[input].dtype, &specs[input].shape));
      stored_dtypes_[input] = specs[input].dtype;
    }
    std::sort(resources.begin(), resources.end());
    for (size_t r = 1; r < resources.size(); ++r) {
      if (resources[r - 1].first == resources[r].first) {
        return ListedTwice(inputs_, resources[r - 1].second,
                           resources[r].second);
      }
    }
    return CheckTensors(inputs_, [&](int input) -> const Spec<TensorShape>& {
      return specs[input];
    });
  }
};

template <template <class> class Rule>
class ApplyXla : public Lowering {
 public:
  explicit ApplyXla(tensorflow::OpKernelConstruction* ctx)
      : Lowering(ctx, FindRule(ctx->def().op())) {
    OP_REQUIRES_OK(ctx,
                   ctx->GetAttr("scaled_proximal", &options_.scaled_proximal));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("stochastic", &options_.stochastic));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("report_penalty", &report_penalty_));
  }

 private:
  template <class S>
  using HloStep = Step<Rule, Hlo<S>, Hlo<uint32_t>>;

  absl::Status Lower(XlaOpKernelContext* ctx) override {
    // Where every hyperparameter is a scalar, all variables share one set of
    // constants, which keeps the HLO small.
    std::optional<HloStep<float>> step32;
    std::optional<HloStep<double>> step64;
    std::vector<xla::XlaOp> penalties;
    for (int i = 0; i < inputs_.n; ++i) {
      const auto hyper = Hypers(ctx, scalars_ ? 0 : i);
      if (!scalars_ || i == 0) {
        step32.emplace(hyper.data(), options_);
        step64.emplace(hyper.data(), options_);
      }
      Hlo<double> param;
      TF_RETURN_IF_ERROR(inputs_.dtypes[i] == tensorflow::DT_DOUBLE
                             ? Update<double>(ctx, i, *step64, &param)
                             : Update<float>(ctx, i, *step32, &param));
      if (!report_penalty_) continue;
      penalties.push_back(xla::Reshape(PenaltyOf(hyper, param).op, {1}));
    }
    SetPenalties(ctx, 0, penalties);
    return absl::OkStatus();
  }

  absl::Status Call(XlaOpKernelContext* ctx) override {
    const std::string attributes = absl::StrCat(
        "rule = ", FindRule(type_string()) - kRules,
        " : i32, slots = ", inputs_.slots,
        " : i32, accumulator = ", inputs_.accumulator,
        " : i32, average = ", inputs_.average,
        " : i32, scaled_proximal = ", Name(options_.scaled_proximal),
        ", stochastic = ", Name(options_.stochastic),
        ", report_penalty = ", Name(report_penalty_));
    std::vector<xla::XlaOp> penalties;
    for (int begin = 0; begin < inputs_.n; begin += kMostPerCall) {
      const int end = std::min(begin + kMostPerCall, inputs_.n);
      std::vector<xla::Shape> results;
      if (report_penalty_) results.push_back(PerVariable(end - begin));
      TF_RETURN_IF_ERROR(CallKernels(ctx, begin, end, "wdops_apply", attributes,
                                     /*writes=*/true, results, &penalties));
    }
    SetPenalties(ctx, 0, penalties);
    return absl::OkStatus();
  }

  // `new_param`: the one that is stored, in double.
  template <class S>
  absl::Status Update(XlaOpKernelContext* ctx, int i, HloStep<S> step,
                      Hlo<double>* new_param) const {
    Hlo<S> param, grad, accumulator, average, slot[kMaxSlots];
    TF_RETURN_IF_ERROR(Read(ctx, 0, i, &param));
    TF_RETURN_IF_ERROR(Read(ctx, inputs_.lists.size() - 1, i, &grad));
    for (int k = 0; k < inputs_.slots; ++k) {
      TF_RETURN_IF_ERROR(Read(ctx, 1 + k, i, &slot[k]));
    }
    Hlo<S> total = step.Total(param, grad);
    if (inputs_.accumulator >= 0) {
      TF_RETURN_IF_ERROR(Read(ctx, inputs_.accumulator, i, &accumulator));
      total = step.Total(param, grad, accumulator);
    }
    if constexpr (kHasTrust<Rule<float>>) {
      const Hlo<S> g = step.Clip(total);
      Hlo<S> unchanged[] = {slot[0], slot[1], slot[2]};
      const Hlo<double> norm = SquaresOf(step.Decay(param));
      const Hlo<double> direction =
          SquaresOf(step.rule.Direction(g, unchanged));
      const Hlo<double> one = Like(norm, 1);
      step.rule.trust = static_cast<Hlo<S>>(Select(
          norm > 0, Select(direction > 0, Sqrt(norm / direction), one), one));
    }
    constexpr bool kScaled = kHasRate<Rule<Hlo<S>>, Hlo<S>>;
    if (kScaled && options_.scaled_proximal) {
      step.template Apply<kScaled>(param, total, slot);
    } else {
      step.template Apply<false>(param, total, slot);
    }
    if (inputs_.average >= 0) {
      TF_RETURN_IF_ERROR(Read(ctx, inputs_.average, i, &average));
      step.Average(param, average);
    }

    const Hlo<uint32_t> bits = Bits(param, step.key);
    TF_RETURN_IF_ERROR(Write(ctx, 0, i, param, bits, inputs_.slots));
    for (int k = 0; k < inputs_.slots; ++k) {
      TF_RETURN_IF_ERROR(Write(ctx, 1 + k, i, slot[k], bits, k));
    }
    if (inputs_.average >= 0) {
      TF_RETURN_IF_ERROR(
          Write(ctx, inputs_.average, i, average, bits, 1 + inputs_.slots));
    }
    if (inputs_.accumulator >= 0) {
      TF_RETURN_IF_ERROR(Write(ctx, inputs_.accumulator, i,
                               Hlo<S>{xla::ZerosLike(param.op)}, bits, 0));
    }
    if (report_penalty_) TF_RETURN_IF_ERROR(Read(ctx, 0, i, new_param));
    return absl::OkStatus();
  }

  // The random bits of every element.
  template <class S>
  Hlo<uint32_t> Bits(Hlo<S> like, const Key<Hlo<uint32_t>>& key) const {
    const auto dimensions = Dimensions(like.op);
    int64_t n = 1;
    for (int64_t dimension : dimensions) n *= dimension;
    const auto index = [&](int shift) {
      const xla::XlaOp iota =
          xla::Reshape(xla::Iota(like.op.builder(), xla::U64, n), dimensions);
      return static_cast<Hlo<uint32_t>>(Hlo<uint64_t>{iota} >> shift);
    };
    return RandomBits(key, index(32), index(0));
  }

  template <class S>
  absl::Status Write(XlaOpKernelContext* ctx, int list, int i, Hlo<S> value,
                     Hlo<uint32_t> bits, int k) const {
    const int input = inputs_.At(list, i);
    const DataType dtype = stored_dtypes_[input];
    xla::PrimitiveType storage;
    TF_RETURN_IF_ERROR(tensorflow::DataTypeToPrimitiveType(dtype, &storage));
    xla::XlaOp stored = xla::ConvertElementType(value.op, storage);
    if (options_.stochastic && dtype == tensorflow::DT_BFLOAT16) {
      const Hlo<uint32_t> raw = {xla::BitcastConvertType(value.op, xla::U32)};
      const Hlo<uint32_t> cut = (raw + Addend(bits, k)) >> 16;
      stored = xla::Select(
          (value != value).op, stored,
          xla::BitcastConvertType(xla::ConvertElementType(cut.op, xla::U16),
                                  xla::BF16));
    }
    return ctx->AssignVariable(input, dtype, stored);
  }

  StepOptions options_;
  bool report_penalty_;
};

class NormsXla : public Lowering {
 public:
  explicit NormsXla(tensorflow::OpKernelConstruction* ctx)
      : Lowering(ctx, nullptr) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("report_penalty", &report_penalty_));
  }

 private:
  absl::Status Lower(XlaOpKernelContext* ctx) override {
    xla::XlaBuilder* builder = ctx->builder();
    std::vector<xla::XlaOp> norms, penalties;
    Hlo<double> nonfinite = {xla::ConstantR0<double>(builder, 0)};
    for (int i = 0; i < inputs_.n; ++i) {
      const auto hyper = Hypers(ctx, i);
      Hlo<double> squares, penalty, nan;
      TF_RETURN_IF_ERROR(
          inputs_.dtypes[i] == tensorflow::DT_DOUBLE
              ? Measure<double>(ctx, i, hyper, &squares, &penalty, &nan)
              : Measure<float>(ctx, i, hyper, &squares, &penalty, &nan));
      norms.push_back(xla::Reshape(Sqrt(squares).op, {1}));
      if (report_penalty_) {
        penalties.push_back(xla::Reshape(penalty.op, {1}));
      }
      nonfinite = nonfinite + nan;
    }
    ctx->SetOutput(0, xla::ConcatInDim(builder, norms, 0));
    SetPenalties(ctx, 1, penalties);
    ctx->SetOutput(2, (nonfinite == 0).op);
    return absl::OkStatus();
  }

  absl::Status Call(XlaOpKernelContext* ctx) override {
    const std::string attributes =
        absl::StrCat("param = ", inputs_.lists[0] == "var" ? 0 : -1,
                     " : i32, accumulator = ", inputs_.accumulator,
                     " : i32, report_penalty = ", Name(report_penalty_));
    std::vector<xla::XlaOp> norms, penalties;
    xla::XlaOp finite = xla::ConstantR0<bool>(ctx->builder(), true);
    for (int begin = 0; begin < inputs_.n; begin += kMostPerCall) {
      const int end = std::min(begin + kMostPerCall, inputs_.n);
      const xla::Shape numbers = PerVariable(end - begin);
      std::vector<xla::Shape> results = {
          numbers, xla::ShapeUtil::MakeShape(xla::PRED, {})};
      if (report_penalty_) results.push_back(numbers);
      std::vector<xla::XlaOp> found;
      TF_RETURN_IF_ERROR(CallKernels(ctx, begin, end, "wdops_norms", attributes,
                                     /*writes=*/false, results, &found));
      norms.push_back(found[0]);
      finite = xla::And(finite, found[1]);
      if (report_penalty_) penalties.push_back(found[2]);
    }
    ctx->SetOutput(0, xla::ConcatInDim(ctx->builder(), norms, 0));
    SetPenalties(ctx, 1, penalties);
    ctx->SetOutput(2, finite);
    return absl::OkStatus();
  }

  // `nan`: 0 if all is finite.
  template <class S>
  absl::Status Measure(XlaOpKernelContext* ctx, int i,
                       const std::vector<Hlo<double>>& hyper,
                       Hlo<double>* squares, Hlo<double>* penalty,
                       Hlo<double>* nan) const {
    const Gradient<Hlo<S>> gradient(hyper.data());
    Hlo<S> param, grad, accumulator;
    TF_RETURN_IF_ERROR(Read(ctx, inputs_.lists.size() - 1, i, &grad));
    Hlo<S> total = gradient.Scaled(grad);
    if (inputs_.accumulator >= 0) {
      TF_RETURN_IF_ERROR(Read(ctx, inputs_.accumulator, i, &accumulator));
      total = gradient.Mean(grad, accumulator);
    }
    *penalty = {xla::ConstantR0<double>(ctx->builder(), 0)};
    if (inputs_.lists[0] == "var") {
      TF_RETURN_IF_ERROR(Read(ctx, 0, i, &param));
      total = total + gradient.Penalty(param);
      *penalty = PenaltyOf(hyper, static_cast<Hlo<double>>(param));
    }
    *squares = SquaresOf(total);
    // Squares of floats do not overflow a double.
    *nan =
        std::is_same_v<S, float> ? *squares - *squares : SumOf(total - total);
    return absl::OkStatus();
  }

  bool report_penalty_;
};

// Under XLA, which forms the gradient in any case, the factors go through.
class FactoredGradientXla : public tensorflow::XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;

  void Compile(XlaOpKernelContext* ctx) override {
    ctx->SetOutput(0, ctx->Input(0));
    ctx->SetOutput(1, ctx->Input(1));
  }
};

#define RULE(name, Class) \
  REGISTER_XLA_OP(Name("Wdops>Apply" #Class), ApplyXla<Class>);
#include "rules/rules.inc"
REGISTER_XLA_OP(Name("Wdops>Norms"), NormsXla);
REGISTER_XLA_OP(Name("Wdops>FactoredGradient"), FactoredGradientXla);

}  // namespace
}  // namespace wdops
