// The op of every rule: updates a list of variables in one parallel sweep, all
// or nothing.
#include "ops/apply.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "cpu/dispatch.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/mutex.h"
#include "tensorflow/core/platform/threadpool.h"

namespace wdops {
namespace {

using tensorflow::DataType;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::PartialTensorShape;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::Var;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// Elements of one variable that a thread sweeps at a time: 28 bytes each for
// Adam in f32 make half of a usual L2.
constexpr int64_t kChunk = 16384;

int64_t Chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

// One variable of a step: its buffers, and its place in the table of chunks of
// all variables.
struct Target {
  cpu::Sweep sweep;
  const AnyStep* step;
  int64_t n;  // elements
  int64_t first_chunk;
  int element_bytes;
  const char* grad;
  // The variable, then the slots. `source` differs from `to` where a tensor
  // that was read from the variable still needs the old buffer: then every
  // chunk is copied just before it is swept.
  struct {
    const char* source;
    char* to;
  } buffer[1 + std::size(Names({}).name)];
};

char* Data(const Tensor& tensor) { return static_cast<char*>(tensor.data()); }

void SweepChunk(const Target& target, int slots, int64_t chunk) {
  const int64_t begin = (chunk - target.first_chunk) * kChunk;
  const int64_t n = std::min(kChunk, target.n - begin);
  const int64_t offset = begin * target.element_bytes;
  void* to[std::size(target.buffer)];
  for (int k = 0; k <= slots; ++k) {
    const auto& buffer = target.buffer[k];
    to[k] = buffer.to + offset;
    if (buffer.source != buffer.to) {
      memcpy(to[k], buffer.source + offset, n * target.element_bytes);
    }
  }
  target.sweep(target.step, n, to[0], target.grad + offset, to + 1);
}

class ApplyOp : public tensorflow::OpKernel {
 public:
  explicit ApplyOp(OpKernelConstruction* ctx)
      : OpKernel(ctx),
        rule_(*FindRule(ctx->def().op())),
        hypers_(HyperNames(rule_)) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtypes_));
    int n;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("N", &n));
    OP_REQUIRES_OK(ctx, CheckLengths({rule_, n}, dtypes_.size()));
  }

  void Compute(OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, Apply(ctx));
  }

 private:
  absl::Status Apply(OpKernelContext* ctx) {
    const ApplyInputs inputs{rule_, static_cast<int>(dtypes_.size())};
    const cpu::Kernels* kernels = cpu::ActiveKernels();
    if (!kernels) {
      return absl::FailedPreconditionError(
          "no instruction set is in use: import wdops before the op runs");
    }
    TF_RETURN_IF_ERROR(
        CheckHypers(inputs, hypers_, [&](int input) -> const TensorShape& {
          return ctx->input(input).shape();
        }));
    // Where every hyperparameter is a scalar there is one step for each dtype,
    // else one for each variable.
    const bool scalars = AllScalars(ctx, inputs);
    std::vector<AnyStep> steps(scalars ? kDTypeCount : inputs.n);
    TF_RETURN_IF_ERROR(MakeSteps(ctx, inputs, scalars, &steps));

    // Declared before the locks, so that no variable is destroyed while its
    // lock is held.
    std::vector<tensorflow::core::RefCountPtr<Var>> vars(inputs.Resources());
    std::vector<tensorflow::mutex_lock> locks;
    TF_RETURN_IF_ERROR(LockVariables(ctx, inputs, &vars, &locks));
    TF_RETURN_IF_ERROR(CheckTensors(inputs, [&](int input) {
      const Tensor& value = input < inputs.Resources() ? *vars[input]->tensor()
                                                       : ctx->input(input);
      return Spec<const TensorShape&>{value.dtype(), value.shape()};
    }));

    // Keeps the old buffers alive until the sweep has read them.
    std::vector<Tensor> sources(inputs.Resources());
    TF_RETURN_IF_ERROR(CopyOnWrite(ctx, vars, &sources));

    const size_t rule_index = &rule_ - kRules;
    std::vector<Target> targets(inputs.n);
    int64_t chunks = 0, bytes = 0;
    for (int i = 0; i < inputs.n; ++i) {
      const DType dtype = FromTensorFlow(dtypes_[i]);
      Target& target = targets[i];
      target.sweep = kernels->sweep[rule_index][dtype];
      target.step = &steps[scalars ? dtype : i];
      target.n = ctx->input(inputs.Grad(i)).NumElements();
      target.first_chunk = chunks;
      target.element_bytes = kDTypeBytes[dtype];
      target.grad = Data(ctx->input(inputs.Grad(i)));
      for (int k = 0; k <= rule_.slots.size; ++k) {
        const int input = k * inputs.n + i;
        char* to = Data(*vars[input]->tensor());
        const char* source = Data(sources[input]);
        target.buffer[k] = {source ? source : to, to};
      }
      chunks += Chunks(target.n);
      bytes += target.n * target.element_bytes * (3 + 2 * rule_.slots.size);
    }
    if (chunks == 0) return absl::OkStatus();

    // A core moves about 8 bytes a cycle, and waking a thread costs as much as
    // 2^17 cycles of sweeping.
    auto* pool = ctx->device()->tensorflow_cpu_worker_threads()->workers;
    const int64_t threads =
        std::min<int64_t>({pool->NumThreads(), chunks, 1 + (bytes / 8 >> 17)});
    // Each thread claims a share of what is left: long runs at first, which the
    // processor prefetches through, and single chunks at the end, so that
    // little is waited for where one thread is slow.
    std::atomic<int64_t> claimed{0};
    const auto sweep_chunks = [&](int64_t, int64_t) {
      auto target = targets.begin();
      int64_t chunk = claimed;
      while (chunk < chunks) {
        const int64_t end =
            chunk + std::max<int64_t>(1, (chunks - chunk) / (2 * threads));
        if (!claimed.compare_exchange_weak(chunk, end)) continue;
        for (; chunk < end; ++chunk) {
          while (chunk >= target->first_chunk + Chunks(target->n)) ++target;
          SweepChunk(*target, rule_.slots.size, chunk);
        }
        chunk = claimed;
      }
    };
    pool->ParallelFor(
        threads, tensorflow::thread::ThreadPool::SchedulingParams::Fixed(1),
        sweep_chunks);
    return absl::OkStatus();
  }

  bool AllScalars(OpKernelContext* ctx, const ApplyInputs& inputs) const {
    for (size_t j = 0; j < hypers_.size(); ++j) {
      if (ctx->input(inputs.Hyper(j)).dims() != 0) return false;
    }
    return true;
  }

  absl::Status MakeSteps(OpKernelContext* ctx, const ApplyInputs& inputs,
                         bool scalars, std::vector<AnyStep>* steps) const {
    std::vector<double> hyper(hypers_.size());
    for (size_t s = 0; s < steps->size(); ++s) {
      for (size_t j = 0; j < hypers_.size(); ++j) {
        const Tensor& value = ctx->input(inputs.Hyper(j));
        hyper[j] = value.flat<double>()(value.dims() == 0 ? 0 : s);
      }
      const std::string error = HyperError(hypers_, hyper.data());
      if (!error.empty()) {
        return absl::InvalidArgumentError(
            scalars ? error : absl::StrCat(error, " (", inputs.Name(s), ")"));
      }
      const int dtype = scalars ? s : FromTensorFlow(dtypes_[s]);
      rule_.make_step[dtype](hyper.data(), &(*steps)[s]);
    }
    return absl::OkStatus();
  }

  // In the order of the mutexes' addresses, as every op of TensorFlow does;
  // otherwise two ops could wait for each other.
  absl::Status LockVariables(
      OpKernelContext* ctx, const ApplyInputs& inputs,
      std::vector<tensorflow::core::RefCountPtr<Var>>* vars,
      std::vector<tensorflow::mutex_lock>* locks) const {
    std::vector<int> order(vars->size());
    for (size_t input = 0; input < vars->size(); ++input) {
      const auto& handle = tensorflow::HandleFromInput(ctx, input);
      if (!LookupResource(ctx, handle, &(*vars)[input]).ok()) {
        return Uninitialized(inputs, input);
      }
      order[input] = input;
    }
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return (*vars)[a]->mu() < (*vars)[b]->mu();
    });
    for (size_t o = 1; o < order.size(); ++o) {
      if ((*vars)[order[o - 1]].get() == (*vars)[order[o]].get()) {
        return ListedTwice(inputs, order[o - 1], order[o]);
      }
    }
    locks->reserve(order.size());
    for (int input : order) locks->emplace_back(*(*vars)[input]->mu());
    for (size_t input = 0; input < vars->size(); ++input) {
      if (!(*vars)[input]->is_initialized) return Uninitialized(inputs, input);
    }
    return absl::OkStatus();
  }

  static absl::Status Uninitialized(const ApplyInputs& inputs, int input) {
    return absl::InvalidArgumentError(
        absl::StrCat(inputs.Name(input), " is not initialized"));
  }

  // Gives a new buffer to every variable whose buffer a tensor shares that was
  // read from it, and the old one to `sources`. All allocations come before the
  // first change.
  absl::Status CopyOnWrite(
      OpKernelContext* ctx,
      const std::vector<tensorflow::core::RefCountPtr<Var>>& vars,
      std::vector<Tensor>* sources) const {
    std::vector<std::pair<int, Tensor>> fresh;
    for (size_t input = 0; input < vars.size(); ++input) {
      const Tensor& value = *vars[input]->tensor();
      if (value.NumElements() == 0 || value.RefCountIsOne()) continue;
      tensorflow::AllocatorAttributes attributes;
      attributes.set_gpu_compatible(true);
      attributes.set_nic_compatible(true);
      fresh.emplace_back(input, Tensor());
      TF_RETURN_IF_ERROR(ctx->allocate_temp(value.dtype(), value.shape(),
                                            &fresh.back().second, attributes));
    }
    for (auto& [input, value] : fresh) {
      (*sources)[input] = *vars[input]->tensor();
      *vars[input]->tensor() = value;
    }
    return absl::OkStatus();
  }

  const RuleInfo& rule_;
  const std::vector<std::string> hypers_;
  std::vector<DataType> dtypes_;
};

