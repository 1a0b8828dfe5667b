/* OpenBLAS picks its kernels by processor when it is loaded, from the processors its release knows.
 * Debian 12's release, 0.3.21, knows Zen 4 but not Zen 5, which it takes for Haswell: half the
 * vector width. The choice can only be made through the environment and only before the library is
 * loaded, hence the restart. */
#include <cblas.h>
#include <stdlib.h>
#include <strings.h>
#include <unistd.h>

#include "kernels/cpu/gemm.h"

#define CHOICE "OPENBLAS_CORETYPE"

/* Whether this program runs kernels for 256-bit vectors on a processor with 512-bit ones, without
 * anybody having asked for it. */
bool moe_cpu_blas_mistaken(const char *core, bool avx512, const char *asked) {
  bool narrow = strcasecmp(core, "Haswell") == 0 || strcasecmp(core, "Zen") == 0;
  return narrow && avx512 && asked == NULL;
}

static bool has_avx512(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

void moe_cpu_choose_blas(char **argv) {
  if (!moe_cpu_blas_mistaken(openblas_get_corename(), has_avx512(), getenv(CHOICE))) return;
  /* The variable is what ends the matter: the restarted program finds it set. So without it, or
   * should the restart fail, go on as we are: slower, but right. */
  if (setenv(CHOICE, "SkylakeX", 1) != 0) return;
  execv("/proc/self/exe", argv);
}
