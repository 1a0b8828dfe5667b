/* Timing one large matrix product. */
#include "core/train/matrix_rate.h"

#include <stdlib.h>

#include "core/base/log.h"
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
  MOE_TRY_OR(status, done, moe_draw_normal(dev, 1, 1, 0, 1.0f, a));
  MOE_TRY_OR(status, done, moe_draw_normal(dev, 1, 2, 0, 1.0f, b));
  MOE_TRY_OR(status, done, time_products(dev, a, b, c, &seconds));
  *tflops = 2.0 * (double)n * (double)n * (double)n / seconds * 1e-12;
done:
  moe_device_free(dev, a.data);
  moe_device_free(dev, b.data);
  moe_device_free(dev, c.data);
  return status;
}
