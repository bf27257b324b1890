// The yardstick of a step: the reads and writes of so many arrays, with next to
// no arithmetic.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kMaxArrays = 8;
// What a thread claims at a time: it waits little for one that is slower, and
// the processor prefetches through a run as long as this.
constexpr int64_t kClaim = 1 << 18;

using Sweep = uint32_t (*)(uint32_t* const* arrays, int64_t begin, int64_t end);

// Reads kReads arrays and writes the first kWrites of them. Of integers,
// because a compiler may reorder their sum, and so vectorizes it; it is
// returned so that no read is left out.
template <int kReads, int kWrites>
uint32_t SweepArrays(uint32_t* const* arrays, int64_t begin, int64_t end) {
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

// Entry reads * kMaxArrays + writes.
template <int... entry>
constexpr std::array<Sweep, sizeof...(entry)> Sweeps(
    std::integer_sequence<int, entry...>) {
  return {&SweepArrays<std::max(1, entry / kMaxArrays),
                       std::min(entry % kMaxArrays,
                                std::max(1, entry / kMaxArrays))>...};
}
constexpr auto kSweeps =
    Sweeps(std::make_integer_sequence<int, kMaxArrays * kMaxArrays>());

}  // namespace

// One pass over `reads` arrays of n elements, of which the first `writes` are
// also written. 0 < reads < kMaxArrays, 0 <= writes <= reads.
extern "C" uint32_t stream(int64_t n, int reads, int writes,
                           uint32_t* const* arrays, int threads) {
  const Sweep sweep = kSweeps[reads * kMaxArrays + writes];
  std::atomic<int64_t> claimed{0};
  std::atomic<uint32_t> total{0};
  const auto work = [&] {
    for (int64_t begin; (begin = claimed.fetch_add(kClaim)) < n;) {
      total += sweep(arrays, begin, std::min(begin + kClaim, n));
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
  return total;
}
