// cuda/interface.h on the kernels of a CPU: what those of a GPU are compared
// with, bit by bit.
//
// A stream is nothing here, a table is the variables themselves, and there is
// no scratch.
#include <cstring>
#include <list>
#include <string>
#include <vector>

#include "cpu/activate.h"
#include "cpu/add_up.h"
#include "cpu/factored.h"
#include "cpu/float_mode.h"
#include "cpu/sweep.h"
#include "cuda/interface.h"

namespace wdops::cpu {
namespace {

constexpr int kSuccess = 0, kInvalidValue = 1;  // as cudaError_t

struct Table {
  int64_t count;

  const WdopsVariable* Variables() const {
    return reinterpret_cast<const WdopsVariable*>(this + 1);
  }
};

struct Hypers {
  double of[kStepHyperCount + std::size(Names({}).name)];
};

// Constants are made when a step is, behind the scales of that call.
struct Steps {
  int64_t rule;
  StepOptions options;
  bool shared;

  Hypers* Each() { return reinterpret_cast<Hypers*>(this + 1); }
  const Hypers& Of(int64_t i) const {
    return reinterpret_cast<const Hypers*>(this + 1)[shared ? 0 : i];
  }
};

DType DTypeOf(const WdopsVariable& v) { return static_cast<DType>(v.dtype); }

char* At(const void* data, int64_t element, int dtype) {
  char* begin = static_cast<char*>(const_cast<void*>(data));
  return begin ? begin + element * kDTypeBytes[dtype] : nullptr;
}

// The chunk of `n` elements at `begin` of all arrays; `grad` begins there, too.
Chunk ChunkAt(const WdopsVariable& v, int64_t begin, int64_t n,
              const void* grad) {
  Chunk chunk{begin, n, At(v.param, begin, v.dtype), grad};
  for (int k = 0; k < kMaxSlots; ++k) {
    chunk.slot[k] = At(v.slot[k], begin, v.slot_dtype);
  }
  chunk.accumulator = At(v.accumulator, begin, v.dtype);
  chunk.average = At(v.average, begin, v.dtype);
  return chunk;
}

// Calls run(chunk) for every run of memory of x^T dz, and adds up what it
// returns over each tile; `sums` has one entry for each.
template <class Run>
void ForTiles(const WdopsVariable& v, const Run& run, std::vector<Sums>* sums) {
  const Factored shape{v.batch, v.n / v.width, v.width};
  const FactoredKernels& kernels = (*wdops_cpu_kernels()->factored)[DTypeOf(v)];
  const int64_t compute_bytes =
      v.dtype == k_float64 ? sizeof(double) : sizeof(float);
  const auto pack = [&](const void* from, int64_t n, const Packing& packing) {
    const int64_t panels = Ceil(n, packing.width);
    std::vector<char> to(panels * packing.width * shape.batch * compute_bytes);
    packing.pack(from, shape.batch, n, 0, panels, to.data());
    return to;
  };
  const std::vector<char> x = pack(v.x, shape.rows, kernels.x);
  const std::vector<char> dz = pack(v.dz, shape.columns, kernels.dz);
  const int64_t lane_bytes = shape.batch * compute_bytes;
  std::vector<char> tile(shape.TileRows() * shape.TileColumns() *
                         kDTypeBytes[v.dtype]);
  for (int64_t t = 0; t < shape.Tiles(); ++t) {
    const int64_t row = t / shape.TilesAcross() * shape.TileRows();
    const int64_t column = t % shape.TilesAcross() * shape.TileColumns();
    const int64_t rows = std::min(shape.TileRows(), shape.rows - row);
    const int64_t columns =
        std::min(shape.TileColumns(), shape.columns - column);
    kernels.product(x.data() + row * lane_bytes,
                    dz.data() + column * lane_bytes, shape.batch, rows, columns,
                    tile.data(), nullptr, 0);
    const bool whole = columns == shape.columns;
    const int64_t runs = whole ? 1 : rows, n = whole ? rows * columns : columns;
    Sums sum;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t begin = (row + r) * shape.columns + column;
      sum += run(ChunkAt(v, begin, n, At(tile.data(), r * columns, v.dtype)));
    }
    sums->push_back(sum);
  }
}

// Copies of the rows that a variable has a gradient of, one behind the other.
class Gathered {
 public:
  explicit Gathered(const WdopsVariable& v) : dense_(v) {
    if (!v.rows) return;
    dense_.rows = nullptr;
    Gather(v, kDTypeBytes[v.dtype], &dense_.param);
    for (void*& slot : dense_.slot) {
      Gather(v, kDTypeBytes[v.slot_dtype], &slot);
    }
    Gather(v, kDTypeBytes[v.dtype], &dense_.accumulator);
    Gather(v, kDTypeBytes[v.dtype], &dense_.average);
  }
  const WdopsVariable& operator*() const { return dense_; }

