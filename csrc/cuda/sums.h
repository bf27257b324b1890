// Sums over variables in the tree of rules/sums.h: first over each chunk, then
// over the chunks of each variable.
#pragma once

#include "cuda/factored.h"
#include "cuda/launch.h"

namespace wdops::cuda {

// Numbers of a lane that are loaded before the first of them is added: so few
// threads keep a card's memory busy with nothing less.
template <class S>
inline constexpr int kBatch = 64 / sizeof(S);

// Where they are: in a run of memory, or anywhere, or, if negative, nowhere.
struct Run {
  int64_t begin;
  int count;

  __device__ bool Has(int b) const { return b < count; }
  __device__ int64_t At(int b) const { return begin + b * kLanes; }
};

template <class S>
struct Places {
  int64_t at[kBatch<S>];

  __device__ bool Has(int b) const { return at[b] >= 0; }
  __device__ int64_t At(int b) const { return at[b]; }
};

// 0 where there is no number.
template <class Batch, class S>
__device__ void LoadBatch(int dtype, const void* from, const Batch& batch,
                          S* to) {
  switch (dtype) {
#define DTYPE(name, Type)                                           \
  case k_##name:                                                    \
    if constexpr (kIsComputedIn<Type, S>) {                         \
      Type numbers[kBatch<S>] = {};                                 \
      for (int b = 0; b < kBatch<S>; ++b) {                         \
        if (batch.Has(b)) {                                         \
          numbers[b] = static_cast<const Type*>(from)[batch.At(b)]; \
        }                                                           \
      }                                                             \
      for (int b = 0; b < kBatch<S>; ++b) to[b] = Load(numbers[b]); \
    }                                                               \
    break;
#include "rules/dtypes.inc"
  }
}

// Of the gradient with accumulator and, where there is a param, penalty.
template <class S>
class GradientTerms {
 public:
  static constexpr bool kOfGradient = true;

  __device__ GradientTerms(const Steps* steps, const Scales& scales,
                           int variable)
      : gradient_(scales.GradientOf<S>(
            *steps->Of(variable, std::is_same_v<S, double>), variable)) {}

  template <class Batch>
  __device__ void Add(const Variable& v, const Batch& batch, const S* grad,
                      Sums* sums) const {
    S accumulator[kBatch<S>] = {}, param[kBatch<S>] = {};
    if (v.accumulator) LoadBatch(v.dtype, v.accumulator, batch, accumulator);
    if (v.param) {
      LoadBatch(v.dtype, v.param, batch, param);
      for (int b = 0; b < kBatch<S>; ++b) {
        const double p = param[b];
        sums->b += Abs(p);
        sums->c += p * p;
      }
    }
    for (int b = 0; b < kBatch<S>; ++b) {
      S total = v.accumulator ? gradient_.Mean(grad[b], accumulator[b])
                              : gradient_.Scaled(grad[b]);
      if (v.param) total = total + gradient_.Penalty(param[b]);
      const double g = total;
      sums->a += g * g;
      if constexpr (std::is_same_v<S, double>) sums->d += g - g;
    }
  }

 private:
  Gradient<S> gradient_;
};

// Of the penalty.
template <class S>
struct PenaltyTerms {
  static constexpr bool kOfGradient = false;

  __device__ PenaltyTerms(const Steps*, const Scales&, int) {}

  template <class Batch>
  __device__ void Add(const Variable& v, const Batch& batch, const S*,
                      Sums* sums) const {
    S param[kBatch<S>];
    LoadBatch(v.dtype, v.param, batch, param);
    for (int b = 0; b < kBatch<S>; ++b) {
      const double p = param[b];
      sums->a += Abs(p);
      sums->b += p * p;
    }
  }
};

// Of a rule's trust.
template <template <class> class Rule, class S>
class TrustTerms {
 public:
  static constexpr bool kOfGradient = true;

  __device__ TrustTerms(const Steps* steps, const Scales& scales, int variable)
      : step_(scales.StepOf<Rule, S>(
            *steps->Of(variable, std::is_same_v<S, double>), variable)) {}

