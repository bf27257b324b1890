// A bare stream for every number of arrays that are read and written.
#include "cpu/stream.h"

#include <algorithm>
#include <utility>

namespace wdops::cpu {
namespace {

template <int kReads, int kWrites>
uint32_t StreamArrays(uint32_t* const* arrays, int64_t begin, int64_t end) {
  uint32_t* a[kReads];
  std::copy_n(arrays, kReads, a);
  uint32_t total = 0;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    uint32_t sum = 0;
    for (int k = 0; k < kReads; ++k) sum += a[k][i];
    for (int k = 0; k < kWrites; ++k) a[k][i] = sum;
    total += sum;
  }
  return total;
}

template <int kReads, int... kWrites>
constexpr std::array<Stream, sizeof...(kWrites)> WithWrites(
    std::integer_sequence<int, kWrites...>) {
  return {&StreamArrays<kReads, std::min(kReads, kWrites)>...};
}

template <int... kLess>
constexpr StreamKernels WithReads(std::integer_sequence<int, kLess...>) {
  return {{WithWrites<kLess + 1>(
      std::make_integer_sequence<int, kMaxStreams + 1>())...}};
}

}  // namespace

const StreamKernels kStreamKernels =
    WithReads(std::make_integer_sequence<int, kMaxStreams>());

}  // namespace wdops::cpu
