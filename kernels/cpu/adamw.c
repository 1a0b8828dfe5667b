/* AdamW, and the factor that clips gradients.
 *
 * Factors of the update are made from f64 once per call. Decay is subtracted as rate * (u + decay
 * w) rather than by multiplying w with 1 - rate * decay, which in f32 would round 1e-5 to 2 digits.
 */
#include <math.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/cpu_math.h"
#include "kernels/rounding.h"

enum { PIECE = 2048, PARALLEL = 8 * PIECE };

moe_status moe_cpu_clip_scale(moe_device *dev, moe_tensor sum_squares, double max_norm,
                              double unscale, moe_tensor scale) {
  (void)dev;
  double squares = *(const double *)sum_squares.data, norm = sqrt(squares) * unscale;
  double factor = max_norm > 0.0 && norm > max_norm ? max_norm / norm : 1.0;
  *(float *)scale.data = isfinite(squares) ? (float)(unscale * factor) : -1.0f;
  return MOE_OK;
}

typedef struct {
  float beta1, rest1, beta2, rest2; /* rest = 1 - beta */
  float rate, eps, decay, scale;
  int64_t step;
} factors;

static factors make_factors(moe_adamw_args args, const double *now, float scale) {
  return (factors){.beta1 = (float)args.beta1,
                   .rest1 = (float)(1.0 - args.beta1),
                   .beta2 = (float)args.beta2,
                   .rest2 = (float)(1.0 - args.beta2),
                   .rate = (float)now[MOE_ADAMW_RATE],
                   .eps = (float)now[MOE_ADAMW_EPS],
                   .decay = (float)args.weight_decay * (float)now[MOE_ADAMW_DECAY],
                   .scale = scale,
                   .step = (int64_t)now[MOE_ADAMW_STEP]};
}

static void update(factors f, int64_t n, const float *restrict grad, float *restrict w,
                   float *restrict m, float *restrict v) {
  for (int64_t i = 0; i < n; i++) {
    float g = grad[i] * f.scale;
    m[i] = f.beta1 * m[i] + f.rest1 * g;
    v[i] = f.beta2 * v[i] + f.rest2 * (g * g);
    float step = m[i] / (sqrtf(v[i]) + f.eps);
    w[i] = w[i] - f.rate * (step + f.decay * w[i]);
  }
}

/* to[i] = values[i] rounded by the 16 bits of random[i] from `shift` on. */
static void store_rounded(int64_t n, const float *values, const uint32_t *random, int shift,
                          uint16_t *to) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, &values[i], sizeof bits);
    to[i] = moe_rounding_bf16(bits, random[i] >> shift & 0xffffu);
  }
}

/* The same for elements [at, at + n) of bf16 moments. */
static void update_rounded(factors f, int64_t first_number, int64_t at, int64_t n,
                           const float *grad, float *w, moe_tensor m, moe_tensor v) {
  float first[PIECE], second[PIECE];
  uint32_t random[PIECE];
  moe_cpu_load(m, at, n, first);
  moe_cpu_load(v, at, n, second);
  update(f, n, grad, w, first, second);
  for (int64_t i = 0; i < n;) {
    int64_t number = first_number + at + i;
    moe_philox_block draw = moe_rounding_draw(f.step, number / 4);
    for (int64_t k = number % 4; k < 4 && i < n; k++) random[i++] = draw.word[k];
  }
  store_rounded(n, first, random, 0, (uint16_t *)m.data + at);
  store_rounded(n, second, random, 16, (uint16_t *)v.data + at);
}

/* Masters [at, at + n) where they are updated: their own memory, or `joined` of their halves. */
static float *masters_at(moe_tensor master, moe_tensor weight, int64_t at, int64_t n,
                         float *joined) {
  if (master.dtype == MOE_F32) return (float *)master.data + at;
  moe_join_halves((const uint16_t *)weight.data + at, (const uint16_t *)master.data + at, joined,
                  n);
  return joined;
}

moe_status moe_cpu_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                         moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                         moe_tensor weight) {
  (void)dev;
  float factor = *(const float *)scale.data;
  if (factor < 0.0f) return MOE_OK;
  factors f = make_factors(args, now.data, factor);
  int64_t count = moe_tensor_count(master);
#pragma omp parallel for if (count > PARALLEL)
  for (int64_t at = 0; at < count; at += PIECE) {
    int64_t n = moe_min64(PIECE, count - at);
    float g[PIECE], joined[PIECE];
    const float *gradient = moe_cpu_view(grad, at, n, g);
    float *w = masters_at(master, weight, at, n, joined);
    if (m.dtype == MOE_F32)
      update(f, n, gradient, w, (float *)m.data + at, (float *)v.data + at);
    else
      update_rounded(f, args.first, at, n, gradient, w, m, v);
    if (w == joined) moe_cpu_store(master, at, n, w);
    if (moe_tensor_present(weight)) moe_cpu_store(weight, at, n, w);
  }
  return MOE_OK;
}
