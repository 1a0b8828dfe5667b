/* Matrix products and threads inside the CPU backend.
 *
 * OpenBLAS runs on ONE thread (moe_cpu_open sets it) and all parallelism is OpenMP's: two thread
 * pools that take turns on the same cores cost 5 to 15 times the work of a small product. So a
 * kernel with its own threads calls moe_cpu_product (cpu_blas.h) inside its parallel region;
 * moe_cpu_gemm splits a product over threads by itself. */
#ifndef MOE_KERNELS_CPU_GEMM_H
#define MOE_KERNELS_CPU_GEMM_H

#include "kernels/cpu/cpu.h"

typedef struct moe_cpu_state {
  int threads;
  float *panels; /* moe_cpu_panel_floats() for each thread: half-precision blocks as f32 */
} moe_cpu_state;

int64_t moe_cpu_panel_floats(void);

/* moe_cpu_choose_blas's condition: OpenBLAS loaded kernels for `core`, and `asked` (or NULL) is
 * what the environment told it to. */
bool moe_cpu_blas_mistaken(const char *core, bool avx512, const char *asked);

#endif
