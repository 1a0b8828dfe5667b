/* Row-major f32 products on the calling thread, for kernels that bring their own threads (gemm.h
 * says why OpenBLAS has only one). */
#ifndef MOE_KERNELS_CPU_BLAS_H
#define MOE_KERNELS_CPU_BLAS_H

#include <cblas.h>

#include "kernels/cpu/gemm.h"

/* c [m, n] = form(a, b) + beta c; lda, ldb, ldc: elements from one row to the next. k > 0. */
static inline void moe_cpu_product(moe_gemm_form form, int64_t m, int64_t n, int64_t k,
                                   const float *a, int64_t lda, const float *b, int64_t ldb,
                                   float beta, float *c, int64_t ldc) {
  cblas_sgemm(CblasRowMajor, form == MOE_TN ? CblasTrans : CblasNoTrans,
              form == MOE_NT ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n, (blasint)k, 1.0f,
              a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

/* How many threads a parallel region of this device has: for its num_threads clause and for
 * per-thread scratch. */
static inline int moe_cpu_threads(const moe_device *dev) {
  return ((const moe_cpu_state *)dev->state)->threads;
}

#endif
