// The yardstick of a step: the reads and writes of so many arrays, with next to
// no arithmetic.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/sweep.h"

namespace wdops::cpu {

// A step has no more: the parameter, its gradient and slots, the accumulator
// and the average.
inline constexpr int kMaxStreams = kMaxSlots + 4;

// Reads elements [begin, end) of all arrays, and writes the sum of each to the
// first of them: of float32 as integers, because a compiler may reorder their
// sum, and so vectorizes it. The sum of all is returned so that no read is left
// out.
using Stream = uint32_t (*)(uint32_t* const* arrays, int64_t begin,
                            int64_t end);

// By how many arrays are read, less 1, and how many of these are written, which
// are as many at most.
struct StreamKernels {
  std::array<std::array<Stream, kMaxStreams + 1>, kMaxStreams> of;
};

extern const StreamKernels kStreamKernels;

}  // namespace wdops::cpu
