// A tile of a factored gradient, made where it is used.
#pragma once

#include "cuda/memory.h"

namespace wdops::cuda {

template <class S>
__device__ S LoadAs(int dtype, const void* from, int64_t at) {
  switch (dtype) {
#define DTYPE(name, Type)                              \
  case k_##name:                                       \
    if constexpr (kIsComputedIn<Type, S>) {            \
      return Load(static_cast<const Type*>(from)[at]); \
    }                                                  \
    break;
#include "rules/dtypes.inc"
  }
  return 0;
}

// As it is when it has been stored.
template <class S>
__device__ S RoundTo(int dtype, S value) {
  switch (dtype) {
#define DTYPE(name, Type)                   \
  case k_##name:                            \
    if constexpr (kIsComputedIn<Type, S>) { \
      Type stored;                          \
      Store(value, &stored);                \
      return Load(stored);                  \
    }                                       \
    break;
#include "rules/dtypes.inc"
  }
  return 0;
}

// Columns [begin, begin + kColumns) of kDepth rows, of which there are `depth`,
// of `from` [.., n].
template <int kDepth, int kColumns, class S>
__device__ void LoadPanel(int dtype, const void* from, int64_t row, int depth,
                          int64_t n, int64_t begin, S* panel) {
  for (int e = threadIdx.x; e < kDepth * kColumns; e += kThreads) {
    const int k = e / kColumns;
    const int64_t column = begin + e % kColumns;
    panel[e] = k < depth && column < n
                   ? LoadAs<S>(dtype, from, (row + k) * n + column)
                   : S(0);
  }
}

// Tile `t` of x^T dz, row after row. Every element is added up over the batch
// in its order, with one rounding for each row, so that it has the bits of the
// CPU's. Not inlined: a kernel would keep its registers for what it seldom
// calls.
template <class S>
__device__ __noinline__ const S* FormTile(const Variable& v, int64_t t) {
  constexpr int kDepth = 16, kHeight = kTileRows * kTileVectors / kThreads;
  constexpr int kColumns = kTileColumns<S>;
  // First panels of x and dz, then the tile.
  __shared__ Vector<S> room[kTileRows * kTileVectors];
  static_assert(kDepth * (kTileRows + kColumns) <= kTileRows * kColumns);
  S* const number = room[0].of;
  S* const x = number;
  S* const dz = x + kDepth * kTileRows;
  const int row = threadIdx.x / kTileVectors * kHeight;
  const int column = threadIdx.x % kTileVectors;
  S sums[kHeight][kWidth<S>] = {};
  for (int64_t first = 0; first < v.batch; first += kDepth) {
    const int depth =
        static_cast<int>(v.batch - first < kDepth ? v.batch - first : kDepth);
    LoadPanel<kDepth, kTileRows>(v.dtype, v.x, first, depth, v.Rows(),
                                 t / v.across * kTileRows, x);
    LoadPanel<kDepth, kColumns>(v.dtype, v.dz, first, depth, v.width,
                                t % v.across * kColumns, dz);
    __syncthreads();
    for (int k = 0; k < depth; ++k) {
      const Vector<S> dz_row =
          room[(kDepth * kTileRows + k * kColumns) / kWidth<S> + column];
      for (int r = 0; r < kHeight; ++r) {
        for (int w = 0; w < kWidth<S>; ++w) {
          sums[r][w] =
              Fma(x[k * kTileRows + row + r], dz_row.of[w], sums[r][w]);
        }
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < kHeight; ++r) {
    for (int w = 0; w < kWidth<S>; ++w) {
      number[(row + r) * kColumns + column * kWidth<S> + w] =
          RoundTo(v.dtype, sums[r][w]);
    }
  }
  __syncthreads();
  return number;
}

}  // namespace wdops::cuda
