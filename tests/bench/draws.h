/* Device memory full of random numbers, for benchmarks: a block of normal draws is made once, and
 * tensors are filled with scaled copies of it. */
#ifndef MOE_TESTS_BENCH_DRAWS_H
#define MOE_TESTS_BENCH_DRAWS_H

#include <stdlib.h>

#include "core/base/integers.h"
#include "core/base/log.h"
#include "core/base/rng.h"
#include "kernels/ops.h"

enum { DRAWS = 1 << 22 };

static inline void must(moe_status status) {
  if (status != MOE_OK) exit(moe_report(status));
}

/* f32 [DRAWS] */
static inline moe_tensor make_draws(moe_device *dev) {
  moe_tensor draws = moe_tensor_1d(moe_device_alloc(dev, 4LL * DRAWS), MOE_F32, DRAWS);
  float *host = malloc(4LL * DRAWS);
  if (!draws.data || !host) must(moe_fail(MOE_NO_MEMORY, "out of memory: random numbers"));
  moe_rng_normal_fill(1, 2, 0, DRAWS, 1.0f, host);
  must(moe_device_upload(dev, draws.data, host, 4LL * DRAWS));
  must(moe_device_sync(dev));
  free(host);
  return draws;
}

static inline void fill(moe_device *dev, moe_tensor draws, moe_tensor x, double scale) {
  int64_t n = moe_tensor_count(x), size = moe_dtype_size(x.dtype);
  for (int64_t i = 0; i < n; i += DRAWS) {
    int64_t here = moe_min64(n - i, DRAWS);
    must(moe_copy(dev, moe_tensor_1d((char *)x.data + i * size, x.dtype, here),
                  moe_tensor_rows(draws, 0, here)));
  }
  must(moe_scale(dev, x, (float)scale));
}

#endif
