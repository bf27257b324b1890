// wdops._native: the tables, the choice of an instruction set, and the kernels
// on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <thread>

#include "cpu/add_up.h"
#include "cpu/dispatch.h"
#include "cpu/stream.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace wdops {
namespace {

int FindDType(const py::array& array, const std::string& name) {
  const auto given = py::str(array.dtype()).cast<std::string>();
  int dtype = 0;
  while (dtype < kDTypeCount && given != kDTypeNames[dtype]) ++dtype;
  if (dtype == kDTypeCount) {
    throw py::value_error(name + " has dtype " + given +
                          ", but must have float32, float64, bfloat16 or "
                          "float16");
  }
  return dtype;
}

// The arrays of one step, each of which a kernel may sweep as it is.
class Arrays {
 public:
  explicit Arrays(const py::array& first, const std::string& name)
      : n_(first.size()), first_(name), dtype_(FindDType(first, name)) {}

  DType dtype() const { return static_cast<DType>(dtype_); }
  int64_t n() const { return n_; }

  // Null where there is no array. `dtype`: what it must have.
  char* Add(const std::optional<py::array>& given, const std::string& name,
            int dtype, bool written) {
    if (!given) return nullptr;
    const py::array& array = *given;
    const int own = FindDType(array, name);
    if (own != dtype) {
      throw py::value_error(name + " has dtype " + kDTypeNames[own] + ", but " +
                            first_ + " has " + kDTypeNames[dtype_]);
    }
    if (array.size() != n_) {
      throw py::value_error(name + " has " + std::to_string(array.size()) +
                            " elements, but " + first_ + " has " +
                            std::to_string(n_));
    }
    const bool aligned = py::cast<bool>(array.attr("flags").attr("aligned"));
    if (!(array.flags() & py::array::c_style) || !aligned) {
      throw py::value_error(name + " must be contiguous and aligned");
    }
    if (written && !array.writeable()) {
      throw py::value_error(name + " must be writeable");
    }
    auto* data = static_cast<char*>(const_cast<void*>(array.data()));
    // Two views of one buffer would be swept as if they were apart.
    for (const auto& [begin, end] : ranges_) {
      if (data < end && begin < data + array.nbytes()) {
        throw py::value_error(name + " shares memory with another array");
      }
    }
    ranges_.emplace_back(data, data + array.nbytes());
    return data;
  }

 private:
  int64_t n_;
  std::string first_;
  int dtype_;
  std::vector<std::pair<char*, char*>> ranges_;
};

void CheckHypers(const std::vector<std::string>& names,
                 const std::vector<double>& hyper) {
  if (hyper.size() < names.size()) {
    throw py::value_error("there are " + std::to_string(names.size()) +
                          " hyperparameters, not " +
                          std::to_string(hyper.size()));
  }
  const std::string error = HyperError(names, Minima(names), hyper.data());
  if (!error.empty()) throw py::value_error(error);
}

// The sums that run(begin, n) gives for every chunk.
template <class Run>
Sums ForChunks(int64_t n, const Run& run) {
  std::vector<Sums> of_chunks;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    of_chunks.push_back(run(begin, std::min(kChunk, n - begin)));
  }
  return cpu::AddUp(of_chunks.data(), of_chunks.size());
}

char* Move(char* data, int64_t begin, int dtype) {
  return data ? data + begin * kDTypeBytes[dtype] : nullptr;
}

void Apply(const std::string& rule_name, const py::array& param,
           const std::vector<py::array>& slots, const py::array& grad,
           const std::optional<py::array>& accumulator,
           const std::optional<py::array>& average,
           const std::vector<double>& hyper, bool scaled_proximal,
           bool stochastic) {
  const RuleInfo* rule = nullptr;
  for (const RuleInfo& r : kRules) {
    if (rule_name == r.name) rule = &r;
  }
  if (!rule) throw py::value_error("unknown rule '" + rule_name + "'");
  if (static_cast<int>(slots.size()) != rule->slots.size) {
    throw py::value_error(rule_name + " has " +
                          std::to_string(rule->slots.size) + " slots, not " +
                          std::to_string(slots.size()));
  }
  CheckHypers(HyperNames(rule), hyper);

  Arrays arrays(param, "param");
  const DType dtype = arrays.dtype();
  DType slot_dtype = dtype;
  if (!slots.empty()) {
    slot_dtype = static_cast<DType>(FindDType(slots[0], rule->slots[0]));
    // A dtype that does not fit is refused as one that is not the param's.
    if (FindLayout(dtype, slot_dtype) == kLayoutCount) slot_dtype = dtype;
  }
  char* param_data = arrays.Add(param, "param", dtype, true);
  char* slot_data[kMaxSlots] = {};
  for (size_t k = 0; k < slots.size(); ++k) {
    slot_data[k] = arrays.Add(slots[k], rule->slots[k], slot_dtype, true);
  }
  char* grad_data = arrays.Add(grad, "grad", dtype, false);
  char* accumulated = arrays.Add(accumulator, "accumulator", dtype, true);
  char* averaged = arrays.Add(average, "average", dtype, true);
  const auto chunk_of = [&](int64_t begin, int64_t n) {
    cpu::Chunk chunk{begin, n, Move(param_data, begin, dtype),
                     Move(grad_data, begin, dtype)};
    for (size_t k = 0; k < slots.size(); ++k) {
      chunk.slot[k] = Move(slot_data[k], begin, slot_dtype);
    }
    chunk.accumulator = Move(accumulated, begin, dtype);
    chunk.average = Move(averaged, begin, dtype);
    return chunk;
  };

  AnyStep step;
  rule->make_step[dtype](hyper.data(), {scaled_proximal, stochastic}, &step);
  const cpu::Kernels& kernels = *cpu::ActiveKernels();
  const int layout = FindLayout(dtype, slot_dtype);
  const size_t r = rule - kRules;
  py::gil_scoped_release release;
  if (rule->trust) {
    const auto sums = ForChunks(arrays.n(), [&](int64_t begin, int64_t n) {
      return kernels.trust[r][layout](&step, chunk_of(begin, n));
    });
    rule->set_trust[dtype](&step, TrustRatio(sums));
  }
  ForChunks(arrays.n(), [&](int64_t begin, int64_t n) {
    kernels.sweep[r][layout](&step, chunk_of(begin, n), nullptr);
    return Sums();
  });
}

