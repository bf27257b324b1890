// Fills the tables on the host, and says what refuses a call.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/table.h"

namespace wdops::cuda {
namespace {

bool IsMultiple(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool IsValid(const WdopsVariable& v) {
  if (v.n < 0 || FindLayout(static_cast<DType>(v.dtype),
                            static_cast<DType>(v.slot_dtype)) == kLayoutCount) {
    return false;
  }
  if ((v.grad || v.rows) && (v.x || v.dz)) return false;
  if (v.n == 0) return true;
  const bool factored =
      !v.grad && !v.rows && v.batch >= 0 && (v.batch == 0 || (v.x && v.dz));
  if (!v.grad && !factored) return false;
  return !(v.rows || factored) || (v.width > 0 && v.n % v.width == 0);
}

Variable Complete(const WdopsVariable& given) {
  Variable v{given};
  if (v.IsRun()) v.width = v.n;
  const int width = WidthOf(v.IsDouble());
  v.height = v.width ? v.n / v.width : 0;
  v.across = Ceil(v.width, v.IsFactored() ? kTileVectors * width : width);
  v.bytes = kDTypeBytes[v.dtype];
  v.slot_bytes = kDTypeBytes[v.slot_dtype];
  v.aligned = v.width % width == 0 || (v.width == v.n && !v.rows);
  const void* const arrays[] = {v.param, v.grad, v.accumulator, v.average};
  for (const void* array : arrays)
    v.aligned &= IsMultiple(array, v.bytes * width);
  for (const void* slot : v.slot) {
    v.aligned &= IsMultiple(slot, v.slot_bytes * width);
  }
  v.factors_aligned = v.height % width == 0 && v.width % width == 0 &&
                      IsMultiple(v.x, v.bytes * width) &&
                      IsMultiple(v.dz, v.bytes * width);
  return v;
}

int64_t PiecesOf(const Variable& v) {
  if (v.IsFactored()) return Ceil(v.height, kTileRows) * v.across;
  return Ceil(v.height * v.across, kThreads * kVectors);
}

int64_t ChunksOf(const Variable& v) {
  return v.IsFactored() ? PiecesOf(v) : Chunks(v.n);
}

}  // namespace
}  // namespace wdops::cuda

using namespace wdops;
using namespace wdops::cuda;

int64_t wdops_cuda_table_bytes(int count) {
  return sizeof(Table) + 2 * (count + 1) * sizeof(int64_t) +
         count * sizeof(Variable);
}

int wdops_cuda_fill_table(const WdopsVariable* variables, int count,
                          void* bytes) {
  for (int i = 0; i < count; ++i) {
    if (!IsValid(variables[i])) return cudaErrorInvalidValue;
  }
  Table& table = *new (bytes) Table{count};
  auto* pieces = const_cast<int64_t*>(table.FirstPiece());
  auto* chunks = const_cast<int64_t*>(table.FirstChunk());
  auto* entries = const_cast<Variable*>(table.Variables());
  pieces[0] = chunks[0] = 0;
  for (int i = 0; i < count; ++i) {
    const Variable v = entries[i] = Complete(variables[i]);
    if (v.n > 0) {
      (v.IsDouble() ? table.has_double : table.has_float) = true;
      (v.IsRun() ? table.has_runs : table.has_places) = true;
    }
    pieces[i + 1] = pieces[i] + PiecesOf(v);
    chunks[i + 1] = chunks[i] + ChunksOf(v);
  }
  return cudaSuccess;
}

int64_t wdops_cuda_steps_bytes(int count) {
  const int shared = 2;  // one for float, one for double
  return sizeof(Steps) + std::max(count, shared) * sizeof(OneStep);
}

int wdops_cuda_fill_steps(int rule, const void* host_table, const double* hyper,
                          int shared, int options, void* bytes) {
  if (rule >= kRuleCount) return cudaErrorInvalidValue;
  // The gradient's hyperparameters come first in those of every rule.
  const RuleInfo& info = kRules[std::max(rule, 0)];
  if (shared && info.trust) return cudaErrorInvalidValue;
  const Table& table = *static_cast<const Table*>(host_table);
  const int given =
      rule < 0 ? +kGradientHyperCount : kStepHyperCount + info.hypers.size;
  std::vector<double> one(kStepHyperCount + info.hypers.size);
  Steps& steps = *new (bytes) Steps{shared != 0};
  for (int i = 0; i < (shared ? 2 : table.count); ++i) {
    const DType dtype = shared ? (i ? k_float64 : k_float32)
                               : static_cast<DType>(table.Variables()[i].dtype);
    std::copy_n(hyper + (shared ? 0 : int64_t{i} * given), given, one.begin());
    OneStep& step = *steps.Of(i, i);
    info.make_step[dtype](one.data(),
                          {(options & WDOPS_SCALED_PROXIMAL) != 0,
                           (options & WDOPS_STOCHASTIC) != 0},
                          &step.step);
    std::copy_n(one.begin(), +kGradientHyperCount, step.gradient);
    step.clip_scale = one[kClipScale];
  }
  return cudaSuccess;
}

int64_t wdops_cuda_scratch_bytes(const void* host_table) {
  return static_cast<const Table*>(host_table)->Chunks() * sizeof(Sums);
}

int wdops_cuda_available() {
  int cards = 0;
  const cudaError_t error = cudaGetDeviceCount(&cards);
  return error != cudaSuccess ? error : cards ? cudaSuccess : cudaErrorNoDevice;
}

const char* wdops_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