  template <class Batch>
  __device__ void Add(const Variable& v, const Batch& batch, const S* grad,
                      Sums* sums) const {
    constexpr int kSlots = Step<Rule, S>::kSlots;
    S param[kBatch<S>], accumulator[kBatch<S>] = {}, slot[kSlots][kBatch<S>];
    LoadBatch(v.dtype, v.param, batch, param);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      LoadBatch(v.slot_dtype, v.slot[k], batch, slot[k]);
    }
    if (v.accumulator) LoadBatch(v.dtype, v.accumulator, batch, accumulator);
#pragma unroll
    for (int b = 0; b < kBatch<S>; ++b) {
      if (!batch.Has(b)) continue;  // 0 / 0, where epsilon is 0
      S s[kSlots];
      for (int k = 0; k < kSlots; ++k) s[k] = slot[k][b];
      const S total = v.accumulator
                          ? step_.Total(param[b], grad[b], accumulator[b])
                          : step_.Total(param[b], grad[b]);
      const double decayed = step_.Decay(param[b]);
      const double direction = step_.rule.Direction(step_.Clip(total), s);
      sums->a += decayed * decayed;
      sums->b += direction * direction;
    }
  }

 private:
  Step<Rule, S> step_;
};

// A block's sums of every lane: kTerms of them.
inline constexpr int kTerms = sizeof(Sums) / sizeof(double);

struct Lanes {
  double sum[kTerms][kLanes];
};

// Adds up what the first kLanes threads stored; thread 0 gets it.
__device__ inline Sums AddUp(Lanes* lanes) {
  auto& sum = lanes->sum;
  const int t = threadIdx.x;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t >= half) continue;
    for (int k = 0; k < kTerms; ++k) sum[k][t] += sum[k][t + half];
  }
  return {sum[0][0], sum[1][0], sum[2][0], sum[3][0]};
}

__device__ inline Sums AddUp(const Sums& of_thread) {
  __shared__ Lanes lanes;
  const int t = threadIdx.x;
  if (t < kLanes) {
    lanes.sum[0][t] = of_thread.a;
    lanes.sum[1][t] = of_thread.b;
    lanes.sum[2][t] = of_thread.c;
    lanes.sum[3][t] = of_thread.d;
  }
  return AddUp(&lanes);
}

// The chunk of a block, and whose it is.
template <class S>
struct Chunk {
  int variable;
  const Variable& v;
  int64_t index;  // of those of the variable
  bool mine;      // whether `v` is of a kind that is computed in S

  __device__ explicit Chunk(const Table* table)
      : variable(Find(table->FirstChunk(), table->count, blockIdx.x)),
        v(table->Variables()[variable]),
        index(blockIdx.x - table->FirstChunk()[variable]),
        mine(v.IsDouble() == std::is_same_v<S, double>) {}
};

template <class Terms, class S>
__global__ void __launch_bounds__(kLanes, 1)
    RunKernel(const Table* table, const Steps* steps, const Scales scales,
              Sums* of_chunks) {
  const Chunk<S> chunk(table);
  const Variable& v = chunk.v;
  if (!chunk.mine || !v.IsRun()) return;
  const Terms terms(steps, scales, chunk.variable);
  const int64_t begin = chunk.index * kChunk;
  const int n = v.n - begin < kChunk ? v.n - begin : kChunk;
  Sums sums;
  for (int i = threadIdx.x; i < n; i += kBatch<S> * kLanes) {
    const Run run{begin + i, (n - i + kLanes - 1) / kLanes};
    S grad[kBatch<S>];
    if (Terms::kOfGradient) LoadBatch(v.dtype, v.grad, run, grad);
    terms.Add(v, run, grad, &sums);
  }
  sums = AddUp(sums);
  if (threadIdx.x == 0) of_chunks[blockIdx.x] = sums;
}

