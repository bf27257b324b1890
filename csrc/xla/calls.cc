// The kernels of cpu/ as custom calls of XLA: under jit_compile=True on a CPU,
// a step is the sweep that it is without, in place and with the same bits, and
// so is the gradient of an activation behind a bias.
#include <algorithm>
#include <vector>

#include "cpu/activate.h"
#include "cpu/add_up.h"
#include "cpu/claims.h"
#include "cpu/dispatch.h"
#include "rules/table.h"
#include "xla/ffi/api/ffi.h"

// Of xla/ffi/ffi_api.h, which does not go together with the header above.
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
}

namespace wdops {
namespace {

namespace ffi = xla::ffi;

// As Share of ops/kernel.h, in XLA's pool.
template <class Run>
void Share(ffi::ThreadPool& pool, int64_t count, int64_t bytes,
           const Run& run) {
  cpu::ShareAmong(
      cpu::WorthWaking(pool.num_threads(), count, bytes), count,
      [&](auto task) { pool.Schedule(std::move(task)); }, run);
}

DType TypeOf(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F64:
      return k_float64;
    case ffi::DataType::BF16:
      return k_bfloat16;
    case ffi::DataType::F16:
      return k_float16;
    default:
      return k_float32;
  }
}

// The operands of a call: lists of n arrays, then hyperparameters, each a
// scalar or with an entry for each variable of the step.
class Operands {
 public:
  Operands(const ffi::RemainingArgs& args, int n) : n_(n) {
    buffers_.reserve(args.size());
    for (size_t a = 0; a < args.size(); ++a) {
      buffers_.push_back(args.get<ffi::AnyBuffer>(a).value());
    }
  }

  int64_t Size(int list, int i) const { return At(list, i).element_count(); }
  char* Data(int list, int i, int64_t begin) const {
    if (list < 0) return nullptr;
    return At(list, i).reinterpret_data<char>() +
           begin * kDTypeBytes[TypeOf(list, i)];
  }
  DType TypeOf(int list, int i) const { return wdops::TypeOf(At(list, i)); }

  // How many a hyperparameter has that is no scalar; 1: all are.
  int64_t Entries(int lists) const {
    int64_t entries = 1;
    for (size_t b = lists * n_; b < buffers_.size(); ++b) {
      entries = std::max<int64_t>(entries, buffers_[b].element_count());
    }
    return entries;
  }
  // Entry e of every hyperparameter; there are kStepHyperCount at least.
  std::vector<double> Hypers(int lists, int64_t e) const {
    std::vector<double> hypers;
    for (size_t b = lists * n_; b < buffers_.size(); ++b) {
      const double* values = static_cast<double*>(buffers_[b].untyped_data());
      hypers.push_back(values[buffers_[b].element_count() == 1 ? 0 : e]);
    }
    hypers.resize(std::max<size_t>(hypers.size(), kStepHyperCount));
    return hypers;
  }

 private:
  const ffi::AnyBuffer& At(int list, int i) const {
    return buffers_[list * n_ + i];
  }

  int n_;
  std::vector<ffi::AnyBuffer> buffers_;
};

// The constants of a step for each variable of a call, of which the first is
// variable `first` of the step.
class Steps {
 public:
  // Every call checks the entries of all variables: a step is many calls.
  std::string Make(const Operands& operands, const RuleInfo& rule,
                   const std::vector<std::string>& names, StepOptions options,
                   int lists, int list, int first, int n) {
    const std::vector<double> minima = Minima(names);
    const int64_t entries = operands.Entries(lists);
    for (int64_t e = 0; e < entries; ++e) {
      const std::string error =
          HyperError(names, minima, operands.Hypers(lists, e).data());
      if (error.empty()) continue;
      return entries == 1 ? error
                          : error + " (entry " + std::to_string(e) + ")";
    }
    shared_ = entries == 1 && !rule.trust;
    steps_.resize(shared_ ? kDTypeCount : n);
    for (size_t s = 0; s < steps_.size(); ++s) {
      hypers_.push_back(operands.Hypers(lists, first + s));
      const int dtype = shared_ ? s : operands.TypeOf(list, s);
      rule.make_step[dtype](hypers_[s].data(), options, &steps_[s]);
    }
    return "";
  }
  AnyStep* Of(int i, DType dtype) { return &steps_[shared_ ? dtype : i]; }
  double Penalty(int i, double absolute, double squares) const {
    const std::vector<double>& hyper = hypers_[shared_ ? 0 : i];
    return PenaltyOf(hyper[kL1], hyper[kL2], absolute, squares);
  }

