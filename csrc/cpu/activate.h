// An activation over a whole array, and its gradient, for whatever threads
// there are: `share(count, bytes, run)` calls run(begin, end) until [0, count)
// is covered, for work that takes as long as to read and write so many bytes.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/activation.h"
#include "cpu/float_mode.h"
#include "rules/table.h"

namespace wdops::cpu {
namespace {

// The bias of each element of a period, where a block has rows of them.
inline std::vector<char> Repeated(const char* bias, const Blocks& blocks,
                                  int64_t size) {
  std::vector<char> repeated(blocks.Period() * size);
  for (int64_t i = 0; i < blocks.Period(); ++i) {
    std::memcpy(&repeated[i * size], bias + blocks.ChannelAt(i) * size, size);
  }
  return repeated;
}

// Of an array that is not empty. `bias` is null where there is none; x may be
// the output.
template <class Share>
void ActivateAll(const ActivationKernels& kernels, int activation,
                 const double* hyper, const ActivationShape& shape, DType dtype,
                 const char* x, const char* bias, char* output,
                 const Share& share) {
  const Activate activate = kernels.output[activation][dtype];
  const int64_t work = kActivations[activation].work;
  // Small enough for threads to share what is worth waking one for.
  const Blocks blocks(shape.outer, shape.channels, shape.inner, 16, kChunk);
  const int64_t size = kDTypeBytes[dtype];
  std::vector<char> repeated;
  if (bias && !blocks.Uniform() && blocks.Period() != shape.channels) {
    repeated = Repeated(bias, blocks, size);
    bias = repeated.data();
  }
  share(blocks.Count(), work * 2 * shape.Elements() * size,
        [&](int64_t block, int64_t end) {
          for (; block < end; ++block) {
            const Rows rows = blocks.At(block);
            const int64_t entry = blocks.Uniform()
                                      ? blocks.ChannelAt(rows.begin)
                                      : blocks.Column(block);
            activate(hyper, rows, x + rows.begin * size,
                     bias ? bias + entry * size : nullptr, blocks.Uniform(),
                     output + rows.begin * size);
          }
        });
}

template <class T>
void StoreTotals(const std::vector<double>& totals, void* to) {
  const FloatMode mode;
  T* entry = static_cast<T*>(to);
  for (double total : totals) Store(static_cast<Compute<T>>(total), entry++);
}

// The array may be empty. `bias_grad` is null where there is no bias; grad and
// output may be x_grad.
template <class Share>
void DifferentiateAll(const ActivationKernels& kernels, int activation,
                      const double* hyper, const ActivationShape& shape,
                      DType dtype, const char* grad, const char* output,
                      char* x_grad, char* bias_grad, const Share& share) {
  const ActivateGrad activate = kernels.gradient[activation][dtype];
  std::vector<double> totals(bias_grad ? shape.channels : 0);
  if (shape.Elements() > 0) {
    const Blocks blocks = shape.InBlocks();
    const int64_t size = kDTypeBytes[dtype];
    std::vector<double> sums(bias_grad ? blocks.SumCount() : 0);
    // By as many threads as the output, of which each has a part in its cache.
    const int64_t work = kActivations[activation].work;
    share(blocks.Count(), work * 3 * shape.Elements() * size,
          [&](int64_t block, int64_t end) {
            for (; block < end; ++block) {
              Rows rows = blocks.At(block);
              const int64_t at = rows.begin * size;
              const auto run = [&](double* column_sums) {
                activate(hyper, rows, grad + at, output + at, x_grad + at,
                         column_sums);
              };
              if (!bias_grad) {
                run(nullptr);
              } else if (blocks.Uniform()) {
                sums[blocks.FirstSum(block)] = SumOfColumns(&rows, run);
              } else {
                run(&sums[blocks.FirstSum(block)]);
              }
            }
          });
    for (size_t i = 0; i < sums.size();) {
      for (double& total : totals) {
        for (int64_t run = blocks.SumRun(); run > 0; --run) total += sums[i++];
      }
    }
  }
  if (!bias_grad) return;
  switch (dtype) {
#define DTYPE(name, Type)                 \
  case k_##name:                          \
    StoreTotals<Type>(totals, bias_grad); \
    break;
#include "rules/dtypes.inc"
    case kDTypeCount:
      break;
  }
}

}  // namespace
}  // namespace wdops::cpu
