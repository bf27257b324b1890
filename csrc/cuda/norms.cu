// Norms of gradients, and the scale that clips by them.
#include "cuda/sums.h"

namespace wdops::cuda {
namespace {

struct FinishNorm {
  const Steps* steps;
  double *norm, *penalty;
  unsigned char* finite;  // true, until one is not

  __device__ void operator()(int variable, const Variable& v,
                             const Sums& sums) const {
    const double* const hyper = steps->Of(variable, v.IsDouble())->gradient;
    norm[variable] = Sqrt(sums.a);
    if (penalty) {
      penalty[variable] = PenaltyOf(hyper[kL1], hyper[kL2], sums.b, sums.c);
    }
    if (!IsFinite(sums, v.IsDouble())) *finite = 0;
  }
};

__global__ void __launch_bounds__(kLanes, 1)
    ClipKernel(const double* norm, int count, double limit, double* scale) {
  Sums sums;
  for (int i = threadIdx.x; i < count; i += kLanes) sums.a += norm[i] * norm[i];
  sums = AddUp(sums);
  if (threadIdx.x > 0) return;
  const double total = Sqrt(sums.a);
  const bool finite = total - total == 0;
  *scale = finite ? limit / (total > limit ? total : limit) : 0;
}

}  // namespace
}  // namespace wdops::cuda

using namespace wdops;
using namespace wdops::cuda;

int wdops_cuda_norms(const void* host_table_bytes, const void* table_bytes,
                     const void* steps_bytes, const double* grad_scale,
                     int grad_scales, double* norm, double* penalty,
                     unsigned char* finite, void* scratch, WdopsStream stream) {
  const Table& host_table = *static_cast<const Table*>(host_table_bytes);
  const Table* const table = static_cast<const Table*>(table_bytes);
  const Steps* const steps = static_cast<const Steps*>(steps_bytes);
  const cudaError_t error = cudaMemsetAsync(finite, 1, 1, stream);
  if (error != cudaSuccess) return error;
  return SumUp<GradientTerms>(host_table, table, steps,
                              Scales{grad_scale, grad_scales != 0}, scratch,
                              FinishNorm{steps, norm, penalty, finite}, stream);
}

int wdops_cuda_clip_scale(const double* norm, int count, double limit,
                          double* scale, WdopsStream stream) {
  return Launch(&ClipKernel, 1, kLanes, stream, norm, count, limit, scale);
}