 private:
  bool shared_;
  std::vector<AnyStep> steps_;
  std::vector<std::vector<double>> hypers_;
};

// The chunks of all variables, one behind the other.
class AllChunks {
 public:
  AllChunks(const Operands& operands, int list, int n) {
    for (int i = 0; i < n; ++i) {
      sizes_.push_back(operands.Size(list, i));
      bytes_ += sizes_[i] * kDTypeBytes[operands.TypeOf(list, i)];
      first_.push_back(first_[i] + Chunks(sizes_[i]));
    }
  }

  // Calls run(variable, chunk, begin, n) for each. `passes`: how many arrays of
  // a variable are read or written.
  template <class Run>
  void ForEach(ffi::ThreadPool& pool, int passes, const Run& run) const {
    Share(pool, first_.back(), bytes_ * passes, [&](int64_t c, int64_t end) {
      int i = std::upper_bound(first_.begin(), first_.end(), c) - 1 -
              first_.begin();
      for (; c < end; ++c) {
        while (c >= first_[i + 1]) ++i;
        const int64_t begin = (c - first_[i]) * kChunk;
        run(i, c, begin, std::min(kChunk, sizes_[i] - begin));
      }
    });
  }

  std::vector<Sums> ForSums() const { return std::vector<Sums>(first_.back()); }
  Sums SumOver(int i, const std::vector<Sums>& of_chunks) const {
    return cpu::AddUp(of_chunks.data() + first_[i], first_[i + 1] - first_[i]);
  }

