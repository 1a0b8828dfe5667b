/* Elementwise kernels and the embedding.
 *
 * Work is done in pieces of PIECE elements, which fit the first-level cache as floats whatever the
 * tensor's type. The pieces do not depend on the number of threads, nor do sums over them. */
#include "core/base/rng.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/cpu_math.h"

enum {
  PIECE = 2048,
  PARALLEL = 16 * PIECE, /* elements below which one thread is faster */
  PARTIALS = 256         /* most partial sums */
};

moe_status moe_cpu_zero(moe_device *dev, moe_tensor x) {
  (void)dev;
  enum { BLOCK = 1 << 20 };
  int64_t bytes = moe_tensor_bytes(x);
#pragma omp parallel for if (bytes > 4 * BLOCK)
  for (int64_t at = 0; at < bytes; at += BLOCK)
    memset((char *)x.data + at, 0, (size_t)moe_min64(BLOCK, bytes - at));
  return MOE_OK;
}

moe_status moe_cpu_fill(moe_device *dev, moe_tensor x, float value) {
  (void)dev;
  int64_t count = moe_tensor_count(x);
  float values[PIECE];
  for (int64_t i = 0; i < PIECE; i++) values[i] = value;
#pragma omp parallel for if (count > PARALLEL)
  for (int64_t at = 0; at < count; at += PIECE)
    moe_cpu_store(x, at, moe_min64(PIECE, count - at), values);
  return MOE_OK;
}

/* The pieces start at whole chunks of the stream (rng.c) when `begin` does. */
moe_status moe_cpu_draw_normal(moe_device *dev, uint64_t seed, uint64_t stream, int64_t begin,
                               float std, moe_tensor out) {
  (void)dev;
  int64_t count = moe_tensor_count(out);
#pragma omp parallel for if (count > PIECE)
  for (int64_t at = 0; at < count; at += PIECE) {
    float draws[PIECE];
    int64_t n = moe_min64(PIECE, count - at);
    moe_rng_normal_fill(seed, stream, begin + at, n, std, draws);
    moe_cpu_store(out, at, n, draws);
  }
  return MOE_OK;
}

moe_status moe_cpu_copy(moe_device *dev, moe_tensor dst, moe_tensor src) {
  (void)dev;
  int64_t count = moe_tensor_count(dst), size = moe_dtype_size(src.dtype);
  if (dst.data == src.data && dst.dtype == src.dtype) return MOE_OK;
#pragma omp parallel for if (count > PARALLEL)
  for (int64_t at = 0; at < count; at += PIECE) {
    float buffer[PIECE];
    int64_t n = moe_min64(PIECE, count - at);
    if (dst.dtype == src.dtype)
      memcpy((char *)dst.data + at * size, (const char *)src.data + at * size, (size_t)(n * size));
    else
      moe_cpu_store(dst, at, n, moe_cpu_view(src, at, n, buffer));
  }
  return MOE_OK;
}

moe_status moe_cpu_add(moe_device *dev, moe_tensor y, moe_tensor x) {
  (void)dev;
  int64_t count = moe_tensor_count(y);
#pragma omp parallel for if (count > PARALLEL)
  for (int64_t at = 0; at < count; at += PIECE) {
    float x_buffer[PIECE], y_buffer[PIECE], sum[PIECE];
    int64_t n = moe_min64(PIECE, count - at);
    const float *xs = moe_cpu_view(x, at, n, x_buffer), *ys = moe_cpu_view(y, at, n, y_buffer);
    for (int64_t i = 0; i < n; i++) sum[i] = ys[i] + xs[i];
    moe_cpu_store(y, at, n, sum);
  }
  return MOE_OK;
}

moe_status moe_cpu_sum_rows(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                            moe_tensor squares) {
  int64_t rows = x.shape[0], width = x.shape[1];
#pragma omp parallel for if (rows * width > PARALLEL)
  for (int64_t at = 0; at < width; at += PIECE) {
    float buffer[PIECE], sum[PIECE] = {0};
    int64_t n = moe_min64(PIECE, width - at);
    for (int64_t r = 0; r < rows; r++) {
      const float *row =
          r == own ? moe_cpu_view(out, at, n, buffer) : moe_cpu_view(x, r * width + at, n, buffer);
      for (int64_t i = 0; i < n; i++) sum[i] += row[i];
    }
    moe_cpu_store(out, at, n, sum);
  }
  return moe_tensor_present(squares) ? moe_cpu_sum_squares(dev, out, squares) : MOE_OK;
}

