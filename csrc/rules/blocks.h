// How an array is cut for the sums over its channels.
#pragma once

#include <algorithm>

#include "rules/sums.h"

namespace wdops {

// Rows of an array, `stride` elements apart; the last may be shorter. There is
// one at least.
struct Rows {
  int64_t begin;  // in the array, in elements
  int64_t rows;
  int64_t stride;
  int columns, last_columns;
};

// A row as shorter ones, for the sum over all of it: that of each column, and
// then of their halves.
inline constexpr int kSumColumns = 128;

WDOPS_FN Rows Cut(const Rows& row) {
  const int last = row.last_columns - 1;
  return {row.begin, last / kSumColumns + 1, kSumColumns, kSumColumns,
          last % kSumColumns + 1};
}

// How an array of shape [outer, channels, inner], none of them 0, is cut into
// blocks, by its shape alone: so that sums over them have the same bits for
// every number of threads.
//
// Where `inner` is large, a block is a piece of a channel. Where it is not, the
// array is one of rows of `period` elements, behind which the channels repeat
// (at least kPeriod, for a vector loop over few channels to be worth its
// while), and a block is a number of rows and columns of them: a quarter of the
// rows, within bounds, so that threads can share what lies in a cache.
class Blocks {
 public:
  // `rows` and `piece` are those of a block: a matter of speed where nothing is
  // summed up, and else never given.
  Blocks(int64_t outer, int64_t channels, int64_t inner, int64_t rows = 0,
         int64_t piece = kPiece)
      : channels_(channels), inner_(inner), n_(outer * channels * inner) {
    uniform_ = channels == 1 || inner >= kInner;
    if (uniform_) {
      period_ = channels == 1 ? n_ : inner;
      rows_ = 1;
      columns_ = piece;
    } else {
      const int64_t least = Ceil(kPeriod, channels * inner);
      period_ = std::min(least, outer) * channels * inner;
      rows_ = rows ? rows : std::clamp(Ceil(n_, period_) / 4, kFewRows, kRows);
      const int64_t blocks = Ceil(period_, kColumns);
      columns_ = Ceil(Ceil(period_, blocks), kLine) * kLine;
    }
    across_ = Ceil(period_, columns_);
    down_ = Ceil(Ceil(n_, period_), rows_);
  }

  WDOPS_FN int64_t Count() const { return across_ * down_; }
  // Whether a block lies in one channel.
  WDOPS_FN bool Uniform() const { return uniform_; }
  int64_t Period() const { return period_; }
  WDOPS_FN int64_t ChannelAt(int64_t element) const {
    return element / inner_ % channels_;
  }
  // Of every block but the last ones.
  int64_t Columns() const { return columns_; }
  // The first column of a block.
  WDOPS_FN int64_t Column(int64_t block) const {
    return block % across_ * columns_;
  }
  // Of each uniform block, or of each column of a row of blocks.
  int64_t SumCount() const { return uniform_ ? Count() : down_ * period_; }
  // How many sums of one channel lie side by side, before those of the next.
  int64_t SumRun() const { return uniform_ ? across_ : inner_; }
  // The first sum of a block.
  WDOPS_FN int64_t FirstSum(int64_t block) const {
    return uniform_ ? block : block / across_ * period_ + Column(block);
  }

  WDOPS_FN Rows At(int64_t block) const {
    const int64_t row = block / across_ * rows_, column = Column(block);
    const int64_t rows = Ceil(n_, period_), last = (rows - 1) * period_;
    const int64_t columns = std::min(columns_, period_ - column);
    Rows at{row * period_ + column, std::min(rows_, rows - row), period_,
            int(columns), int(columns)};
    if (row + at.rows == rows) {
      at.last_columns = std::clamp<int64_t>(n_ - last - column, 0, columns);
    }
    return at;
  }

 private:
  static constexpr int64_t kInner = 256, kPiece = 1 << 16, kPeriod = 512,
                           kFewRows = 64, kRows = 256, kColumns = 1024,
                           kLine = 16;

  int64_t channels_, inner_, n_;
  bool uniform_;
  int64_t period_, rows_, columns_;  // of the array; of a block
  int64_t across_, down_;            // blocks
};

// How a kernel of an activation sees an array.
struct ActivationShape {
  int64_t outer = 1, channels = 1, inner = 1;

  int64_t Elements() const { return outer * channels * inner; }
  Blocks InBlocks() const { return Blocks(outer, channels, inner); }
};

}  // namespace wdops
