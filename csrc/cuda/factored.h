// A tile of a factored gradient, made where it is used.
#pragma once

#include "cuda/memory.h"

namespace wdops::cuda {

// Some rows of x and dz, of which a thread loads a vector each.
template <class S>
struct Panel {
  static constexpr int kOfX = kTileRows / kWidth<S>;
  static constexpr int kDepth = kThreads / kOfX;
  Vector<S> x[kDepth][kOfX], dz[kDepth][kTileVectors];
};

// Where a block has a tile, and before that two panels.
template <class S>
union Room {
  Panel<S> panel[2];
  Vector<S> tile[kThreads * kVectors];  // row after row
};
template <class S>
__device__ Room<S>& SharedRoom() {
  __shared__ Room<S> room;
  return room;
}

// A thread's vectors of a factor [batch, n], one in each panel, `kAcross` of
// which are a row of it.
template <class S, int kAcross>
class Strip {
 public:
  // `begin`: the first column of the tile.
  __device__ Strip(int64_t n, int64_t begin) {
    const int64_t column = begin + threadIdx.x % kAcross * kWidth<S>;
    at_ = Row() * n + column;
    count_ = n - column < kWidth<S> ? n - column : kWidth<S>;
  }

  // From the next panel, where `left` rows are left.
  __device__ Raw<S> Load(const Variable& v, const void* from, int64_t n,
                         int64_t left) {
    const bool inside = Row() < left;
    const bool whole = v.factors_aligned & (count_ == kWidth<S>);
    const Place place{at_, inside ? count_ : 0, inside && whole};
    at_ += Panel<S>::kDepth * n;
    return LoadRaw<S>(v.bytes, from, place);
  }
  __device__ void Store(const Variable& v, const Raw<S>& raw,
                        Vector<S> (*to)[kAcross]) const {
    constexpr bool kAll = kThreads == kAcross * Panel<S>::kDepth;
    if (kAll || Row() < Panel<S>::kDepth) {
      to[Row()][threadIdx.x % kAcross] = Convert<S>(v.dtype, raw);
    }
  }

 private:
  __device__ static int Row() { return threadIdx.x / kAcross; }

  int64_t at_;
  int count_;
};

// Makes tile `t` of x^T dz. Every element is added up over the batch in its
// order, with one rounding for each row, so that it has the bits of the CPU's.
//
// While a panel is multiplied, the next is on its way to the registers, and
// then goes to where the last but one was.
template <class S>
__device__ void FormTile(const Variable& v, int t) {
  constexpr int kDepth = Panel<S>::kDepth;
  constexpr int kHeight = kVectors;  // rows of the tile that a thread makes
  static_assert(kHeight % kWidth<S> == 0);
  Room<S>& room = SharedRoom<S>();
  const int across = v.across;
  Strip<S, Panel<S>::kOfX> x(v.height, int64_t{t / across} * kTileRows);
  Strip<S, kTileVectors> dz(v.width, int64_t{t % across} * kTileColumns<S>);
  const int right = threadIdx.x % kTileVectors;
  const int down = threadIdx.x / kTileVectors * kHeight;
  Vector<S> sums[kHeight] = {};
  int64_t left = v.batch;
  Raw<S> raw_x = x.Load(v, v.x, v.height, left);
  Raw<S> raw_dz = dz.Load(v, v.dz, v.width, left);
  for (int p = 0; left > 0; p ^= 1) {
    Panel<S>& panel = room.panel[p];
    x.Store(v, raw_x, panel.x);
    dz.Store(v, raw_dz, panel.dz);
    __syncthreads();
    const int depth = left < kDepth ? left : kDepth;
    left -= kDepth;
    raw_x = x.Load(v, v.x, v.height, left);
    raw_dz = dz.Load(v, v.dz, v.width, left);
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      const Vector<S> of_dz = panel.dz[k][right];
      for (int r = 0; r < kHeight; ++r) {
        const S of_x = panel.x[k][(down + r) / kWidth<S>].of[r % kWidth<S>];
        for (int w = 0; w < kWidth<S>; ++w) {
          sums[r].of[w] = Fma(of_x, of_dz.of[w], sums[r].of[w]);
        }
      }
    }
  }
  __syncthreads();
  for (int r = 0; r < kHeight; ++r) {
    // As it is when it has been stored.
    room.tile[(down + r) * kTileVectors + right] =
        Convert<S>(v.dtype, Convert(v.dtype, sums[r], Rounding<S>{}, 0));
  }
  __syncthreads();
}

}  // namespace wdops::cuda