py::tuple NormOf(const py::array& grad, const std::optional<py::array>& param,
                 const std::optional<py::array>& accumulator,
                 std::vector<double> hyper) {
  CheckHypers(HyperNames(nullptr), hyper);
  hyper.resize(kStepHyperCount);
  Arrays arrays(grad, "grad");
  const DType dtype = arrays.dtype();
  char* grad_data = arrays.Add(grad, "grad", dtype, false);
  char* param_data = arrays.Add(param, "param", dtype, false);
  char* accumulated = arrays.Add(accumulator, "accumulator", dtype, false);
  AnyStep step;
  kRules[0].make_step[dtype](hyper.data(), {}, &step);
  const cpu::Kernels& kernels = *cpu::ActiveKernels();
  const auto sums = ForChunks(arrays.n(), [&](int64_t begin, int64_t n) {
    cpu::Chunk chunk{begin, n, Move(param_data, begin, dtype),
                     Move(grad_data, begin, dtype)};
    chunk.accumulator = Move(accumulated, begin, dtype);
    return kernels.gradient[dtype](&step, chunk, true);
  });
  return py::make_tuple(std::sqrt(sums.a),
                        PenaltyOf(hyper[kL1], hyper[kL2], sums.b, sums.c),
                        IsFinite(sums, dtype == k_float64));
}

// Reads the first arrays and writes the first of these, in so many threads at
// most; returns the sum of all that it read, as integers.
uint32_t Stream(const std::vector<py::array>& given, int reads, int writes,
                int threads) {
  const int count = given.size();
  if (reads < 1 || reads > std::min(count, cpu::kMaxStreams) || writes < 0 ||
      writes > reads || threads < 1) {
    throw py::value_error(
        "reads must be from 1 to the number of arrays and at most " +
        std::to_string(cpu::kMaxStreams) +
        ", writes from 0 to reads, threads at least 1");
  }
  Arrays arrays(given[0], "arrays[0]");
  if (arrays.dtype() != k_float32)
    throw py::value_error("arrays must be of float32");
  uint32_t* data[cpu::kMaxStreams];
  for (int k = 0; k < reads; ++k) {
    data[k] = reinterpret_cast<uint32_t*>(arrays.Add(
        given[k], "arrays[" + std::to_string(k) + "]", k_float32, k < writes));
  }
  const cpu::Stream stream =
      cpu::ActiveKernels()->streams->of[reads - 1][writes];
  const int64_t n = arrays.n();
  py::gil_scoped_release release;
  // Starting a thread takes as long as streaming so many bytes in a cache: what
  // is less stays in one.
  constexpr int64_t kBytes = 8 << 20;
  std::vector<std::thread> others(
      std::min<int64_t>(threads - 1, 4 * (reads + writes) * n / kBytes));
  // What a thread claims at a time: it waits little for one that is slower, and
  // the processor prefetches through a run as long as this.
  const int64_t most = 1 << 18, shares = 4 * (1 + others.size());
  const int64_t claim = std::min(most, Ceil(n, shares));
  std::atomic<int64_t> claimed{0};
  std::atomic<uint32_t> total{0};
  const auto work = [&] {
    for (int64_t begin; (begin = claimed.fetch_add(claim)) < n;) {
      total += stream(data, begin, std::min(begin + claim, n));
    }
  };
  for (std::thread& thread : others) thread = std::thread(work);
  work();
  for (std::thread& thread : others) thread.join();
  return total;
}

PYBIND11_MODULE(_native, m) {
  py::list rules;
  for (const RuleInfo& rule : kRules) {
    const std::vector<std::string> slots(rule.slots.begin(), rule.slots.end());
    rules.append(py::dict("name"_a = rule.name, "op"_a = rule.op,
                          "slots"_a = slots, "hypers"_a = HyperNames(&rule),
                          "trust"_a = rule.trust));
  }
  m.attr("rules") = rules;
  m.attr("gradient_hypers") = HyperNames(nullptr);
  py::dict minima;
  for (const Minimum& minimum : kMinima) {
    minima[minimum.hyper] = minimum.value;
  }
  m.attr("minima") = minima;
  py::list layouts;
  for (const Layout& layout : kLayouts) {
    layouts.append(
        py::make_tuple(kDTypeNames[layout.param], kDTypeNames[layout.slot]));
  }
  m.attr("layouts") = layouts;
  m.def("available_isas", &cpu::AvailableIsas);
  m.def("use_isa", &cpu::UseIsa);
  m.def("active_isa", [] { return cpu::ActiveKernels()->isa; });
  m.def("has_fma", [] { return cpu::ActiveKernels()->has_fma; });
  m.def("apply", &Apply);
  m.def("norm", &NormOf);
  m.def("stream", &Stream, "arrays"_a, "reads"_a, "writes"_a, "threads"_a);
}

}  // namespace
}  // namespace wdops
