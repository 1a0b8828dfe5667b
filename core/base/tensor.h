/* Tensors: a contiguous row-major view, passed by value. It owns nothing. */
#ifndef MOE_CORE_BASE_TENSOR_H
#define MOE_CORE_BASE_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* name, bytes per element */
#define MOE_DTYPE_MAP(X) \
  X(F32, 4, "fp32")      \
  X(BF16, 2, "bf16")     \
  X(F16, 2, "fp16")      \
  X(I32, 4, "int32")     \
  X(F64, 8, "fp64")      \
  X(LOW16, 2, "low16") /* the lower half of an f32 beside its bf16 rounding: halves.h */

typedef enum {
#define X(name, size, text) MOE_##name,
  MOE_DTYPE_MAP(X)
#undef X
} moe_dtype;

enum { MOE_MAX_DIMS = 4 };

typedef struct {
  void *data; /* host or device memory, by the device the tensor is used with; NULL = absent */
  moe_dtype dtype;
  int dims;
  int64_t shape[MOE_MAX_DIMS];
} moe_tensor;

int64_t moe_dtype_size(moe_dtype dtype);
const char *moe_dtype_name(moe_dtype dtype);

static inline moe_tensor moe_tensor_1d(void *data, moe_dtype dtype, int64_t a) {
  moe_tensor t = {data, dtype, 1, {a, 1, 1, 1}};
  return t;
}
static inline moe_tensor moe_tensor_2d(void *data, moe_dtype dtype, int64_t a, int64_t b) {
  moe_tensor t = {data, dtype, 2, {a, b, 1, 1}};
  return t;
}
static inline moe_tensor moe_tensor_3d(void *data, moe_dtype dtype, int64_t a, int64_t b,
                                       int64_t c) {
  moe_tensor t = {data, dtype, 3, {a, b, c, 1}};
  return t;
}
static inline moe_tensor moe_tensor_none(void) {
  moe_tensor t = {NULL, MOE_F32, 0, {0, 0, 0, 0}};
  return t;
}
static inline int64_t moe_tensor_count(moe_tensor t) {
  int64_t n = t.dims > 0 ? 1 : 0;
  for (int i = 0; i < t.dims; i++) n *= t.shape[i];
  return n;
}
static inline int64_t moe_tensor_bytes(moe_tensor t) {
  return moe_tensor_count(t) * moe_dtype_size(t.dtype);
}
static inline bool moe_tensor_present(moe_tensor t) {
  return t.data != NULL;
}
/* The same memory in another shape of the same element count. */
static inline moe_tensor moe_tensor_as_2d(moe_tensor t, int64_t a, int64_t b) {
  return moe_tensor_2d(t.data, t.dtype, a, b);
}
/* Rows [begin, begin + count) along the first dimension. */
moe_tensor moe_tensor_rows(moe_tensor t, int64_t begin, int64_t count);

/* Element conversion on the host; round to nearest even. */
float moe_bf16_to_f32(uint16_t bits);
uint16_t moe_f32_to_bf16(float value);
float moe_f16_to_f32(uint16_t bits);
uint16_t moe_f32_to_f16(float value);
/* No NaN and no infinity among n elements of f32, bf16 or f16? */
bool moe_all_finite(const void *data, moe_dtype type, int64_t n);
/* n elements of f32, bf16 or f16 to another (or the same) of these types, or to low16. */
void moe_convert(const void *from, moe_dtype from_type, void *to, moe_dtype to_type, int64_t n);
/* out[i] = the f32 whose halves are w[i], bf16, and low[i]. */
void moe_join_halves(const uint16_t *w, const uint16_t *low, float *out, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
