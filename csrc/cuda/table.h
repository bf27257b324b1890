// The variables and the constants of a step, as the card reads them. Both are
// filled on the host and copied as they are, so all in them is relative.
#pragma once

#include "cuda/interface.h"
#include "rules/sums.h"
#include "rules/table.h"

namespace wdops::cuda {

// Numbers of a vector in the type that they are computed in, and of the vectors
// that a thread sweeps: 16 bytes, or 8 of a 16-bit type, are what one
// instruction moves.
template <class S>
inline constexpr int kWidth = 16 / sizeof(S);
inline constexpr int kThreads = 256, kVectors = 4;

// A factored gradient is made in tiles, each of which is a block's piece.
inline constexpr int kTileRows = 64,
                     kTileVectors = kThreads * kVectors / kTileRows;
template <class S>
inline constexpr int kTileColumns = kTileVectors * kWidth<S>;

inline int WidthOf(bool is_double) {
  return is_double ? kWidth<double> : kWidth<float>;
}

// `width` is that of the rows that the arrays are swept in: all is one row
// where there are neither rows nor factors.
struct Variable : WdopsVariable {
  int bytes, slot_bytes;  // of a number
  // Vectors that hold a row, or tiles that do; and how many rows there are.
  int64_t across, height;
  // Whether every vector may be moved at once, and every one of the factors.
  bool aligned, factors_aligned;

  WDOPS_FN bool IsDouble() const { return dtype == k_float64; }
  WDOPS_FN bool IsFactored() const { return !grad; }
  WDOPS_FN bool IsRun() const { return !rows && grad; }
};

struct alignas(16) Table {
  int count;
  // Which kernels have anything to do.
  bool has_float, has_double, has_runs, has_places;

  // Of each variable, then how many in all: the blocks' pieces of a sweep, and
  // the chunks of its sums, which are the tiles of a factored gradient.
  WDOPS_FN const int64_t* FirstPiece() const {
    return reinterpret_cast<const int64_t*>(this + 1);
  }
  WDOPS_FN const int64_t* FirstChunk() const {
    return FirstPiece() + count + 1;
  }
  WDOPS_FN const Variable* Variables() const {
    return reinterpret_cast<const Variable*>(FirstChunk() + count + 1);
  }
  WDOPS_FN int64_t Pieces() const { return FirstPiece()[count]; }
  WDOPS_FN int64_t Chunks() const { return FirstChunk()[count]; }
};

// The variable that has piece or chunk `at`.
WDOPS_FN int Find(const int64_t* first, int count, int64_t at) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= at ? low : high) = middle;
  }
  return low;
}

// The constants of a step, and what they are made of where a scale is known on
// the card alone.
struct OneStep {
  AnyStep step;
  double gradient[kGradientHyperCount];
  double clip_scale;
};

struct alignas(16) Steps {
  // One for each type that steps are computed in, and not for each variable.
  bool shared;

  WDOPS_FN OneStep* Of(int variable, bool is_double) {
    return reinterpret_cast<OneStep*>(this + 1) +
           (shared ? is_double : variable);
  }
  WDOPS_FN const OneStep* Of(int variable, bool is_double) const {
    return const_cast<Steps*>(this)->Of(variable, is_double);
  }
};

// Scales on the card; null: 1.
struct Scales {
  const double* grad;
  int grad_stride;  // 1 where there is one for each variable, 0 for all
  const double* clip = nullptr;
  int clip_stride = 0;

  // What a step of any rule begins with.
  template <class S>
  WDOPS_FN Gradient<S> GradientOf(const OneStep& one, int variable) const {
    if (!grad) return *reinterpret_cast<const Gradient<S>*>(one.step.bytes);
    double hyper[kGradientHyperCount];
    for (int j = 0; j < kGradientHyperCount; ++j) hyper[j] = one.gradient[j];
    hyper[kGradScale] *= grad[variable * grad_stride];
    return Gradient<S>(hyper);
  }

  // `step` is `one` as it was filled.
  template <template <class> class Rule, class S>
  WDOPS_FN void Scale(const OneStep& one, int variable,
                      Step<Rule, S>* step) const {
    static_cast<Gradient<S>&>(*step) = GradientOf<S>(one, variable);
    if (clip) {
      step->clip_scale =
          static_cast<S>(one.clip_scale * clip[variable * clip_stride]);
    }
  }
  template <template <class> class Rule, class S>
  WDOPS_FN Step<Rule, S> StepOf(const OneStep& one, int variable) const {
    auto step = *reinterpret_cast<const Step<Rule, S>*>(one.step.bytes);
    Scale(one, variable, &step);
    return step;
  }
};

}  // namespace wdops::cuda
