/* Small pieces that every CPU kernel uses: element conversion by rows, and an exp that the compiler
 * vectorizes. */
#ifndef MOE_KERNELS_CPU_MATH_H
#define MOE_KERNELS_CPU_MATH_H

#include <string.h>

#include "core/base/integers.h"
#include "core/base/tensor.h"

/* n elements of an act tensor, starting at element `at`, to or from float; low16 is only stored. */
void moe_cpu_load(moe_tensor t, int64_t at, int64_t n, float *out);
void moe_cpu_store(moe_tensor t, int64_t at, int64_t n, const float *values);
/* As load, but an f32 tensor is not copied: returns its own memory, else `buffer` filled. */
const float *moe_cpu_view(moe_tensor t, int64_t at, int64_t n, float *buffer);
/* The same for rows and columns of a 2-D tensor: `panel` [rows, columns], where it is filled. */
typedef struct {
  const float *data;
  int64_t stride;
} moe_cpu_matrix;
moe_cpu_matrix moe_cpu_block(moe_tensor t, int64_t row, int64_t rows, int64_t column,
                             int64_t columns, float *panel);
/* The sum of squares of elements [begin, end), in f64. */
double moe_cpu_squares(moe_tensor x, int64_t begin, int64_t end);

/* exp(x) for floats, within 2 units in the last place; below -87.3 gives 0, above 88.7 infinity.
 * NaN in, NaN out. Cody-Waite reduction and a degree-6 polynomial; branch-free. */
static inline float moe_expf(float x) {
  const float log2e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  float clamped = x < 88.72283f ? x : 88.72283f; /* a NaN too, so that n below is a number */
  clamped = clamped > -87.33654f ? clamped : -87.33654f;
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  float shifted = clamped * log2e + magic;
  float n = shifted - magic;
  float r = clamped - n * ln2_high - n * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  /* scale by 2^n in two steps, so that n = 128 does not overflow too early */
  int32_t half = (int32_t)n / 2, rest = (int32_t)n - half;
  union {
    int32_t i;
    float f;
  } a = {(half + 127) << 23}, b = {(rest + 127) << 23};
  float y = p * a.f * b.f;
  y = x > 88.72283f ? __builtin_inff() : y;
  y = x < -87.33654f ? 0.0f : y;
  return x == x ? y : x;
}

static inline float moe_sigmoidf(float x) {
  return 1.0f / (1.0f + moe_expf(-x));
}
/* silu(g) * u with s = sigmoid(g), an expert's hidden activation before its gate: one formula for
 * forward, backward and generation. */
static inline float moe_swigluf(float g, float s, float u) {
  return g * s * u;
}

#endif
