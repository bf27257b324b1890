// Activations behind a bias over a card's memory, forwards and backwards with
// the sums that are the bias's gradient.
#include "cuda/interface.h"
#include "cuda/launch.h"
#include "rules/activation.h"
#include "rules/blocks.h"
#include "rules/table.h"

namespace wdops::cuda {
namespace {

// A thread has a column, and loads so many bytes of its rows before it goes on
// with the first.
constexpr int kColumns = kSumColumns, kBytes = 32;

template <class T>
constexpr int kBatch = kBytes / sizeof(T);

// The column of a thread, in the part of an array that its block has.
struct Column {
  int64_t block;  // of Blocks
  int column;     // of its columns
  bool inside;
  int64_t begin, stride, rows;

  __device__ explicit Column(const Blocks& blocks, int strips)
      : block(blockIdx.x / strips),
        column(blockIdx.x % strips * kColumns + threadIdx.x) {
    const Rows at = blocks.Uniform() ? Cut(blocks.At(block)) : blocks.At(block);
    begin = at.begin + column;
    stride = at.stride;
    inside = column < at.columns;
    rows = column < at.last_columns ? at.rows : inside ? at.rows - 1 : 0;
  }
};

template <class T>
__device__ void LoadRows(const T* from, const Column& column, int64_t row,
                         T* to) {
  for (int b = 0; b < kBatch<T>; ++b) {
    if (row + b < column.rows) {
      to[b] = from[column.begin + (row + b) * column.stride];
    }
  }
}

template <class Activation, class T>
__global__ void __launch_bounds__(kColumns, 1)
    ActivateKernel(const Activation activation, const Blocks blocks, int strips,
                   const T* x, const T* bias, T* output) {
  using S = Compute<T>;
  const Column column(blocks, strips);
  S b = -0.0;  // x - 0 is x, whatever the sign of a zero
  if (bias && column.rows > 0) {
    b = Load(bias[blocks.ChannelAt(column.begin)]);
  }
  for (int64_t row = 0; row < column.rows; row += kBatch<T>) {
    T from[kBatch<T>] = {};
    LoadRows(x, column, row, from);
    for (int i = 0; i < kBatch<T>; ++i) {
      if (row + i >= column.rows) break;
      Store(activation.Output(Load(from[i]) + b),
            &output[column.begin + (row + i) * column.stride]);
    }
  }
}

template <class Activation, class T>
__global__ void __launch_bounds__(kColumns, 1)
    GradKernel(const Activation activation, const Blocks blocks, int strips,
               const T* grad, const T* output, T* x_grad, double* sums) {
  const Column column(blocks, strips);
  double sum = 0;
  for (int64_t row = 0; row < column.rows; row += kBatch<T>) {
    T g[kBatch<T>] = {}, y[kBatch<T>] = {};
    LoadRows(grad, column, row, g);
    LoadRows(output, column, row, y);
    for (int i = 0; i < kBatch<T>; ++i) {
      if (row + i >= column.rows) break;
      const Compute<T> of_x = activation.Gradient(Load(g[i]), Load(y[i]));
      Store(of_x, &x_grad[column.begin + (row + i) * column.stride]);
      sum += of_x;
    }
  }
  if (!sums) return;
  sums += blocks.FirstSum(column.block);
  if (!blocks.Uniform()) {
    if (column.inside) sums[column.column] = sum;
    return;
  }
  __shared__ double of_columns[kColumns];
  const int t = threadIdx.x;
  of_columns[t] = sum;
  for (int half = kColumns / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) of_columns[t] += of_columns[t + half];
  }
  if (t == 0) *sums = of_columns[0];
}

// A thread has a channel, and `runs` of `run` sums of it.
template <class T>
__global__ void __launch_bounds__(kColumns, 1)
    BiasKernel(const double* sums, int64_t channels, int64_t runs, int64_t run,
               T* bias_grad) {
  const int64_t channel = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  if (channel >= channels) return;
  double total = 0;
  for (int64_t r = 0; r < runs; ++r) {
    const double* const of_run = sums + (r * channels + channel) * run;
    for (int64_t i = 0; i < run; ++i) total += of_run[i];
  }
  Store(static_cast<Compute<T>>(total), &bias_grad[channel]);
}

// Blocks that nothing is summed up in: small ones, for many of them.
Blocks SmallBlocks(int64_t outer, int64_t channels, int64_t inner) {
  return Blocks(outer, channels, inner, 32, 4096);
}

int Strips(const Blocks& blocks) {
  return blocks.Uniform() ? 1 : Ceil(blocks.Columns(), kColumns);
}

template <template <class> class Activation, class T>
cudaError_t Activate(const double* hyper, int64_t outer, int64_t channels,
                     int64_t inner, const void* x, const void* bias,
                     void* output, cudaStream_t stream) {
  if (outer * channels * inner == 0) return cudaSuccess;
  using Function = Activation<Compute<T>>;
  const Blocks blocks = bias ? SmallBlocks(outer, channels, inner)
                             : SmallBlocks(1, 1, outer * channels * inner);
  const int strips = Strips(blocks);
  return Launch(&ActivateKernel<Function, T>, blocks.Count() * strips, kColumns,
                stream, Function(hyper), blocks, strips,
                static_cast<const T*>(x), static_cast<const T*>(bias),
                static_cast<T*>(output));
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
    const Blocks blocks =
        bias_grad ? Blocks(outer, channels, inner) : SmallBlocks(1, 1, n);
    const int strips = Strips(blocks);
    run = blocks.SumRun();
    runs = blocks.SumCount() / (channels * run);
    const cudaError_t error = Launch(
        &GradKernel<Function, T>, blocks.Count() * strips, kColumns, stream,
        Function(hyper), blocks, strips, static_cast<const T*>(grad),
        static_cast<const T*>(output), static_cast<T*>(x_grad), sums);
    if (error != cudaSuccess) return error;
  }
  if (!bias_grad) return cudaSuccess;
  return Launch(&BiasKernel<T>, Ceil(channels, kColumns), kColumns, stream,
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