 private:
  void Gather(const WdopsVariable& v, int64_t size, void** array) {
    if (!*array) return;
    std::vector<char> copy(v.n * size);
    const int64_t bytes = v.width * size;
    for (int64_t r = 0; r * v.width < v.n; ++r) {
      memcpy(&copy[r * bytes], static_cast<char*>(*array) + v.rows[r] * bytes,
             bytes);
    }
    copies_.push_back(std::move(copy));
    *array = copies_.back().data();
  }

  WdopsVariable dense_;
  std::list<std::vector<char>> copies_;
};

// Calls run(chunk) for every run of memory of a variable without rows; returns
// the sum of what it returns for each of its chunks.
template <class Run>
Sums ForChunks(const WdopsVariable& v, const Run& run) {
  std::vector<Sums> sums;
  if (v.x) {
    ForTiles(v, run, &sums);
  } else {
    for (int64_t i = 0; i < v.n; i += kChunk) {
      sums.push_back(run(
          ChunkAt(v, i, std::min(kChunk, v.n - i), At(v.grad, i, v.dtype))));
    }
  }
  return AddUp(sums.data(), sums.size());
}

// Calls run(chunk) for every run of memory of a variable.
template <class Run>
void ForRuns(const WdopsVariable& v, const Run& run) {
  if (!v.rows) {
    ForChunks(v, [&](const Chunk& chunk) {
      run(chunk);
      return Sums();
    });
    return;
  }
  for (int64_t r = 0; r * v.width < v.n; ++r) {
    const int64_t row = v.rows[r] * v.width;
    run(ChunkAt(v, row, v.width, At(v.grad, r * v.width, v.dtype)));
  }
}

std::string Quoted(const char* text) { return '"' + std::string(text) + '"'; }

template <class List, class Item>
std::string Listed(const List& list, const Item& item) {
  std::string text;
  for (const auto& entry : list) {
    text += (text.empty() ? "" : ", ") + item(entry);
  }
  return "[" + text + "]";
}

// Without a bias there is one channel.
ActivationShape ShapeOf(int64_t outer, int64_t channels, int64_t inner,
                        const void* bias) {
  if (bias) return {outer, channels, inner};
  return {1, 1, outer * channels * inner};
}

constexpr auto Alone = [](int64_t count, int64_t, const auto& run) {
  run(0, count);
};

}  // namespace
}  // namespace wdops::cpu

using namespace wdops;
using namespace wdops::cpu;

