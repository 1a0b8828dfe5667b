/* Cross-entropy and its gradient, in place of the logits.
 *
 *     -log p(target) = max + log(sum_j exp(x_j - max)) - x_target
 *
 * A row is read from memory once: what follows finds it in the cache. Exponentials are f32, their
 * sum and the loss f64. Rows are shared out in a fixed number of blocks, so that the loss is the
 * same for any number of threads. */
#include <math.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/cpu_math.h"

enum { PIECE = 1024, BLOCKS = 64 };

/* The largest element; NaN when there is one, so that it reaches the loss. */
static float row_max(moe_tensor x, int64_t begin, int64_t end) {
  float buffer[PIECE], most = -INFINITY;
  int nans = 0;
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *xs = moe_cpu_view(x, at, n, buffer);
#pragma omp simd reduction(max : most) reduction(| : nans)
    for (int64_t i = 0; i < n; i++) {
      most = xs[i] > most ? xs[i] : most;
      nans |= xs[i] != xs[i];
    }
  }
  return nans ? NAN : most;
}

static double sum_exp(moe_tensor x, int64_t begin, int64_t end, float most) {
  float buffer[PIECE];
  double sum = 0.0;
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *xs = moe_cpu_view(x, at, n, buffer);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)moe_expf(xs[i] - most);
  }
  return sum;
}

/* x = factor * exp(x - most), less `scale` at the target. */
static void write_gradient(moe_tensor x, int64_t begin, int64_t end, float most, float factor,
                           int64_t target, float scale) {
  float buffer[PIECE], result[PIECE];
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *xs = moe_cpu_view(x, at, n, buffer);
    for (int64_t i = 0; i < n; i++) result[i] = factor * moe_expf(xs[i] - most);
    if (target >= at && target < at + n) result[target - at] -= scale;
    moe_cpu_store(x, at, n, result);
  }
}

static void clear_row(moe_tensor x, int64_t begin, int64_t end) {
  int64_t size = moe_dtype_size(x.dtype);
  memset((char *)x.data + begin * size, 0, (size_t)((end - begin) * size));
}

/* One row: returns -log p(target). */
static double row(moe_tensor x, int64_t begin, int64_t end, int64_t target, float scale,
                  int with_grad) {
  float at_target;
  moe_cpu_load(x, begin + target, 1, &at_target);
  float most = row_max(x, begin, end);
  double sum = sum_exp(x, begin, end, most);
  if (with_grad)
    write_gradient(x, begin, end, most, (float)((double)scale / sum), begin + target, scale);
  return log(sum) + ((double)most - (double)at_target);
}

static moe_status check_targets(moe_tensor targets, int64_t vocabulary) {
  const int32_t *target = targets.data;
  for (int64_t i = 0; i < targets.shape[0]; i++)
    if (target[i] < -1 || target[i] >= vocabulary)
      return moe_fail(MOE_INVALID,
                      "cross_entropy: target %d of row %lld is outside the vocabulary "
                      "of %lld: check that the data was made with this model's "
                      "tokenizer",
                      target[i], (long long)i, (long long)vocabulary);
  return MOE_OK;
}

moe_status moe_cpu_cross_entropy(moe_device *dev, moe_tensor logits, moe_tensor targets,
                                 float scale, int with_grad, moe_tensor loss, moe_tensor row_loss) {
  (void)dev;
  int64_t rows = logits.shape[0], width = logits.shape[1];
  MOE_TRY(check_targets(targets, width));
  const int32_t *target = targets.data;
  float *each = row_loss.data;
  int64_t share = (rows + BLOCKS - 1) / BLOCKS;
  double sum[BLOCKS] = {0}, counted[BLOCKS] = {0};
#pragma omp parallel for schedule(dynamic, 1) if (rows * width > 8192)
  for (int block = 0; block < BLOCKS; block++)
    for (int64_t i = block * share; i < moe_min64((block + 1) * share, rows); i++) {
      int64_t begin = i * width, end = begin + width;
      double value = 0.0;
      if (target[i] >= 0) {
        value = row(logits, begin, end, target[i], scale, with_grad);
        counted[block] += 1.0;
      } else if (with_grad) {
        clear_row(logits, begin, end);
      }
      sum[block] += value;
      if (each != NULL) each[i] = (float)value;
    }
  double *total = loss.data;
  for (int block = 0; block < BLOCKS; block++) {
    total[0] += sum[block];
    total[1] += counted[block];
  }
  return MOE_OK;
}
