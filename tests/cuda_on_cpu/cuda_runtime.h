// A stand-in for the runtime of CUDA, so that g++ compiles csrc/cuda and a CPU
// runs it: blocks one after the other, the threads of a block as fibers that
// take turns at __syncthreads. A stream does all at once, unless it is
// captured. In every other block the turns go backwards, so that a thread that
// reads what another has not yet written, or writes what another has not yet
// read, is found.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cpu/float_mode.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __noinline__
#define __launch_bounds__(...)

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)
      : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// _longjmp by its name: the checked one, which some systems put in its place,
// refuses to go to another stack.
extern "C" [[noreturn]] void Jump(jmp_buf, int) __asm__("_longjmp");

// The threads of a block, each on a stack of its own, which all blocks share.
// A jump is many times as fast as swapcontext, which asks the system.
class Block {
 public:
  void Run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < threads) Add();
    std::vector<unsigned> waiting(threads), next;
    for (unsigned t = 0; t < threads; ++t) {
      waiting[t] = blockIdx.x % 2 ? threads - 1 - t : t;
    }
    while (!waiting.empty()) {
      next.clear();
      for (unsigned t : waiting) {
        threadIdx = {t, 0, 0};
        current_ = fibers_[t].get();
        if (!Resume()) next.push_back(t);
      }
      waiting.swap(next);
    }
  }

  // Goes on when every thread is here, or has returned.
  void Synchronize() {
    Fiber* const self = current_;
    self->done = false;
    if (!_setjmp(self->inside)) Jump(outside_, 1);
  }

 private:
  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t begin;
    jmp_buf inside;
    bool begun = false, done;
  };

  void Add() {
    constexpr size_t kStack = 1 << 17;
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack.get();
    fiber.begin.uc_stack.ss_size = kStack;
    makecontext(&fiber.begin, &Block::Begin, 0);
  }

  // Whether the thread has returned.
  bool Resume() {
    if (!_setjmp(outside_)) {
      if (current_->begun) Jump(current_->inside, 1);
      current_->begun = true;
      setcontext(&current_->begin);
    }
    return current_->done;
  }

  static void Begin();

  const std::function<void()>* body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_;
  jmp_buf outside_;
};

inline Block block;

inline void Block::Begin() {
  for (;;) {
    (*block.body_)();
    Fiber* const self = block.current_;
    self->done = true;
    if (!_setjmp(self->inside)) Jump(block.outside_, 1);
  }
}

// As many blocks of TensorFlow's threads may launch at a time.
inline std::mutex launching;

using Graph = std::vector<std::function<void()>>;
// What a stream is asked for while it is captured; null: it is not.
inline std::unique_ptr<Graph> captured;

inline cudaError_t InOrder(std::function<void()> work) {
  if (captured) {
    captured->push_back(std::move(work));
  } else {
    work();
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block.Synchronize(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  return cuda_on_cpu::InOrder([=, config = *config] {
    const std::lock_guard<std::mutex> lock(cuda_on_cpu::launching);
    const wdops::cpu::FloatMode mode;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    for (unsigned b = 0; b < blocks; ++b) {
      blockIdx = {b, 0, 0};
      cuda_on_cpu::block.Run(threads, [&] { kernel(arguments...); });
    }
  });
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes,
                                   cudaStream_t) {
  return cuda_on_cpu::InOrder([=] { memset(to, value, bytes); });
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                   cudaMemcpyKind, cudaStream_t) {
  return cuda_on_cpu::InOrder([=] { memmove(to, from, bytes); });
}
inline cudaError_t cudaMalloc(void** to, size_t bytes) {
  *to = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** to, size_t bytes) {
  return cudaMalloc(to, bytes);
}
inline cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
enum { cudaStreamNonBlocking = 1 };

typedef std::chrono::steady_clock::time_point* cudaEvent_t;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new std::chrono::steady_clock::time_point;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin,
                                        cudaEvent_t end) {
  *milliseconds =
      std::chrono::duration<float, std::milli>(*end - *begin).count();
  return cudaSuccess;
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal };
typedef cuda_on_cpu::Graph* cudaGraph_t;
typedef cuda_on_cpu::Graph* cudaGraphExec_t;
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  cuda_on_cpu::captured = std::make_unique<cuda_on_cpu::Graph>();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = cuda_on_cpu::captured.release();
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable,
                                        cudaGraph_t graph, unsigned) {
  *executable = graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const std::function<void()>& work : *graph) work();
  return cudaSuccess;
}

struct cudaDeviceProp {
  char name[256];
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"a stand-in for a card"};
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 30;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
  }
  return "unrecognized error code";
}