 private:
  std::vector<int64_t> sizes_;
  std::vector<int64_t> first_ = {0};
  int64_t bytes_ = 0;
};

ffi::Error Apply(ffi::ThreadPool pool, int32_t first, int32_t n, int32_t rule,
                 int32_t slots, int32_t accumulator, int32_t average,
                 bool scaled_proximal, bool stochastic, bool report_penalty,
                 ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const cpu::Kernels& kernels = *cpu::ActiveKernels();
  const RuleInfo& info = kRules[rule];
  const Operands operands(args, n);
  const int lists = 1 + slots + (accumulator >= 0) + (average >= 0) + 1;
  const int grad = lists - 1;
  for (int input = 0; input < grad * n; ++input) {
    if (args.get<ffi::AnyBuffer>(input)->untyped_data() !=
        (*rets.get<ffi::AnyBuffer>(input))->untyped_data()) {
      return ffi::Error::Internal("XLA has copied a variable of a step");
    }
  }
  Steps steps;
  const std::string error =
      steps.Make(operands, info, HyperNames(&info),
                 {scaled_proximal, stochastic}, lists, 0, first, n);
  if (!error.empty()) return ffi::Error::InvalidArgument(error);
  const auto layout_of = [&](int i) {
    return FindLayout(operands.TypeOf(0, i), operands.TypeOf(slots, i));
  };
  const auto step_of = [&](int i) {
    return steps.Of(i, operands.TypeOf(0, i));
  };
  const auto chunk_of = [&](int i, int64_t begin, int64_t size) {
    const auto data = [&](int list) { return operands.Data(list, i, begin); };
    cpu::Chunk chunk{begin, size, data(0), data(grad)};
    for (int k = 0; k < slots; ++k) chunk.slot[k] = data(1 + k);
    chunk.accumulator = data(accumulator);
    chunk.average = data(average);
    return chunk;
  };

  const AllChunks chunks(operands, 0, n);
  if (info.trust) {
    std::vector<Sums> sums = chunks.ForSums();
    chunks.ForEach(pool, lists,
                   [&](int i, int64_t c, int64_t begin, int64_t size) {
                     sums[c] = kernels.trust[rule][layout_of(i)](
                         step_of(i), chunk_of(i, begin, size));
                   });
    for (int i = 0; i < n; ++i) {
      info.set_trust[operands.TypeOf(0, i)](
          step_of(i), TrustRatio(chunks.SumOver(i, sums)));
    }
  }
  std::vector<Sums> sums = chunks.ForSums();
  chunks.ForEach(
      pool, 2 * lists - 1, [&](int i, int64_t c, int64_t begin, int64_t size) {
        kernels.sweep[rule][layout_of(i)](step_of(i), chunk_of(i, begin, size),
                                          report_penalty ? &sums[c] : nullptr);
      });
  if (!report_penalty) return ffi::Error::Success();
  double* penalty = static_cast<double*>(
      (*rets.get<ffi::AnyBuffer>(grad * n))->untyped_data());
  for (int i = 0; i < n; ++i) {
    const Sums sum = chunks.SumOver(i, sums);
    penalty[i] = steps.Penalty(i, sum.a, sum.b);
  }
  return ffi::Error::Success();
}

ffi::Error Norms(ffi::ThreadPool pool, int32_t first, int32_t n, int32_t param,
                 int32_t accumulator, bool report_penalty,
                 ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> norm,
                 ffi::Result<ffi::AnyBuffer> finite, ffi::RemainingRets rets) {
  const cpu::Kernels& kernels = *cpu::ActiveKernels();
  const Operands operands(args, n);
  const int lists = (param >= 0) + (accumulator >= 0) + 1, grad = lists - 1;
  const AllChunks chunks(operands, grad, n);
  Steps steps;
  const std::string error = steps.Make(operands, kRules[0], HyperNames(nullptr),
                                       {}, lists, grad, first, n);
  if (!error.empty()) return ffi::Error::InvalidArgument(error);
  std::vector<Sums> sums = chunks.ForSums();
  chunks.ForEach(
      pool, lists, [&](int i, int64_t c, int64_t begin, int64_t size) {
        const auto data = [&](int list) {
          return operands.Data(list, i, begin);
        };
        cpu::Chunk chunk{begin, size, data(param), data(grad)};
        chunk.accumulator = data(accumulator);
        const DType dtype = operands.TypeOf(grad, i);
        sums[c] =
            kernels.gradient[dtype](steps.Of(i, dtype), chunk, report_penalty);
      });
  bool all_finite = true;
  for (int i = 0; i < n; ++i) {
    const Sums sum = chunks.SumOver(i, sums);
    all_finite &= IsFinite(sum, operands.TypeOf(grad, i) == k_float64);
    norm->typed_data<double>()[i] = std::sqrt(sum.a);
    if (!report_penalty) continue;
    (*rets.get<ffi::AnyBuffer>(0))->typed_data<double>()[i] =
        steps.Penalty(i, sum.b, sum.c);
  }
  finite->typed_data<bool>()[0] = all_finite;
  return ffi::Error::Success();
}

ffi::Error GradientOfActivation(ffi::ThreadPool pool, int32_t activation,
                                int64_t outer, int64_t channels, int64_t inner,
                                ffi::AnyBuffer grad, ffi::AnyBuffer output,
                                ffi::RemainingArgs hypers,
                                ffi::Result<ffi::AnyBuffer> x_grad,
                                ffi::Result<ffi::AnyBuffer> bias_grad) {
  double hyper[kMaxActivationHypers];
  for (size_t j = 0; j < hypers.size(); ++j) {
    hyper[j] = hypers.get<ffi::AnyBuffer>(j)->typed_data<double>()[0];
  }
  const auto data = [](const ffi::AnyBuffer& buffer) {
    return static_cast<char*>(buffer.untyped_data());
  };
  cpu::DifferentiateAll(*cpu::ActiveKernels()->activations, activation, hyper,
                        {outer, channels, inner}, TypeOf(grad), data(grad),
                        data(output), data(*x_grad), data(*bias_grad),
                        [&](int64_t count, int64_t bytes, const auto& run) {
                          Share(pool, count, bytes, run);
                        });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kApply, Apply,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("first")
                           .Attr<int32_t>("n")
                           .Attr<int32_t>("rule")
                           .Attr<int32_t>("slots")
                           .Attr<int32_t>("accumulator")
                           .Attr<int32_t>("average")
                           .Attr<bool>("scaled_proximal")
                           .Attr<bool>("stochastic")
                           .Attr<bool>("report_penalty")
                           .RemainingArgs()
                           .RemainingRets());
XLA_FFI_DEFINE_HANDLER(kNorms, Norms,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("first")
                           .Attr<int32_t>("n")
                           .Attr<int32_t>("param")
                           .Attr<int32_t>("accumulator")
                           .Attr<bool>("report_penalty")
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .RemainingRets());
XLA_FFI_DEFINE_HANDLER(kGradientOfActivation, GradientOfActivation,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("activation")
                           .Attr<int64_t>("outer")
                           .Attr<int64_t>("channels")
                           .Attr<int64_t>("inner")
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "wdops_activation_grad", "Host",
                         kGradientOfActivation);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "wdops_apply", "Host", kApply);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "wdops_norms", "Host", kNorms);

}  // namespace
}  // namespace wdops
