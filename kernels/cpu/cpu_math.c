/* Rows of elements to and from float: bf16 by integer shifts that the compiler vectorizes, fp16 by
 * the F16C instructions where the processor has them. Bit for bit the scalar conversions of
 * core/base/tensor.h (NaNs stay NaNs). */
#include "kernels/cpu/cpu_math.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

static void load_bf16(const uint16_t *restrict from, int64_t n, float *restrict to) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(&to[i], &bits, sizeof bits);
  }
}

static void store_bf16(uint16_t *restrict to, int64_t n, const float *restrict from) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, &from[i], sizeof bits);
    uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to[i] = (uint16_t)((nan ? bits | 0x400000u : rounded) >> 16);
  }
}

static void load_f16(const uint16_t *restrict from, int64_t n, float *restrict to) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
  for (; i < n; i++) to[i] = moe_f16_to_f32(from[i]);
}

static void store_f16(uint16_t *restrict to, int64_t n, const float *restrict from) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i *)(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) to[i] = moe_f32_to_f16(from[i]);
}

void moe_cpu_load(moe_tensor t, int64_t at, int64_t n, float *out) {
  switch (t.dtype) {
  case MOE_F32:
    memcpy(out, (const float *)t.data + at, (size_t)n * sizeof *out);
    break;
  case MOE_BF16:
    load_bf16((const uint16_t *)t.data + at, n, out);
    break;
  case MOE_F16:
    load_f16((const uint16_t *)t.data + at, n, out);
    break;
  case MOE_I32:
  case MOE_F64:
  case MOE_LOW16:
    break; /* not act types: ops.c lets none through */
  }
}

void moe_cpu_store(moe_tensor t, int64_t at, int64_t n, const float *values) {
  switch (t.dtype) {
  case MOE_F32:
    memmove((float *)t.data + at, values, (size_t)n * sizeof *values);
    break;
  case MOE_BF16:
    store_bf16((uint16_t *)t.data + at, n, values);
    break;
  case MOE_F16:
    store_f16((uint16_t *)t.data + at, n, values);
    break;
  case MOE_LOW16:
    moe_convert(values, MOE_F32, (uint16_t *)t.data + at, MOE_LOW16, n);
    break;
  case MOE_I32:
  case MOE_F64:
    break;
  }
}

const float *moe_cpu_view(moe_tensor t, int64_t at, int64_t n, float *buffer) {
  if (t.dtype == MOE_F32) return (const float *)t.data + at;
  moe_cpu_load(t, at, n, buffer);
  return buffer;
}

moe_cpu_matrix moe_cpu_block(moe_tensor t, int64_t row, int64_t rows, int64_t column,
                             int64_t columns, float *panel) {
  int64_t stride = t.shape[1];
  if (t.dtype == MOE_F32)
    return (moe_cpu_matrix){(const float *)t.data + row * stride + column, stride};
  for (int64_t i = 0; i < rows; i++)
    moe_cpu_load(t, (row + i) * stride + column, columns, panel + i * columns);
  return (moe_cpu_matrix){panel, columns};
}

double moe_cpu_squares(moe_tensor x, int64_t begin, int64_t end) {
  enum { PIECE = 1024 };
  double sum = 0.0;
  float buffer[PIECE] = {0};
  for (int64_t at = begin; at < end; at += PIECE) {
    int64_t n = moe_min64(PIECE, end - at);
    const float *xs = moe_cpu_view(x, at, n, buffer);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)xs[i] * (double)xs[i];
  }
  return sum;
}