// Of sparse rows, and of a factored gradient: that of a tile, row after row.
template <class Terms, class S>
__global__ void __launch_bounds__(kThreads, 1)
    PlacesKernel(const Table* table, const Steps* steps, const Scales scales,
                 Sums* of_chunks) {
  const Chunk<S> chunk(table);
  const Variable& v = chunk.v;
  if (!chunk.mine || v.IsRun()) return;
  const bool formed = Terms::kOfGradient && v.IsFactored();
  if (formed) FormTile<S>(v, chunk.index);
  constexpr int kColumns = kTileColumns<S>;
  const int64_t first_row = chunk.index / v.across * kTileRows;
  const int64_t first_column = chunk.index % v.across * kColumns;
  const int n = v.IsFactored() ? kTileRows * kColumns : kChunk;
  Sums sums;
  if (threadIdx.x < kLanes) {
    const Terms terms(steps, scales, chunk.variable);
    for (int i = threadIdx.x; i < n; i += kBatch<S> * kLanes) {
      Places<S> grad_places, places;
      S grad[kBatch<S>];
      for (int b = 0; b < kBatch<S>; ++b) {
        const int e = i + b * kLanes;
        int64_t& at = places.at[b] = -1;
        if (v.IsFactored()) {
          const int64_t row = first_row + e / kColumns;
          const int64_t column = first_column + e % kColumns;
          if (row < v.height && column < v.width) at = row * v.width + column;
          if (formed) {
            grad[b] = SharedRoom<S>().tile[e / kWidth<S>].of[e % kWidth<S>];
          }
          continue;
        }
        const int64_t g = chunk.index * kChunk + e;
        grad_places.at[b] = g < v.n ? g : -1;
        if (g < v.n) at = v.rows[g / v.width] * v.width + g % v.width;
      }
      if (Terms::kOfGradient && v.rows) {
        LoadBatch(v.dtype, v.grad, grad_places, grad);
      }
      terms.Add(v, places, grad, &sums);
    }
  }
  sums = AddUp(sums);
  if (threadIdx.x == 0) of_chunks[blockIdx.x] = sums;
}

// Calls finish(variable, v, sums), on the card. A thread has a lane of one term
// alone, so that many of its loads can be under way at a time.
template <class Finish>
__global__ void __launch_bounds__(kTerms* kLanes, 1)
    FinishKernel(const Table* table, const Sums* of_chunks,
                 const Finish finish) {
  __shared__ Lanes lanes;
  const int variable = blockIdx.x;
  const int lane = threadIdx.x % kLanes, term = threadIdx.x / kLanes;
  const int64_t* const first = table->FirstChunk() + variable;
  const auto* const terms = reinterpret_cast<const double*>(of_chunks) + term;
  double sum = 0;
#pragma unroll 16
  for (int64_t c = first[0] + lane; c < first[1]; c += kLanes) {
    sum += terms[c * kTerms];
  }
  lanes.sum[term][lane] = sum;
  const Sums sums = AddUp(&lanes);
  if (threadIdx.x == 0) finish(variable, table->Variables()[variable], sums);
}

template <class Terms, class S>
cudaError_t SumChunks(const Table& host_table, const Table* table,
                      const Steps* steps, const Scales& scales, Sums* of_chunks,
                      cudaStream_t stream) {
  if (!(std::is_same_v<S, double> ? host_table.has_double
                                  : host_table.has_float)) {
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  if (host_table.has_runs) {
    error = Launch(&RunKernel<Terms, S>, host_table.Chunks(), kLanes, stream,
                   table, steps, scales, of_chunks);
  }
  if (error == cudaSuccess && host_table.has_places) {
    error = Launch(&PlacesKernel<Terms, S>, host_table.Chunks(), kThreads,
                   stream, table, steps, scales, of_chunks);
  }
  return error;
}

template <template <class> class Terms, class Finish>
cudaError_t SumUp(const Table& host_table, const Table* table,
                  const Steps* steps, const Scales& scales, void* scratch,
                  const Finish& finish, cudaStream_t stream) {
  Sums* const of_chunks = static_cast<Sums*>(scratch);
  cudaError_t error = SumChunks<Terms<float>, float>(host_table, table, steps,
                                                     scales, of_chunks, stream);
  if (error != cudaSuccess) return error;
  error = SumChunks<Terms<double>, double>(host_table, table, steps, scales,
                                           of_chunks, stream);
  if (error != cudaSuccess) return error;
  return Launch(&FinishKernel<Finish>, host_table.count, kTerms * kLanes,
                stream, table, of_chunks, finish);
}

}  // namespace wdops::cuda
