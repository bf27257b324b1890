// Activations behind a bias over a card's memory, forwards and backwards with
// the sums that are the bias's gradient.
#include "cuda/interface.h"
#include "cuda/launch.h"
#include "rules/activation.h"
#include "rules/blocks.h"
#include "rules/table.h"

namespace wdops::cuda {
namespace {

constexpr int kThreads = 256;

// So many of a thread's rows are loaded before the first is used, and so many
// blocks share a multiprocessor: that keeps the memory busy.
template <class T>
constexpr int kBatch = 32 / sizeof(Compute<T>);
constexpr int kOutputBlocks = 4, kGradBlocks = 3;

// How the blocks of rules/blocks.h are dealt to those of the card: in strips
// of so many columns, each of which several threads share. Narrow ones make
// more blocks, wide ones more threads that add up; but what is summed up over
// its columns is one.
struct Strips {
  Blocks blocks;
  int columns, of_block;

  Strips(const Blocks& blocks, int columns)
      : blocks(blocks),
        columns(blocks.Uniform() ? kSumColumns : columns),
        of_block(blocks.Uniform() ? 1 : Ceil(blocks.Columns(), columns)) {}

  int64_t Count() const { return blocks.Count() * of_block; }
};

// A thread's column, of which it has kBatch rows in every round.
template <class T>
struct Column {
  int64_t block;  // of Blocks
  int lane;       // the column, of the strip
  int group;      // the thread, of those of the column
  int in_block;   // the column, of the block
  bool inside;
  int64_t begin, stride, rows, most_rows;
  int round;  // rows that are swept at a time

  __device__ explicit Column(const Strips& strips)
      : block(blockIdx.x / strips.of_block),
        lane(threadIdx.x % strips.columns),
        group(threadIdx.x / strips.columns),
        in_block(blockIdx.x % strips.of_block * strips.columns + lane),
        round(kThreads / strips.columns * kBatch<T>) {
    Rows at = strips.blocks.At(block);
    if (strips.blocks.Uniform()) at = Cut(at);
    inside = in_block < at.columns;
    begin = at.begin + in_block;
    stride = at.stride;
    most_rows = at.rows;
    rows = in_block < at.last_columns ? at.rows : inside ? at.rows - 1 : 0;
  }

  // How many of a thread's rows from `row` on there are.
  __device__ int Left(int64_t row) const {
    return rows - row < kBatch<T> ? rows - row : kBatch<T>;
  }
  __device__ void Load(const T* from, int64_t row, T* to) const {
    const int left = Left(row);
    const T* next = &from[begin + row * stride];
    for (int b = 0; b < kBatch<T>; ++b, next += stride) {
      if (b < left) to[b] = *next;
    }
  }
  __device__ void Store(const T* from, int64_t row, T* to) const {
    const int left = Left(row);
    T* next = &to[begin + row * stride];
    for (int b = 0; b < kBatch<T>; ++b, next += stride) {
      if (b < left) *next = from[b];
    }
  }
};

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kOutputBlocks)
    ActivateKernel(const Activation activation, const Strips strips, const T* x,
                   const T* bias, T* output) {
  using S = Compute<T>;
  const Column<T> column(strips);
  S b = -0.0;  // x - 0 is x, whatever the sign of a zero
  if (bias && column.rows > 0) {
    b = Load(bias[strips.blocks.ChannelAt(column.begin)]);
  }
  for (int64_t row = column.group * kBatch<T>; row < column.rows;
       row += column.round) {
    T batch[kBatch<T>] = {};
    column.Load(x, row, batch);
    for (int i = 0; i < kBatch<T>; ++i) {
      Store(activation.Output(Load(batch[i]) + b), &batch[i]);
    }
    column.Store(batch, row, output);
  }
}

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kGradBlocks)
    GradKernel(const Activation activation, const Strips strips, const T* grad,
               const T* output, T* x_grad, double* sums) {
  using S = Compute<T>;
  // The rows of a round, which the first thread of each column adds up in their
  // order.
  __shared__ S of_rows[kThreads * kBatch<T>];
  const Column<T> column(strips);
  const int own = column.group * kBatch<T>;
  double sum = 0;
  T g[kBatch<T>] = {}, y[kBatch<T>] = {};
  column.Load(grad, own, g);
  column.Load(output, own, y);
  for (int64_t first = 0; first < column.most_rows; first += column.round) {
    const int64_t row = first + own;
    for (int i = 0; i < kBatch<T>; ++i) {
      const S of_x = activation.Gradient(Load(g[i]), Load(y[i]));
      of_rows[(own + i) * strips.columns + column.lane] = of_x;
      Store(of_x, &g[i]);
    }
    column.Store(g, row, x_grad);
    // On their way while the sums are made.
    column.Load(grad, row + column.round, g);
    column.Load(output, row + column.round, y);
    if (!sums) continue;
    __syncthreads();
    if (column.group == 0) {
      const int64_t left = column.rows - first;
      const int n = left < column.round ? left : column.round;
#pragma unroll 4
      for (int i = 0; i < n; ++i) {
        sum += of_rows[i * strips.columns + column.lane];
      }
    }
    __syncthreads();
  }
  if (!sums) return;
  sums += strips.blocks.FirstSum(column.block);
  const bool adds = column.group == 0;
  if (!strips.blocks.Uniform()) {
    if (adds && column.inside) sums[column.in_block] = sum;
    return;
  }
  __shared__ double of_columns[kSumColumns];
  if (adds) of_columns[column.lane] = sum;
  for (int half = kSumColumns / 2; half > 0; half /= 2) {
    __syncthreads();
    if (adds && column.lane < half) {
      of_columns[column.lane] += of_columns[column.lane + half];
    }
  }
  if (threadIdx.x == 0) *sums = of_columns[0];
}