moe_status moe_cpu_scale(moe_device *dev, moe_tensor x, float s) {
  (void)dev;
  int64_t count = moe_tensor_count(x);
#pragma omp parallel for if (count > PARALLEL)
  for (int64_t at = 0; at < count; at += PIECE) {
    float buffer[PIECE], scaled[PIECE];
    int64_t n = moe_min64(PIECE, count - at);
    const float *xs = moe_cpu_view(x, at, n, buffer);
    for (int64_t i = 0; i < n; i++) scaled[i] = xs[i] * s;
    moe_cpu_store(x, at, n, scaled);
  }
  return MOE_OK;
}

moe_status moe_cpu_sum_squares(moe_device *dev, moe_tensor x, moe_tensor out) {
  (void)dev;
  int64_t count = moe_tensor_count(x);
  int64_t pieces = (count + PIECE - 1) / PIECE;
  int64_t share = (pieces + PARTIALS - 1) / PARTIALS * PIECE; /* elements per partial sum */
  double partial[PARTIALS] = {0};
#pragma omp parallel for if (count > PARALLEL)
  for (int64_t i = 0; i < PARTIALS; i++)
    partial[i] = moe_cpu_squares(x, moe_min64(i * share, count), moe_min64((i + 1) * share, count));
  double sum = 0.0;
  for (int64_t i = 0; i < PARTIALS; i++) sum += partial[i];
  *(double *)out.data += sum;
  return MOE_OK;
}

/* ---- embedding --------------------------------------------------------------------------- */

static moe_status check_tokens(const char *op, moe_tensor tokens, int64_t vocabulary) {
  const int32_t *ids = tokens.data;
  for (int64_t t = 0; t < tokens.shape[0]; t++)
    if (ids[t] < 0 || ids[t] >= vocabulary)
      return moe_fail(MOE_INVALID,
                      "%s: token %d at position %lld is outside the vocabulary of %lld: "
                      "check that the data was made with this model's tokenizer",
                      op, ids[t], (long long)t, (long long)vocabulary);
  return MOE_OK;
}

moe_status moe_cpu_embed(moe_device *dev, moe_tensor tokens, moe_tensor weight, moe_tensor out) {
  (void)dev;
  MOE_TRY(check_tokens("embed", tokens, weight.shape[0]));
  const int32_t *ids = tokens.data;
  int64_t count = out.shape[0], row = out.shape[1] * moe_dtype_size(out.dtype);
#pragma omp parallel for if (moe_tensor_count(out) > PARALLEL)
  for (int64_t t = 0; t < count; t++)
    memcpy((char *)out.data + t * row, (const char *)weight.data + ids[t] * row, (size_t)row);
  return MOE_OK;
}

/* Threads share out the columns, and each goes through the tokens in order: no two write the same
 * element, and the order of addition is the tokens'. */
moe_status moe_cpu_embed_backward(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                                  moe_tensor dweight) {
  (void)dev;
  MOE_TRY(check_tokens("embed_backward", tokens, dweight.shape[0]));
  enum { COLUMNS = 64 };
  const int32_t *ids = tokens.data;
  int64_t count = dout.shape[0], width = dout.shape[1];
#pragma omp parallel for if (moe_tensor_count(dout) > PARALLEL)
  for (int64_t column = 0; column < width; column += COLUMNS) {
    float buffer[COLUMNS];
    int64_t n = moe_min64(COLUMNS, width - column);
    for (int64_t t = 0; t < count; t++) {
      const float *from = moe_cpu_view(dout, t * width + column, n, buffer);
      float *to = (float *)dweight.data + ids[t] * width + column;
      for (int64_t i = 0; i < n; i++) to[i] += from[i];
    }
  }
  return MOE_OK;
}
