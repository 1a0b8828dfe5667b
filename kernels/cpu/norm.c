/* RMS norm with a fused residual addition, and its gradient.
 *
 * A row passes in pieces that stay in the first-level cache. Statistics are of the sum as stored
 * (rounded to the act type), because that is what backward reads. Squares are summed in f64. */
#include <math.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/cpu_math.h"

enum {
  PIECE = 1024,
  COLUMNS = 64,        /* gain gradients one thread sums at a time */
  PARALLEL = 16 * 1024 /* elements below which one thread is faster */
};

static void add_residual(moe_tensor x, moe_tensor residual, moe_tensor sum, int64_t begin,
                         int64_t end) {
  float x_buffer[PIECE], r_buffer[PIECE], total[PIECE];
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *xs = moe_cpu_view(x, at, n, x_buffer);
    const float *rs = moe_cpu_view(residual, at, n, r_buffer);
    for (int64_t i = 0; i < n; i++) total[i] = xs[i] + rs[i];
    moe_cpu_store(sum, at, n, total);
  }
}

static void normalize(moe_tensor x, int64_t begin, int64_t end, float rstd, const float *gain,
                      moe_tensor out) {
  float buffer[PIECE], result[PIECE];
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *xs = moe_cpu_view(x, at, n, buffer), *gains = gain + (at - begin);
    for (int64_t i = 0; i < n; i++) result[i] = xs[i] * rstd * gains[i];
    moe_cpu_store(out, at, n, result);
  }
}

moe_status moe_cpu_rms_norm(moe_device *dev, moe_tensor x, moe_tensor residual, moe_tensor gain,
                            double eps, moe_tensor sum, moe_tensor out, moe_tensor rstd) {
  (void)dev;
  bool fused = moe_tensor_present(residual);
  moe_tensor normed = fused ? sum : x;
  int64_t rows = x.shape[0], width = x.shape[1];
#pragma omp parallel for if (rows * width > PARALLEL)
  for (int64_t row = 0; row < rows; row++) {
    int64_t begin = row * width, end = begin + width;
    if (fused) add_residual(x, residual, sum, begin, end);
    double mean = moe_cpu_squares(normed, begin, end) / (double)width;
    float inverse = (float)(1.0 / sqrt(mean + eps));
    ((float *)rstd.data)[row] = inverse;
    normalize(normed, begin, end, inverse, gain.data, out);
  }
  return MOE_OK;
}

/* ---- backward -------------------------------------------------------------------------------
 * With h = x rstd and g = dout gain:  dx += rstd (g - h mean(g h)),  dgain += sum over rows dout h.
 */

static double dot_gained(moe_tensor dout, moe_tensor x, const float *gain, int64_t begin,
                         int64_t end) {
  float d_buffer[PIECE], x_buffer[PIECE];
  double sum = 0.0;
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *ds = moe_cpu_view(dout, at, n, d_buffer), *xs = moe_cpu_view(x, at, n, x_buffer);
    const float *gains = gain + (at - begin);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)(ds[i] * gains[i]) * (double)xs[i];
  }
  return sum;
}

static void add_row_gradient(moe_tensor dout, moe_tensor x, const float *gain, float rstd,
                             int64_t begin, int64_t end, moe_tensor dx) {
  double width = (double)(end - begin), r = (double)rstd;
  float pull = (float)(dot_gained(dout, x, gain, begin, end) / width * r * r * r);
  float d_buffer[PIECE], x_buffer[PIECE], dx_buffer[PIECE], result[PIECE];
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *ds = moe_cpu_view(dout, at, n, d_buffer), *xs = moe_cpu_view(x, at, n, x_buffer);
    const float *old = moe_cpu_view(dx, at, n, dx_buffer), *gains = gain + (at - begin);
    for (int64_t i = 0; i < n; i++) result[i] = old[i] + (rstd * (ds[i] * gains[i]) - pull * xs[i]);
    moe_cpu_store(dx, at, n, result);
  }
}

/* The walk down a column block touches memory a row apart, which hardware does not foresee. */
static void prefetch(moe_tensor t, int64_t at, int64_t n) {
  enum { LINE = 64 };
  int64_t size = moe_dtype_size(t.dtype);
  for (int64_t byte = 0; byte < n * size; byte += LINE)
    __builtin_prefetch((const char *)t.data + at * size + byte);
}

/* Columns [column, column + n) of dgain, over all rows in order: the same for any thread count. */
static void add_gain_gradient(moe_tensor dout, moe_tensor x, const float *rstd, int64_t column,
                              int64_t n, float *dgain) {
  double sum[COLUMNS] = {0};
  float d_buffer[COLUMNS], x_buffer[COLUMNS];
  int64_t last = x.shape[0] - 1;
  for (int64_t row = 0; row <= last; row++) {
    int64_t at = row * x.shape[1] + column, later = moe_min64(row + 8, last) - row;
    prefetch(x, at + later * x.shape[1], n);
    prefetch(dout, at + later * x.shape[1], n);
    const float *ds = moe_cpu_view(dout, at, n, d_buffer), *xs = moe_cpu_view(x, at, n, x_buffer);
    for (int64_t i = 0; i < n; i++) sum[i] += (double)(ds[i] * (xs[i] * rstd[row]));
  }
  for (int64_t i = 0; i < n; i++) dgain[column + i] += (float)sum[i];
}

moe_status moe_cpu_rms_norm_backward(moe_device *dev, moe_tensor dout, moe_tensor x,
                                     moe_tensor gain, moe_tensor rstd, moe_tensor dx,
                                     moe_tensor dgain) {
  (void)dev;
  int64_t rows = x.shape[0], width = x.shape[1];
  const float *inverse = rstd.data;
#pragma omp parallel if (rows * width > PARALLEL)
  {
    /* dgain first: dx may be dout's own memory */
#pragma omp for
    for (int64_t column = 0; column < width; column += COLUMNS)
      add_gain_gradient(dout, x, inverse, column, moe_min64(COLUMNS, width - column), dgain.data);
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
      add_row_gradient(dout, x, gain.data, inverse[row], row * width, (row + 1) * width, dx);
  }
  return MOE_OK;
}
