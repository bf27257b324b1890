// The loops over memory of every activation and dtype: biased, activated, and
// backwards with the sums that are the bias's gradient.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/sweep.h"
#include "rules/activation.h"
#include "rules/blocks.h"

namespace wdops::cpu {

// output = activation(x + bias), where `hyper` are those of the activation; all
// arrays begin with the first row. `bias` has an entry for each column, or one
// for all if `uniform`; null: none. x may be the output.
using Activate = void (*)(const double* hyper, const Rows&, const void* x,
                          const void* bias, bool uniform, void* output);

// x_grad, from the gradient of the output and the output, and the sum of each
// of its columns, unless `sums` is null: in double, row after row. Either array
// may be x_grad.
using ActivateGrad = void (*)(const double* hyper, const Rows&,
                              const void* grad, const void* output,
                              void* x_grad, double* sums);

// The sum of a row, which is cut into shorter ones for `run` to sum up their
// columns.
template <class Run>
double SumOfColumns(Rows* row, const Run& run) {
  double sums[kSumColumns];
  *row = Cut(*row);
  run(sums);
  for (int half = kSumColumns / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

struct ActivationKernels {
  std::array<std::array<Activate, kDTypeCount>, kActivationCount> output;
  std::array<std::array<ActivateGrad, kDTypeCount>, kActivationCount> gradient;
};

extern const ActivationKernels kActivationKernels;

}  // namespace wdops::cpu
