// How threads of whichever pool share the work of a kernel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace wdops::cpu {

// How many threads are worth waking for work that takes as long as to read and
// write so many bytes: in a cache a core moves about 16 bytes a cycle, and
// another thread finds nothing in its cache. On an EPYC of 2021 (Zen 3) one
// that was awake, as within a step of training, gained from 2^16 cycles on
// (AdamW of 80,000 elements took 0.78 of the time), and one that slept from
// 2^18 on; the most that it cost in between was 8 %.
inline int64_t WorthWaking(int64_t most, int64_t count, int64_t bytes) {
  return std::max<int64_t>(
      1, std::min<int64_t>({most, count, 1 + (bytes / 16 >> 17)}));
}

// The pieces of [0, count). Each thread claims a share of what is left: long
// runs at first, which the processor prefetches through, and single steps at
// the end, so that little is waited for where one thread is slow.
class Claims {
 public:
  Claims(int64_t count, int64_t threads) : count_(count), threads_(threads) {}

  // Calls run(begin, end) for what this thread claims, until nothing is left.
  template <class Run>
  void Work(const Run& run) {
    int64_t begin = claimed_;
    while (begin < count_) {
      const int64_t end =
          begin + std::max<int64_t>(1, (count_ - begin) / (2 * threads_));
      if (!claimed_.compare_exchange_weak(begin, end)) continue;
      run(begin, end);
      done_ += end - begin;
      begin = claimed_;
    }
  }

  bool Done() const { return done_ == count_; }

 private:
  const int64_t count_, threads_;
  std::atomic<int64_t> claimed_{0}, done_{0};
};

// Calls run(begin, end) until [0, count) is covered, in this thread and in what
// others schedule(task) finds. Nobody waits for one that has still to wake: it
// may be long after the call, and then finds nothing to do.
template <class Schedule, class Run>
void ShareAmong(int64_t threads, int64_t count, const Schedule& schedule,
                const Run& run) {
  const auto claims = std::make_shared<Claims>(count, threads);
  for (int64_t t = 1; t < threads; ++t) {
    schedule([claims, &run] { claims->Work(run); });
  }
  claims->Work(run);
  // What another thread has claimed takes it no longer than it took this one.
  while (!claims->Done()) std::this_thread::yield();
}

}  // namespace wdops::cpu
