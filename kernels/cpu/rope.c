/* Rotary position embedding, in place on the query and key heads.
 *
 * The cosines and sines come from a table made in f64, so that position 32767 is as exact as 1. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/cpu_math.h"

enum { PIECE = 256 };

/* The head of 2 * half elements that starts at `at`. */
static void rotate(moe_tensor qkv, int64_t at, int64_t half, const float *cosine, const float *sine,
                   float sign) {
  float a_buffer[PIECE], b_buffer[PIECE], a_turned[PIECE], b_turned[PIECE];
  for (int64_t begin = 0; begin < half; begin += PIECE) {
    int64_t n = moe_min64(PIECE, half - begin), low = at + begin, high = low + half;
    const float *a = moe_cpu_view(qkv, low, n, a_buffer);
    const float *b = moe_cpu_view(qkv, high, n, b_buffer);
    const float *c = cosine + begin, *s = sine + begin;
    for (int64_t i = 0; i < n; i++) {
      a_turned[i] = a[i] * c[i] - b[i] * (sign * s[i]);
      b_turned[i] = b[i] * c[i] + a[i] * (sign * s[i]);
    }
    moe_cpu_store(qkv, low, n, a_turned);
    moe_cpu_store(qkv, high, n, b_turned);
  }
}

moe_status moe_cpu_rope(moe_device *dev, moe_tensor qkv, moe_tensor positions, moe_tensor table,
                        int64_t heads, int64_t kv_heads, int direction) {
  (void)dev;
  int64_t tokens = qkv.shape[0], width = qkv.shape[1], d = table.shape[1], half = d / 2;
  const int32_t *position = positions.data;
  for (int64_t t = 0; t < tokens; t++)
    if (position[t] < 0 || position[t] >= table.shape[0])
      return moe_fail(MOE_INVALID,
                      "rope: position %d of token %lld is outside the table of %lld: "
                      "raise model.context",
                      position[t], (long long)t, (long long)table.shape[0]);
#pragma omp parallel for if (tokens * width > 16384)
  for (int64_t t = 0; t < tokens; t++) {
    const float *cosine = (const float *)table.data + position[t] * d;
    for (int64_t head = 0; head < heads + kv_heads; head++)
      rotate(qkv, t * width + head * d, half, cosine, cosine + half, (float)direction);
  }
  return MOE_OK;
}