extern "C" {

// What a caller must know of rules.inc and its like, as JSON.
WDOPS_CUDA_API const char* wdops_tables() {
  static const std::string text = [] {
    const auto rule = [](const RuleInfo& rule) {
      return "{\"name\": " + Quoted(rule.name) +
             ", \"slots\": " + Listed(rule.slots, Quoted) +
             ", \"hypers\": " + Listed(rule.hypers, Quoted) +
             ", \"trust\": " + (rule.trust ? "true" : "false") + "}";
    };
    const auto layout = [](const Layout& layout) {
      return "[" + Quoted(kDTypeNames[layout.param]) + ", " +
             Quoted(kDTypeNames[layout.slot]) + "]";
    };
    const auto activation = [](const ActivationInfo& activation) {
      return "{\"name\": " + Quoted(activation.op + strlen("Wdops>")) +
             ", \"hypers\": " + Listed(activation.hypers, Quoted) + "}";
    };
    return "{\"rules\": " + Listed(kRules, rule) +
           ", \"step_hypers\": " + Listed(kStepHypers, Quoted) +
           ", \"gradient_hypers\": " + std::to_string(kGradientHyperCount) +
           ", \"dtypes\": " + Listed(kDTypeNames, Quoted) +
           ", \"layouts\": " + Listed(kLayouts, layout) +
           ", \"activations\": " + Listed(kActivations, activation) +
           ", \"isa\": " + Quoted(wdops_cpu_kernels()->isa) +
           ", \"variable_bytes\": " + std::to_string(sizeof(WdopsVariable)) +
           "}";
  }();
  return text.c_str();
}

int64_t wdops_cuda_table_bytes(int count) {
  return sizeof(Table) + count * sizeof(WdopsVariable);
}

int wdops_cuda_fill_table(const WdopsVariable* variables, int count,
                          void* table) {
  for (int i = 0; i < count; ++i) {
    const WdopsVariable& v = variables[i];
    const bool known = v.dtype >= 0 && v.dtype < kDTypeCount &&
                       v.slot_dtype >= 0 && v.slot_dtype < kDTypeCount;
    if (!known || (v.rows && v.x) ||
        FindLayout(DTypeOf(v), static_cast<DType>(v.slot_dtype)) ==
            kLayoutCount) {
      return kInvalidValue;
    }
  }
  static_cast<Table*>(table)->count = count;
  if (count > 0) {
    memcpy(static_cast<Table*>(table) + 1, variables,
           count * sizeof *variables);
  }
  return kSuccess;
}

int64_t wdops_cuda_steps_bytes(int count) {
  return sizeof(Steps) + std::max(count, 1) * sizeof(Hypers);
}

int wdops_cuda_fill_steps(int rule, const void* host_table, const double* hyper,
                          int shared, int options, void* steps) {
  auto* to = static_cast<Steps*>(steps);
  *to = {rule,
         {(options & WDOPS_SCALED_PROXIMAL) != 0,
          (options & WDOPS_STOCHASTIC) != 0},
         shared != 0};
  const int64_t given = rule < 0 ? kGradientHyperCount
                                 : kStepHyperCount + kRules[rule].hypers.size;
  const int64_t n = shared ? 1 : static_cast<const Table*>(host_table)->count;
  for (int64_t i = 0; i < n; ++i) {
    to->Each()[i] = {};
    std::copy_n(hyper + i * given, given, to->Each()[i].of);
  }
  return kSuccess;
}

int64_t wdops_cuda_scratch_bytes(const void*) { return 0; }

int wdops_cuda_apply(int rule, const void* host_table, const void*, void* steps,
                     const double* grad_scale, int grad_scales,
                     const double* clip_scale, int clip_scales, double* penalty,
                     void*, WdopsStream) {
  const auto& table = *static_cast<const Table*>(host_table);
  const auto& given = *static_cast<const Steps*>(steps);
  const Kernels& kernels = *wdops_cpu_kernels();
  for (int64_t i = 0; i < table.count; ++i) {
    const WdopsVariable& v = table.Variables()[i];
    const DType dtype = DTypeOf(v);
    const int layout = FindLayout(dtype, static_cast<DType>(v.slot_dtype));
    Hypers hyper = given.Of(i);
    if (grad_scale) hyper.of[kGradScale] *= grad_scale[grad_scales ? i : 0];
    if (clip_scale) hyper.of[kClipScale] *= clip_scale[clip_scales ? i : 0];
    AnyStep step;
    kRules[rule].make_step[dtype](hyper.of, given.options, &step);
    if (kRules[rule].trust) {
      const Sums sums = ForChunks(*Gathered(v), [&](const Chunk& chunk) {
        return kernels.trust[rule][layout](&step, chunk);
      });
      kRules[rule].set_trust[dtype](&step, TrustRatio(sums));
    }
    ForRuns(v, [&](const Chunk& chunk) {
      kernels.sweep[rule][layout](&step, chunk, nullptr);
    });
    if (!penalty) continue;
    const Sums sums = ForChunks(*Gathered(v), [&](const Chunk& chunk) {
      return kernels.gradient[dtype](&step, chunk, true);
    });
    penalty[i] = PenaltyOf(hyper.of[kL1], hyper.of[kL2], sums.b, sums.c);
  }
  return kSuccess;
}

int wdops_cuda_norms(const void* host_table, const void*, const void* steps,
                     const double* grad_scale, int grad_scales, double* norm,
                     double* penalty, unsigned char* finite, void*,
                     WdopsStream) {
  const auto& table = *static_cast<const Table*>(host_table);
  const auto& given = *static_cast<const Steps*>(steps);
  const Kernels& kernels = *wdops_cpu_kernels();
  *finite = true;
  for (int64_t i = 0; i < table.count; ++i) {
    const WdopsVariable& v = table.Variables()[i];
    const DType dtype = DTypeOf(v);
    Hypers hyper = given.Of(i);
    if (grad_scale) hyper.of[kGradScale] *= grad_scale[grad_scales ? i : 0];
    AnyStep step;
    kRules[0].make_step[dtype](hyper.of, {}, &step);
    const Sums sums = ForChunks(*Gathered(v), [&](const Chunk& chunk) {
      return kernels.gradient[dtype](&step, chunk, true);
    });
    norm[i] = std::sqrt(sums.a);
    penalty[i] =
        v.param ? PenaltyOf(hyper.of[kL1], hyper.of[kL2], sums.b, sums.c) : 0;
    *finite &= IsFinite(sums, dtype == k_float64);
  }
  return kSuccess;
}

int wdops_cuda_clip_scale(const double* norm, int count, double limit,
                          double* scale, WdopsStream) {
  const double global = std::sqrt(
      AddUp(count, [&](int64_t i) { return std::array{norm[i] * norm[i]}; }).a);
  *scale = std::isfinite(global) ? limit / std::max(limit, global) : 0;
  return kSuccess;
}

int wdops_cuda_activate(int activation, int dtype, const double* hyper,
                        int64_t outer, int64_t channels, int64_t inner,
                        const void* x, const void* bias, void* output,
                        WdopsStream) {
  const ActivationShape shape = ShapeOf(outer, channels, inner, bias);
  if (shape.Elements() == 0) return kSuccess;
  ActivateAll(*wdops_cpu_kernels()->activations, activation, hyper, shape,
              static_cast<DType>(dtype), At(x, 0, dtype), At(bias, 0, dtype),
              At(output, 0, dtype), Alone);
  return kSuccess;
}

int64_t wdops_cuda_activate_scratch_bytes(int64_t, int64_t, int64_t) {
  return 0;
}

int wdops_cuda_activate_grad(int activation, int dtype, const double* hyper,
                             int64_t outer, int64_t channels, int64_t inner,
                             const void* grad, const void* output, void* x_grad,
                             void* bias_grad, void*, WdopsStream) {
  DifferentiateAll(*wdops_cpu_kernels()->activations, activation, hyper,
                   ShapeOf(outer, channels, inner, bias_grad),
                   static_cast<DType>(dtype), At(grad, 0, dtype),
                   At(output, 0, dtype), At(x_grad, 0, dtype),
                   At(bias_grad, 0, dtype), Alone);
  return kSuccess;
}

int wdops_cuda_available() { return kSuccess; }
const char* wdops_cuda_error(int error) {
  return error == kSuccess ? "no error" : "invalid argument";
}

}  // extern "C"
