// Sums over variables in the tree of rules/sums.h: first over each chunk, then
// over the chunks of each variable.
#pragma once

#include "cuda/factored.h"
#include "cuda/launch.h"

namespace wdops::cuda {

// Numbers of a lane that are loaded before the first of them is added.
inline constexpr int kBatch = 8;

// Where they are; negative: nowhere.
struct Batch {
  int64_t at[kBatch];
};

template <class S>
__device__ void LoadBatch(int dtype, const void* from, const Batch& batch,
                          S* to) {
  switch (dtype) {
#define DTYPE(name, Type)                                           \
  case k_##name:                                                    \
    if constexpr (kIsComputedIn<Type, S>) {                         \
      Type numbers[kBatch] = {};                                    \
      for (int b = 0; b < kBatch; ++b) {                            \
        if (batch.at[b] >= 0) {                                     \
          numbers[b] = static_cast<const Type*>(from)[batch.at[b]]; \
        }                                                           \
      }                                                             \
      for (int b = 0; b < kBatch; ++b) to[b] = Load(numbers[b]);    \
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

  __device__ void Add(const Variable& v, const Batch& batch, const S* grad,
                      Sums* sums) const {
    S accumulator[kBatch] = {}, param[kBatch] = {};
    if (v.accumulator) LoadBatch(v.dtype, v.accumulator, batch, accumulator);
    if (v.param) LoadBatch(v.dtype, v.param, batch, param);
    for (int b = 0; b < kBatch; ++b) {
      S total = v.accumulator ? gradient_.Mean(grad[b], accumulator[b])
                              : gradient_.Scaled(grad[b]);
      if (v.param) total = total + gradient_.Penalty(param[b]);
      const double g = total, p = param[b];
      sums->a += g * g;
      sums->b += Abs(p);
      sums->c += p * p;
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

  __device__ void Add(const Variable& v, const Batch& batch, const S*,
                      Sums* sums) const {
    S param[kBatch];
    LoadBatch(v.dtype, v.param, batch, param);
    for (int b = 0; b < kBatch; ++b) {
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

  __device__ void Add(const Variable& v, const Batch& batch, const S* grad,
                      Sums* sums) const {
    constexpr int kSlots = Step<Rule, S>::kSlots;
    S param[kBatch], accumulator[kBatch] = {}, slot[kSlots][kBatch];
    LoadBatch(v.dtype, v.param, batch, param);
    for (int k = 0; k < kSlots; ++k) {
      LoadBatch(v.slot_dtype, v.slot[k], batch, slot[k]);
    }
    if (v.accumulator) LoadBatch(v.dtype, v.accumulator, batch, accumulator);
    for (int b = 0; b < kBatch; ++b) {
      if (batch.at[b] < 0) continue;  // 0 / 0, where epsilon is 0
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

// Adds up what the first kLanes threads have; thread 0 gets it.
__device__ inline void AddUpLanes(Sums* sums) {
  __shared__ Sums lane[kLanes];
  const int t = threadIdx.x;
  if (t < kLanes) lane[t] = *sums;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) lane[t] += lane[t + half];
  }
  if (t == 0) *sums = lane[0];
}

template <class Terms, class S>
__global__ void __launch_bounds__(kLanes)
    ChunkKernel(const Table* table, const Steps* steps, const Scales scales,
                Sums* of_chunks) {
  const int64_t chunk = blockIdx.x;
  const int variable = Find(table->FirstChunk(), table->count, chunk);
  const Variable v = table->Variables()[variable];
  if (v.IsFactored() || v.IsDouble() != std::is_same_v<S, double>) return;
  const Terms terms(steps, scales, variable);
  const int64_t begin = (chunk - table->FirstChunk()[variable]) * kChunk;
  const int n = v.n - begin < kChunk ? v.n - begin : kChunk;
  Sums sums;
  for (int i = threadIdx.x; i < n; i += kBatch * kLanes) {
    Batch batch;
    for (int b = 0; b < kBatch; ++b) {
      const int at = i + b * kLanes;
      batch.at[b] = at < n ? begin + at : -1;
    }
    S grad[kBatch];
    if (Terms::kOfGradient) LoadBatch(v.dtype, v.grad, batch, grad);
    if (v.rows) {
      for (int b = 0; b < kBatch; ++b) {
        if (batch.at[b] < 0) continue;
        const int64_t row = batch.at[b] / v.width;
        batch.at[b] += (v.rows[row] - row) * v.width;
      }
    }
    terms.Add(v, batch, grad, &sums);
  }
  AddUpLanes(&sums);
  if (threadIdx.x == 0) of_chunks[chunk] = sums;
}

// A chunk of a factored gradient is a tile, row after row.
template <class Terms, class S>
__global__ void __launch_bounds__(kThreads)
    TileKernel(const Table* table, const Steps* steps, const Scales scales,
               Sums* of_chunks) {
  __shared__ Tile<S> tile;
  const int64_t chunk = blockIdx.x;
  const int variable = Find(table->FirstChunk(), table->count, chunk);
  const Variable v = table->Variables()[variable];
  if (!v.IsFactored() || v.IsDouble() != std::is_same_v<S, double>) return;
  const int64_t t = chunk - table->FirstChunk()[variable];
  if (Terms::kOfGradient) FormTile(v, t, &tile);
  Sums sums;
  if (threadIdx.x < kLanes) {
    const Terms terms(steps, scales, variable);
    constexpr int kColumns = kTileColumns<S>;
    const int64_t row = t / v.across * kTileRows;
    const int64_t column = t % v.across * kColumns;
    for (int i = threadIdx.x; i < kTileRows * kColumns; i += kBatch * kLanes) {
      Batch batch;
      S grad[kBatch];
      for (int b = 0; b < kBatch; ++b) {
        const int e = i + b * kLanes;
        const int64_t r = row + e / kColumns, c = column + e % kColumns;
        batch.at[b] = r < v.Rows() && c < v.width ? r * v.width + c : -1;
        grad[b] = tile.number[e];
      }
      terms.Add(v, batch, grad, &sums);
    }
  }
  AddUpLanes(&sums);
  if (threadIdx.x == 0) of_chunks[chunk] = sums;
}

// Calls finish(variable, v, sums), on the card.
template <class Finish>
__global__ void __launch_bounds__(kLanes)
    FinishKernel(const Table* table, const Sums* of_chunks,
                 const Finish finish) {
  const int variable = blockIdx.x;
  const int64_t* const first = table->FirstChunk() + variable;
  Sums sums;
  for (int64_t c = first[0] + threadIdx.x; c < first[1]; c += kLanes) {
    sums += of_chunks[c];
  }
  AddUpLanes(&sums);
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
  if (host_table.has_dense) {
    error = Launch(&ChunkKernel<Terms, S>, host_table.Chunks(), kLanes, stream,
                   table, steps, scales, of_chunks);
  }
  if (error == cudaSuccess && host_table.has_factored) {
    error = Launch(&TileKernel<Terms, S>, host_table.Chunks(), kThreads, stream,
                   table, steps, scales, of_chunks);
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
  return Launch(&FinishKernel<Finish>, host_table.count, kLanes, stream, table,
                of_chunks, finish);
}

}  // namespace wdops::cuda
