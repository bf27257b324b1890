// The C interface to the kernels on a GPU: pointers, sizes and a stream. It
// needs neither TensorFlow nor the headers of CUDA.
//
// Nothing here allocates, waits or copies: a caller owns all memory, of which
// `host` arguments are read on the host while the call lasts, and all others on
// the card, in the order of the stream. So every call may be captured in a CUDA
// graph: what changes from step to step lies in tables that the caller copies
// to the card (from pinned memory, a copy that is captured too reads what the
// host wrote last).
//
// A function that returns int returns a cudaError_t: 0 if all is well. Rules,
// dtypes and activations count as in rules.inc, dtypes.inc and activations.inc.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define WDOPS_CUDA_API __attribute__((visibility("default")))

typedef struct CUstream_st* WdopsStream;  // cudaStream_t

// One variable of a step. A pointer is null where there is no such array. None
// may overlap another.
typedef struct {
  int64_t n;  // of grad, in elements
  int32_t dtype, slot_dtype;
  void* param;
  const void* grad;
  void* slot[3];
  void* accumulator;
  void* average;
  // Sparse rows: grad is [n / width, width], and its row r belongs to row
  // rows[r] of all other arrays; no row may occur twice. These rows alone are
  // stepped, and are what norms, penalties and a trust ratio are of. Null: all.
  const int64_t* rows;
  // Factored gradient: x^T dz with x [batch, n / width] and dz [batch, width],
  // of `dtype`, in the place of grad, which is null. So may these be, if batch
  // is 0.
  const void* x;
  const void* dz;
  int64_t batch;
  int64_t width;  // of rows or factors, else not read
} WdopsVariable;

// ---- tables, filled on the host

// All tables are aligned to 16 bytes, here and on the card. This holds what
// does not change while the arrays stay where they are.
WDOPS_CUDA_API int64_t wdops_cuda_table_bytes(int count);
// Refuses (cudaErrorInvalidValue) a layout that is not one of layouts.inc, and
// rows beside factors.
WDOPS_CUDA_API int wdops_cuda_fill_table(const WdopsVariable* variables,
                                         int count, void* table);

// The constants of a step: made on the host, so that they have the bits that
// they have on a CPU. `hyper` holds kStepHypers and then those of the rule, for
// each of the variables; or once for all if `shared`, which a rule with a trust
// ratio is not. rule < 0: the gradient's alone (kGradientHypers), for norms.
// `count` of wdops_cuda_steps_bytes is that of the table, or 1 if `shared`: so
// little is to be copied in each step.
enum { WDOPS_SCALED_PROXIMAL = 1, WDOPS_STOCHASTIC = 2 };
// `count`: of variables, or 1 if they share it.
WDOPS_CUDA_API int64_t wdops_cuda_steps_bytes(int count);
WDOPS_CUDA_API int wdops_cuda_fill_steps(int rule, const void* host_table,
                                         const double* hyper, int shared,
                                         int options, void* steps);

// What a call with this table needs as scratch, in bytes.
WDOPS_CUDA_API int64_t wdops_cuda_scratch_bytes(const void* host_table);

// ---- the step

// Steps every variable in place. `table` and `steps` are copies on the card of
// what the functions above filled; `steps` is written where the rule has a
// trust ratio. grad_scale and clip_scale (one number each, or one for each
// variable if `grad_scales` or `clip_scales`) may be null; else they multiply
// those of the hyperparameters. penalty: one number for each variable, of the
// parameters as they are behind the step; or null.
WDOPS_CUDA_API int wdops_cuda_apply(int rule, const void* host_table,
                                    const void* table, void* steps,
                                    const double* grad_scale, int grad_scales,
                                    const double* clip_scale, int clip_scales,
                                    double* penalty, void* scratch,
                                    WdopsStream stream);

// Of every variable the norm of its gradient with accumulator and, where there
// is a param, penalty; the penalty, 0 where there is no param, or null; and
// whether all gradients are finite, one bool. As the op Wdops>Norms, to the
// last bit but for factored gradients, which are added up in tiles of another
// shape.
WDOPS_CUDA_API int wdops_cuda_norms(const void* host_table, const void* table,
                                    const void* steps, const double* grad_scale,
                                    int grad_scales, double* norm,
                                    double* penalty, unsigned char* finite,
                                    void* scratch, WdopsStream stream);

// scale = limit / max(limit, the norm of the norms), and 0 where that is not
// finite: what clips by the global norm, without asking the host.
WDOPS_CUDA_API int wdops_cuda_clip_scale(const double* norm, int count,
                                         double limit, double* scale,
                                         WdopsStream stream);

// ---- activations behind a bias

// output = activation(x + bias) of an array [outer, channels, inner]; bias
// [channels] may be null, and output may be x. `hyper` is read on the host.
WDOPS_CUDA_API int wdops_cuda_activate(int activation, int dtype,
                                       const double* host_hyper, int64_t outer,
                                       int64_t channels, int64_t inner,
                                       const void* x, const void* bias,
                                       void* output, WdopsStream stream);

// x_grad of grad and output, either of which it may be; bias_grad [channels]
// may be null.
WDOPS_CUDA_API int64_t wdops_cuda_activate_scratch_bytes(int64_t outer,
                                                         int64_t channels,
                                                         int64_t inner);
WDOPS_CUDA_API int wdops_cuda_activate_grad(
    int activation, int dtype, const double* host_hyper, int64_t outer,
    int64_t channels, int64_t inner, const void* grad, const void* output,
    void* x_grad, void* bias_grad, void* scratch, WdopsStream stream);

// ---- the machine

// 0 if a driver and a card are there.
WDOPS_CUDA_API int wdops_cuda_available(void);
WDOPS_CUDA_API const char* wdops_cuda_error(int error);

#ifdef __cplusplus
}
#endif
