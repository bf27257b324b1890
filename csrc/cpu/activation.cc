// The loop of an activation over a CPU's memory; compiled as cpu/sweep.cc.
#include "cpu/activation.h"

#include "cpu/ahead.h"
#include "cpu/float_mode.h"

namespace wdops::cpu {
namespace {

template <class T, class Activation, class Bias>
void ActivateRow(const Activation activation, const T* x, const Bias& bias,
                 T* output, int n) {
  const int asked = ElementsAsked(n);
  for (int begin = 0; begin < n; begin += asked) {
    FetchAhead(x, begin);
    FetchAhead(output, begin);
    const int end = std::min(begin + asked, n);
#pragma GCC ivdep
    for (int i = begin; i < end; ++i) {
      Store(activation.Output(Load(x[i]) + bias(i)), &output[i]);
    }
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

template <bool kSums, class T, class Activation>
void ActivateGradRow(const Activation activation, const T* grad,
                     const T* output, T* x_grad, double* sums, int n) {
  const int asked = ElementsAsked(n);
  for (int begin = 0; begin < n; begin += asked) {
    FetchAhead(grad, begin);
    FetchAhead(output, begin);
    FetchAhead(x_grad, begin);
    const int end = std::min(begin + asked, n);
#pragma GCC ivdep
    for (int i = begin; i < end; ++i) {
      const auto g = activation.Gradient(Load(grad[i]), Load(output[i]));
      Store(g, &x_grad[i]);
      if constexpr (kSums) sums[i] += g;
    }
  }
}

template <template <class> class Activation, class T>
void ActivateGradRows(const double* hyper, const Rows& rows, const void* grad,
                      const void* output, void* x_grad, double* sums) {
  const FloatMode mode;
  const Activation<Compute<T>> activation(hyper);
  if (sums) std::fill_n(sums, rows.columns, 0.0);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t at = row * rows.stride;
    const T* g = static_cast<const T*>(grad) + at;
    const T* y = static_cast<const T*>(output) + at;
    T* to = static_cast<T*>(x_grad) + at;
    const int n = row + 1 < rows.rows ? rows.columns : rows.last_columns;
    if (sums) {
      ActivateGradRow<true>(activation, g, y, to, sums, n);
    } else {
      ActivateGradRow<false>(activation, g, y, to, sums, n);
    }
  }
}

template <template <class> class Activation>
constexpr std::array<Activate, kDTypeCount> kActivates = {
#define DTYPE(name, Type) &ActivateRows<Activation, Type>,
#include "rules/dtypes.inc"
};

template <template <class> class Activation>
constexpr std::array<ActivateGrad, kDTypeCount> kActivateGrads = {
#define DTYPE(name, Type) &ActivateGradRows<Activation, Type>,
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
