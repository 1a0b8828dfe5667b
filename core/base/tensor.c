/* Tensor types and the conversion of single elements on the host.
 *
 * bfloat16 is the upper half of a float; IEEE half has 5 exponent and 10 fraction bits. Both round
 * to nearest, ties to even, and keep NaN a (quiet) NaN. */
#include "core/base/tensor.h"

#include <string.h>

#include "core/base/halves.h"

int64_t moe_dtype_size(moe_dtype dtype) {
  switch (dtype) {
#define X(name, size, text) \
  case MOE_##name:          \
    return size;
    MOE_DTYPE_MAP(X)
#undef X
  }
  return 0;
}

const char *moe_dtype_name(moe_dtype dtype) {
  switch (dtype) {
#define X(name, size, text) \
  case MOE_##name:          \
    return text;
    MOE_DTYPE_MAP(X)
#undef X
  }
  return "unknown type";
}

moe_tensor moe_tensor_rows(moe_tensor t, int64_t begin, int64_t count) {
  moe_tensor rows = t;
  rows.shape[0] = 1;
  int64_t row_bytes = moe_tensor_bytes(rows);
  rows.shape[0] = count;
  if (t.data != NULL) rows.data = (char *)t.data + begin * row_bytes;
  return rows;
}

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float moe_bf16_to_f32(uint16_t bits) {
  return float_of((uint32_t)bits << 16);
}

uint16_t moe_f32_to_bf16(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
  /* Add half of the last kept place, less one when the kept part is even. */
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float moe_f16_to_f32(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
  uint32_t exponent = bits >> 10 & 0x1fu;
  uint32_t fraction = bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent > 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = (float)fraction * 0x1p-24f; /* zero and subnormals: exact */
  return float_of(sign | bits_of(tiny));
}

uint16_t moe_f32_to_f16(float value) {
  uint32_t bits = bits_of(value);
  uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (size >= 0x477ff000u)
    return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (size < 0x38800000u) {
    /* Subnormal result: adding 0.5 puts the result's last place at the float's last place, so the
     * processor rounds it. */
    float shifted = float_of(size) + 0.5f;
    return (uint16_t)(sign | (bits_of(shifted) - 0x3f000000u));
  }
  size += 0xfffu + (size >> 13 & 1u); /* round to even, then rebias the exponent by 112 */
  return (uint16_t)(sign | ((size - (112u << 23)) >> 13));
}

/* One loop per pair of types, so that the compiler makes each of whole vectors. */
void moe_convert(const void *from, moe_dtype from_type, void *to, moe_dtype to_type, int64_t n) {
  const float *wide = from;
  const uint16_t *narrow = from;
  float *to_wide = to;
  uint16_t *to_narrow = to;
  if (from_type == to_type)
    memcpy(to, from, (size_t)(n * moe_dtype_size(to_type)));
  else if (from_type == MOE_F32 && to_type == MOE_LOW16)
    for (int64_t i = 0; i < n; i++) to_narrow[i] = moe_halves_low(bits_of(wide[i]));
  else if (to_type == MOE_LOW16)
    for (int64_t i = 0; i < n; i++)
      to_narrow[i] = from_type == MOE_BF16 ? 0 : moe_halves_low(bits_of(moe_f16_to_f32(narrow[i])));
  else if (from_type == MOE_F32 && to_type == MOE_BF16)
    for (int64_t i = 0; i < n; i++) to_narrow[i] = moe_f32_to_bf16(wide[i]);
  else if (from_type == MOE_F32)
    for (int64_t i = 0; i < n; i++) to_narrow[i] = moe_f32_to_f16(wide[i]);
  else if (from_type == MOE_BF16 && to_type == MOE_F32)
    for (int64_t i = 0; i < n; i++) to_wide[i] = moe_bf16_to_f32(narrow[i]);
  else if (to_type == MOE_F32)
    for (int64_t i = 0; i < n; i++) to_wide[i] = moe_f16_to_f32(narrow[i]);
  else if (from_type == MOE_BF16)
    for (int64_t i = 0; i < n; i++) to_narrow[i] = moe_f32_to_f16(moe_bf16_to_f32(narrow[i]));
  else
    for (int64_t i = 0; i < n; i++) to_narrow[i] = moe_f32_to_bf16(moe_f16_to_f32(narrow[i]));
}

void moe_join_halves(const uint16_t *w, const uint16_t *low, float *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = float_of(moe_halves_join(w[i], low[i]));
}

bool moe_all_finite(const void *data, moe_dtype type, int64_t n) {
  /* Signed, because that is what every processor's vectors have a maximum of. */
  const int32_t *wide = data, wide_ones = 0x7f800000; /* of the exponent */
  const int16_t *narrow = data, narrow_ones = type == MOE_BF16 ? 0x7f80 : 0x7c00;
  int32_t widest = 0;
  int16_t largest = 0;
  if (type == MOE_F32) {
    for (int64_t i = 0; i < n; i++)
      widest = (wide[i] & wide_ones) > widest ? wide[i] & wide_ones : widest;
    return widest < wide_ones;
  }
  for (int64_t i = 0; i < n; i++) {
    int16_t exponent = (int16_t)(narrow[i] & narrow_ones);
    largest = exponent > largest ? exponent : largest;
  }
  return largest < narrow_ones;
}