// A thread has a channel, and `runs` of `run` sums of it. They are added one
// after the other, but many loads are under way at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    BiasKernel(const double* sums, int64_t channels, int64_t runs, int64_t run,
               T* bias_grad) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= channels) return;
  const double* next = sums + channel * run;
  int64_t left = run;
  double total = 0;
#pragma unroll 32
  for (int64_t i = 0; i < runs * run; ++i) {
    total += *next++;
    if (--left > 0) continue;
    left = run;
    next += (channels - 1) * run;
  }
  Store(static_cast<Compute<T>>(total), &bias_grad[channel]);
}

// Blocks that nothing is summed up in: small ones, for many of them, but large
// enough that what a thread begins with is little beside its rows.
Blocks SmallBlocks(int64_t outer, int64_t channels, int64_t inner) {
  const int64_t n = outer * channels * inner;
  const int64_t rows = std::clamp<int64_t>(n >> 16, 64, 256);
  return Blocks(outer, channels, inner, rows, rows * kSumColumns);
}

template <template <class> class Activation, class T>
cudaError_t Activate(const double* hyper, int64_t outer, int64_t channels,
                     int64_t inner, const void* x, const void* bias,
                     void* output, cudaStream_t stream) {
  if (outer * channels * inner == 0) return cudaSuccess;
  using Function = Activation<Compute<T>>;
  const Strips strips(bias ? SmallBlocks(outer, channels, inner)
                           : SmallBlocks(1, 1, outer * channels * inner),
                      32);
  return Launch(&ActivateKernel<Function, T>, strips.Count(), kThreads, stream,
                Function(hyper), strips, static_cast<const T*>(x),
                static_cast<const T*>(bias), static_cast<T*>(output));
}

template <template <class> class Activation, class T>
cudaError_t ActivateGrad(const double* hyper, int64_t outer, int64_t channels,
                         int64_t inner, const void* grad, const void* output,
                         void* x_grad, void* bias_grad, void* scratch,
                         cudaStream_t stream) {
  using Function = Activation<Compute<T>>;
  const int64_t n = outer * channels * inner;
  double* const sums = bias_grad ? static_cast<double*>(scratch) : nullptr;
  int64_t runs = 0, run = 1;
  if (n > 0) {
    const Strips strips(
        bias_grad ? Blocks(outer, channels, inner) : SmallBlocks(1, 1, n), 64);
    run = strips.blocks.SumRun();
    runs = strips.blocks.SumCount() / (channels * run);
    const cudaError_t error =
        Launch(&GradKernel<Function, T>, strips.Count(), kThreads, stream,
               Function(hyper), strips, static_cast<const T*>(grad),
               static_cast<const T*>(output), static_cast<T*>(x_grad), sums);
    if (error != cudaSuccess) return error;
  }
  if (!bias_grad) return cudaSuccess;
  return Launch(&BiasKernel<T>, Ceil(channels, kThreads), kThreads, stream,
                sums, channels, runs, run, static_cast<T*>(bias_grad));
}

struct Kernels {
  decltype(&Activate<Relu, float>) output;
  decltype(&ActivateGrad<Relu, float>) gradient;
};

template <template <class> class Activation>
constexpr std::array<Kernels, kDTypeCount> kKernelsOf = {{
#define DTYPE(name, Type) \
  {&Activate<Activation, Type>, &ActivateGrad<Activation, Type>},
#include "rules/dtypes.inc"
}};

constexpr std::array<Kernels, kDTypeCount> kKernels[] = {
#define ACTIVATION(Class) kKernelsOf<Class>,
#include "rules/activations.inc"
};

bool IsValid(int activation, int dtype, int64_t outer, int64_t channels,
             int64_t inner) {
  return activation >= 0 && activation < kActivationCount && dtype >= 0 &&
         dtype < kDTypeCount && outer >= 0 && channels >= 0 && inner >= 0;
}

}  // namespace
}  // namespace wdops::cuda

using namespace wdops;
using namespace wdops::cuda;

int wdops_cuda_activate(int activation, int dtype, const double* host_hyper,
                        int64_t outer, int64_t channels, int64_t inner,
                        const void* x, const void* bias, void* output,
                        WdopsStream stream) {
  if (!IsValid(activation, dtype, outer, channels, inner)) {
    return cudaErrorInvalidValue;
  }
  return kKernels[activation][dtype].output(host_hyper, outer, channels, inner,
                                            x, bias, output, stream);
}

int64_t wdops_cuda_activate_scratch_bytes(int64_t outer, int64_t channels,
                                          int64_t inner) {
  if (outer * channels * inner == 0) return 0;
  return Blocks(outer, channels, inner).SumCount() * sizeof(double);
}

int wdops_cuda_activate_grad(int activation, int dtype,
                             const double* host_hyper, int64_t outer,
                             int64_t channels, int64_t inner, const void* grad,
                             const void* output, void* x_grad, void* bias_grad,
                             void* scratch, WdopsStream stream) {
  if (!IsValid(activation, dtype, outer, channels, inner)) {
    return cudaErrorInvalidValue;
  }
  return kKernels[activation][dtype].gradient(host_hyper, outer, channels,
                                              inner, grad, output, x_grad,
                                              bias_grad, scratch, stream);
}
