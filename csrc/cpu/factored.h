// Gradients of a matrix that stay factored: x^T dz, with x [batch, rows] and
// dz [batch, columns], is made tile by tile, and used while a tile is in cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/sweep.h"

namespace wdops::cpu {

struct Factored {
  int64_t batch, rows, columns;

  // Of a tile, in elements. They depend on the shape alone, and so do sums over
  // tiles. Tiles are as wide as the matrix where they can be, because then one
  // is a single run of memory; they have about as many elements as two chunks,
  // which a usual L2 holds beside what is swept; and some rows at least, which
  // share what is read of dz: the more, the less of it the cache can hold.
  // Other than at the edges, whole panels.
  static constexpr int64_t kRowStep = 12, kColumnStep = 64;
  int64_t TileColumns() const {
    constexpr int64_t kMost = 4096;
    if (columns <= kMost) return columns;
    return Ceil(Ceil(columns, Ceil(columns, kMost)), kColumnStep) * kColumnStep;
  }
  int64_t TileRows() const {
    const int64_t most = 2 * kChunk / std::max<int64_t>(1, TileColumns());
    const int64_t least = kRowStep * (batch <= 64 ? 2 : 3);
    return std::max(least, most / kRowStep * kRowStep);
  }
  int64_t TilesAcross() const { return Ceil(columns, TileColumns()); }
  int64_t Tiles() const {
    if (rows == 0 || columns == 0) return 0;
    return Ceil(rows, TileRows()) * TilesAcross();
  }
};

// Memory that is going to be read.
struct Span {
  const char* begin = nullptr;
  int64_t bytes = 0;
};

// How a factor is laid out for the products: in panels of so many columns, each
// [batch, width] and one behind the other.
struct Packing {
  int width;
  // Panels [begin, end) of `from` [batch, n], into the pack that begins at
  // `to`, with zeros behind n.
  void (*pack)(const void* from, int64_t batch, int64_t n, int64_t begin,
               int64_t end, void* to);
};

// Everything is of one dtype in memory and of its Compute in a pack.
struct FactoredKernels {
  // Their widths divide kRowStep and kColumnStep.
  Packing x, dz;
  // Writes a tile [rows, columns] of x^T dz, added up over the batch in its
  // order. x and dz: the packed panels where the tile begins. Of 32 and 64 bits
  // it meanwhile starts to load what is read with the tile: `beside`, `count`
  // spans.
  void (*product)(const void* x, const void* dz, int64_t batch, int64_t rows,
                  int64_t columns, void* tile, const Span* beside, int count);
  // a: the part of |x^T dz|^2 = sum over k, l of (x_k.x_l) (dz_k.dz_l) with
  // l <= k, counted as both halves. b: |x_k| |dz_k|, of which the sum over k
  // bounds every element of x^T dz and of what it is added up from, or NaN
  // where it underflows. x and dz are as in memory.
  Sums (*gram)(const void* x, const void* dz, const Factored&, int64_t k);
};

extern const std::array<FactoredKernels, kDTypeCount> kFactoredKernels;

}  // namespace wdops::cpu
