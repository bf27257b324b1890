// The loop of an activation over a CPU's memory; compiled as cpu/sweep.cc.
#include "cpu/activation.h"

#include "cpu/float_mode.h"

namespace wdops::cpu {
namespace {

template <class T, class Activation, class Bias>
void ActivateRow(const Activation activation, const T* x, const Bias& bias,
                 T* output, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    Store(activation.Output(Load(x[i]) + bias(i)), &output[i]);
  }
}

template <template <class> class Activation, class T>
void ActivateRows(const double* hyper, const Rows& rows, const void* x,
                  const void* bias, bool uniform, void* output) {
  using S = Compute<T>;
  const FloatMode mode;
  const Activation<S> activation(hyper);
  const T* biases = static_cast<const T*>(bias);
  // No bias is one of -0: x - 0 is x, whatever the sign of a zero.
  const S shared = uniform ? biases ? Load(*biases) : S(-0.0) : S(0);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const T* from = static_cast<const T*>(x) + row * rows.stride;
    T* to = static_cast<T*>(output) + row * rows.stride;
    const int n = row + 1 < rows.rows ? rows.columns : rows.last_columns;
    if (uniform) {
      ActivateRow(activation, from, [=](int) { return shared; }, to, n);
    } else {
      ActivateRow(
          activation, from, [=](int i) { return Load(biases[i]); }, to, n);
    }
  }
}

// kRows rows at once, so that a column's sum is loaded and stored only once for
// all of them.
template <int kRows, bool kSums, class T, class Activation>
void ActivateGradRows(const Activation activation, int64_t stride,
                      const T* grad, const T* output, T* x_grad, double* sums,
                      int n) {
  using S = Compute<T>;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    double sum[kRows];
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = row * stride + i;
      const S g = activation.Gradient(Load(grad[at]), Load(output[at]));
      Store(g, &x_grad[at]);
      sum[row] = g;
    }
    if constexpr (kSums) {
      for (int half = kRows / 2; half > 0; half /= 2) {
        for (int row = 0; row < half; ++row) sum[row] += sum[row + half];
      }
      sums[i] += sum[0];
    }
  }
}

template <template <class> class Activation, class T>
void ActivateGradBlock(const double* hyper, const Rows& rows, const void* grad,
                       const void* output, void* x_grad, double* sums) {
  const FloatMode mode;
  const Activation<Compute<T>> activation(hyper);
  const auto sweep = [&](auto row_count, auto with_sums, int64_t row, int n) {
    const int64_t at = row * rows.stride;
    ActivateGradRows<row_count, with_sums>(
        activation, rows.stride, static_cast<const T*>(grad) + at,
        static_cast<const T*>(output) + at, static_cast<T*>(x_grad) + at, sums,
        n);
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 4> kFour;
  const int64_t last = rows.rows - 1;
  int64_t row = 0;
  if (sums) {
    std::fill_n(sums, rows.columns, 0.0);
    for (; row + kFour <= last; row += kFour) {
      sweep(kFour, std::true_type(), row, rows.columns);
    }
    for (; row < last; ++row) sweep(kOne, std::true_type(), row, rows.columns);
    sweep(kOne, std::true_type(), last, rows.last_columns);
  } else {
    for (; row < last; ++row) sweep(kOne, std::false_type(), row, rows.columns);
    sweep(kOne, std::false_type(), last, rows.last_columns);
  }
}

template <template <class> class Activation>
constexpr std::array<Activate, kDTypeCount> kActivates = {
#define DTYPE(name, Type) &ActivateRows<Activation, Type>,
#include "rules/dtypes.inc"
};

template <template <class> class Activation>
constexpr std::array<ActivateGrad, kDTypeCount> kActivateGrads = {
#define DTYPE(name, Type) &ActivateGradBlock<Activation, Type>,
#include "rules/dtypes.inc"
};

}  // namespace

constexpr ActivationKernels kActivationKernels = {{
#define ACTIVATION(Class) kActivates<Class>,
#include "rules/activations.inc"
                                                  },
                                                  {
#define ACTIVATION(Class) kActivateGrads<Class>,
#include "rules/activations.inc"
                                                  }};

}  // namespace wdops::cpu
