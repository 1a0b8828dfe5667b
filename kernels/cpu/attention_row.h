/* One row of online softmax, shared by attention over a batch and over a cache. */
#ifndef MOE_KERNELS_CPU_ATTENTION_ROW_H
#define MOE_KERNELS_CPU_ATTENTION_ROW_H

#include "kernels/cpu/cpu_math.h"

static inline void moe_cpu_scale_row(float *x, int64_t n, float s) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] *= s;
}

/* Scores s[0..n) become exp(s - peak), peak raised to their maximum; the row's sum and output
 * [d] follow it. */
static inline void moe_cpu_soften_row(float *s, int64_t n, int64_t d, float *peak, float *sum,
                                      float *out) {
  float top = *peak, added = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : added)
  for (int64_t j = 0; j < n; j++) {
    float e = moe_expf(s[j] - top);
    s[j] = e;
    added += e;
  }
  if (top != *peak) {
    float shrink = moe_expf(*peak - top);
    *sum *= shrink;
    moe_cpu_scale_row(out, d, shrink);
  }
  *peak = top;
  *sum += added;
}

#endif
