// The yardstick of a step: the reads and writes of Adam (read p, g, m, v; write
// p, m, v) with next to no arithmetic.
#include <cstdint>
#include <thread>
#include <vector>

__attribute__((target_clones("avx512f", "avx2", "default"))) static void Sweep(
    int64_t n, float* __restrict p, const float* __restrict g,
    float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    p[i] += g[i];
    m[i] += g[i];
    v[i] += g[i];
  }
}

extern "C" void stream(int64_t n, float* p, const float* g, float* m, float* v,
                       int threads) {
  std::vector<std::thread> workers;
  const int64_t share = (n / threads + 15) / 16 * 16;
  for (int64_t begin = 0; begin < n; begin += share) {
    const int64_t size = share < n - begin ? share : n - begin;
    workers.emplace_back(Sweep, size, p + begin, g + begin, m + begin,
                         v + begin);
  }
  for (std::thread& worker : workers) worker.join();
}
