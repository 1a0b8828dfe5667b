/* Matrix products and threads inside the CPU backend.
 *
 * OpenBLAS runs on ONE thread (moe_cpu_open sets it) and all parallelism is OpenMP's: two thread
 * pools that take turns on the same cores cost 5 to 15 times the work of a small product. So inside
 * an OpenMP loop call cblas_sgemm freely, and outside one call moe_cpu_gemm, which splits the
 * product over the threads itself. */
#ifndef MOE_KERNELS_CPU_GEMM_H
#define MOE_KERNELS_CPU_GEMM_H

#include "kernels/cpu/cpu.h"

typedef struct moe_cpu_state {
  int threads;
  float *panels; /* moe_cpu_panel_floats() for each thread: half-precision blocks as f32 */
} moe_cpu_state;

int64_t moe_cpu_panel_floats(void);

/* moe_cpu_gemm (cpu.h) has the contract of moe_gemm. It may be called from one thread or from all
 * threads of an OpenMP region, where each call runs on its caller's thread alone. The same bits for
 * any number of threads. */

/* moe_cpu_choose_blas's condition: OpenBLAS loaded kernels for `core`, and `asked` (or NULL) is
 * what the environment told it to. */
bool moe_cpu_blas_mistaken(const char *core, bool avx512, const char *asked);

#endif
