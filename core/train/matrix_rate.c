/* Timing one large matrix product. */
#include "core/train/matrix_rate.h"

#include <stdlib.h>

#include "core/base/log.h"
#include "core/base/rng.h"
#include "kernels/ops.h"

enum { RUNS = 5 };

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double moe_median(double *values, int n) {
  qsort(values, (size_t)n, sizeof *values, by_value);
  return values[n / 2];
}

/* a and b random, through f32 in c's memory, which is f32 and as large. */
static moe_status fill_random(moe_device *dev, moe_tensor x, moe_tensor through, uint64_t stream) {
  int64_t n = moe_tensor_count(x);
  float *host = malloc((size_t)n * sizeof *host);
  if (!host) return moe_fail(MOE_NO_MEMORY, "out of memory: measuring the matrix rate");
  for (int64_t i = 0; i < n; i++) {
    host[i] = moe_rng_uniform(1, stream, (uint64_t)i) - 0.5f;
  }
  moe_status status = moe_device_upload(dev, through.data, host, n * 4);
  if (status == MOE_OK) status = moe_copy(dev, x, through);
  if (status == MOE_OK) status = moe_device_sync(dev);
  free(host);
  return status;
}

static moe_status time_products(moe_device *dev, moe_tensor a, moe_tensor b, moe_tensor c,
                                double *seconds) {
  double runs[RUNS];
  MOE_TRY(moe_gemm(dev, MOE_NT, a, b, 0.0f, c));
  MOE_TRY(moe_device_sync(dev));
  for (int i = 0; i < RUNS; i++) {
    double start = moe_clock_s();
    MOE_TRY(moe_gemm(dev, MOE_NT, a, b, 0.0f, c));
    MOE_TRY(moe_device_sync(dev));
    runs[i] = moe_clock_s() - start;
  }
  *seconds = moe_median(runs, RUNS);
  return MOE_OK;
}

moe_status moe_matrix_rate(moe_device *dev, int64_t n, moe_dtype dtype, double *tflops) {
  int64_t bytes = n * n * moe_dtype_size(dtype);
  moe_tensor a = moe_tensor_2d(moe_device_alloc(dev, bytes), dtype, n, n);
  moe_tensor b = moe_tensor_2d(moe_device_alloc(dev, bytes), dtype, n, n);
  moe_tensor c = moe_tensor_2d(moe_device_alloc(dev, n * n * 4), MOE_F32, n, n);
  moe_status status = MOE_OK;
  double seconds = 0.0;
  if (!a.data || !b.data || !c.data) {
    status = moe_fail(MOE_NO_MEMORY, "out of memory: measuring the matrix rate");
    goto done;
  }
  MOE_TRY_OR(status, done, fill_random(dev, a, c, 1));
  MOE_TRY_OR(status, done, fill_random(dev, b, c, 2));
  MOE_TRY_OR(status, done, time_products(dev, a, b, c, &seconds));
  *tflops = 2.0 * (double)n * (double)n * (double)n / seconds * 1e-12;
done:
  moe_device_free(dev, a.data);
  moe_device_free(dev, b.data);
  moe_device_free(dev, c.data);
  return status;
}