// What tracing can already tell.
absl::Status ApplyShape(const RuleInfo& rule, InferenceContext* c) {
  int n;
  TF_RETURN_IF_ERROR(c->GetAttr("N", &n));
  std::vector<DataType> dtypes;
  TF_RETURN_IF_ERROR(c->GetAttr("T", &dtypes));
  const ApplyInputs inputs{rule, n};
  TF_RETURN_IF_ERROR(CheckLengths(inputs, dtypes.size()));
  const auto shape_of = [&](ShapeHandle shape) {
    return PartialTensorShape(c->ShapeHandleToProto(shape));
  };
  return CheckTensors(inputs, [&](int input) -> Spec<PartialTensorShape> {
    if (input >= inputs.Resources()) {
      return {dtypes[input % n], shape_of(c->input(input))};
    }
    const auto* value = c->input_handle_shapes_and_types(input);
    if (!value || value->size() != 1) return {tensorflow::DT_INVALID, {}};
    return {(*value)[0].dtype, shape_of((*value)[0].shape)};
  });
}

void RegisterApply(const RuleInfo& rule) {
  tensorflow::register_op::OpDefBuilderWrapper op(rule.op);
  op.Attr("N: int >= 1");
  op.Attr("T: list({float, double, bfloat16, half}) >= 1");
  op.Input("var: N * resource");
  for (const char* slot : rule.slots) {
    op.Input(absl::StrCat(slot, ": N * resource"));
  }
  op.Input("grad: T");
  for (const std::string& hyper : HyperNames(rule)) {
    op.Input(absl::StrCat(hyper, ": double"));
  }
  op.SetIsStateful();
  op.SetShapeFn([&rule](InferenceContext* c) { return ApplyShape(rule, c); });
  op();
}

const bool registered = [] {
  for (const RuleInfo& rule : kRules) RegisterApply(rule);
  return true;
}();

#define RULE(name, Class)  \
  REGISTER_KERNEL_BUILDER( \
      Name("Wdops>Apply" #Class).Device(tensorflow::DEVICE_CPU), ApplyOp);
#include "rules/rules.inc"

}  // namespace
}  // namespace wdops
