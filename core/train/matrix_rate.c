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

typedef struct {
  moe_tensor a, b, c;
} matrices;

static moe_status make(moe_device *dev, int64_t n, moe_dtype dtype, matrices *m) {
  int64_t bytes = n * n * moe_dtype_size(dtype);
  m->a = moe_tensor_2d(moe_device_alloc(dev, bytes), dtype, n, n);
  m->b = moe_tensor_2d(moe_device_alloc(dev, bytes), dtype, n, n);
  m->c = moe_tensor_2d(moe_device_alloc(dev, n * n * 4), MOE_F32, n, n);
  if (!m->a.data || !m->b.data || !m->c.data)
    return moe_fail(MOE_NO_MEMORY, "out of memory: measuring the matrix rate");
  MOE_TRY(moe_draw_normal(dev, 1, 1, 0, 1.0f, m->a));
  return moe_draw_normal(dev, 1, 2, 0, 1.0f, m->b);
}

static void release(moe_device *dev, const matrices *m) {
  moe_device_free(dev, m->a.data);
  moe_device_free(dev, m->b.data);
  moe_device_free(dev, m->c.data);
}

static moe_status multiply(moe_device *dev, const matrices *m) {
  return moe_gemm(dev, MOE_NT, m->a, m->b, 0.0f, m->c);
}

static double tera(int64_t n) {
  return 2e-12 * (double)n * (double)n * (double)n;
}

static moe_status time_products(moe_device *dev, const matrices *m, double *seconds) {
  double runs[RUNS];
  MOE_TRY(multiply(dev, m));
  MOE_TRY(moe_device_sync(dev));
  for (int i = 0; i < RUNS; i++) {
    double start = moe_clock_s();
    MOE_TRY(multiply(dev, m));
    MOE_TRY(moe_device_sync(dev));
    runs[i] = moe_clock_s() - start;
  }
  *seconds = moe_median(runs, RUNS);
  return MOE_OK;
}

moe_status moe_matrix_rate(moe_device *dev, int64_t n, moe_dtype dtype, double *tflops) {
  matrices m;
  double seconds = 0.0;
  moe_status status = make(dev, n, dtype, &m);
  if (status == MOE_OK) status = time_products(dev, &m, &seconds);
  if (status == MOE_OK) *tflops = tera(n) / seconds;
  release(dev, &m);
  return status;
}

moe_status moe_matrix_power(moe_device *dev, int64_t n, moe_dtype dtype, moe_power *meter,
                            double *tflops, moe_power_use *use) {
  matrices m;
  moe_power_run run = {.dev = dev, .meter = meter, .seconds = 1.0};
  moe_status status = make(dev, n, dtype, &m);
  while (status == MOE_OK && moe_power_goes_on(&run)) status = multiply(dev, &m);
  if (status == MOE_OK) status = run.status;
  if (status == MOE_OK) *tflops = tera(n) * (double)run.calls / run.use.seconds;
  *use = run.use;
  release(dev, &m);
  return status;
}
