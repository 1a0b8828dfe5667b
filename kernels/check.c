/* Checks of operands and results. The idea: a wrong shape is reported in the words of ops.h, before
 * any kernel runs; a wrong value is reported (in debug mode) by the operation that made it. */
#include "kernels/check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- shapes and types -------------------------------------------------------------------- */

enum { SHAPE_TEXT = 96 };

static const char *shape_text(char text[SHAPE_TEXT], int dims, const int64_t *shape) {
  int used = snprintf(text, SHAPE_TEXT, "[");
  for (int i = 0; i < dims && used < SHAPE_TEXT; i++) {
    char number[24] = "any";
    if (shape[i] != MOE_ANY) snprintf(number, sizeof number, "%lld", (long long)shape[i]);
    used += snprintf(text + used, (size_t)(SHAPE_TEXT - used), "%s%s", i > 0 ? ", " : "", number);
  }
  if (used < SHAPE_TEXT) snprintf(text + used, (size_t)(SHAPE_TEXT - used), "]");
  return text;
}

static const char *types_text(char text[SHAPE_TEXT], int types) {
  int used = 0;
  text[0] = '\0';
  for (moe_dtype type = MOE_F32; type <= MOE_LOW16; type++)
    if (types & 1 << type && used < SHAPE_TEXT)
      used += snprintf(text + used, (size_t)(SHAPE_TEXT - used), "%s%s", used > 0 ? " or " : "",
                       moe_dtype_name(type));
  return text;
}

static moe_status check(const char *op, const char *name, moe_tensor t, int types, int dims,
                        const int64_t *shape) {
  bool good = t.dims == dims && types & 1 << t.dtype;
  for (int i = 0; good && i < dims; i++)
    good = t.shape[i] >= 0 && (shape[i] == MOE_ANY || t.shape[i] == shape[i]);
  if (good && (t.data != NULL || moe_tensor_count(t) == 0)) return MOE_OK;
  char wanted[SHAPE_TEXT], types_wanted[SHAPE_TEXT], found[SHAPE_TEXT];
  types_text(types_wanted, types);
  shape_text(wanted, dims, shape);
  if (t.data == NULL)
    return moe_fail(MOE_INVALID, "%s: %s is absent: it must be %s %s", op, name, types_wanted,
                    wanted);
  return moe_fail(MOE_INVALID, "%s: %s is %s %s: it must be %s %s", op, name,
                  moe_dtype_name(t.dtype), shape_text(found, t.dims, t.shape), types_wanted,
                  wanted);
}

moe_status moe_check_1d(const char *op, const char *name, moe_tensor t, int types, int64_t a) {
  return check(op, name, t, types, 1, &a);
}

moe_status moe_check_2d(const char *op, const char *name, moe_tensor t, int types, int64_t a,
                        int64_t b) {
  return check(op, name, t, types, 2, (int64_t[]){a, b});
}

moe_status moe_check_3d(const char *op, const char *name, moe_tensor t, int types, int64_t a,
                        int64_t b, int64_t c) {
  return check(op, name, t, types, 3, (int64_t[]){a, b, c});
}

moe_status moe_check_4d(const char *op, const char *name, moe_tensor t, int types, int64_t a,
                        int64_t b, int64_t c, int64_t d) {
  return check(op, name, t, types, 4, (int64_t[]){a, b, c, d});
}

moe_status moe_check_any(const char *op, const char *name, moe_tensor t, int types) {
  int dims = t.dims < 1 ? 1 : t.dims > MOE_MAX_DIMS ? MOE_MAX_DIMS : t.dims;
  return check(op, name, t, types, dims, (int64_t[]){MOE_ANY, MOE_ANY, MOE_ANY, MOE_ANY});
}

moe_status moe_check_rule(const char *op, int holds, const char *rule) {
  return holds ? MOE_OK : moe_fail(MOE_INVALID, "%s: %s", op, rule);
}

/* ---- values, in debug mode --------------------------------------------------------------- */

static double value_at(const void *data, moe_dtype dtype, int64_t i) {
  switch (dtype) {
  case MOE_F32:
    return (double)((const float *)data)[i];
  case MOE_BF16:
    return (double)moe_bf16_to_f32(((const uint16_t *)data)[i]);
  case MOE_F16:
    return (double)moe_f16_to_f32(((const uint16_t *)data)[i]);
  case MOE_F64:
    return ((const double *)data)[i];
  case MOE_I32:
  case MOE_LOW16:
    break;
  }
  return 0.0;
}

static moe_status non_finite(const moe_device *dev, const char *op, const char *name, int64_t at,
                             double value) {
  char layer[32] = "";
  if (dev->label_layer >= 0)
    snprintf(layer, sizeof layer, "layer %lld ", (long long)dev->label_layer);
  return moe_fail(
      MOE_DIVERGED,
      "non-finite value: %s in %s%s: element %lld of %s is %g: lower the learning rate, "
      "or look at what this operation was given",
      op, layer, dev->label != NULL ? dev->label : "an unnamed place", (long long)at, name, value);
}

/* The first `count` elements, brought to the host a piece at a time. */
static moe_status check_values(moe_device *dev, const char *op, const char *name, moe_tensor t,
                               int64_t count) {
  enum { PIECE = 1 << 18 };
  int64_t size = moe_dtype_size(t.dtype);
  char *host = malloc((size_t)(PIECE * size));
  if (host == NULL) return moe_fail(MOE_NO_MEMORY, "%s: debug check: out of memory", op);
  moe_status status = MOE_OK;
  for (int64_t begin = 0; begin < count && status == MOE_OK; begin += PIECE) {
    int64_t n = count - begin < PIECE ? count - begin : PIECE;
    MOE_TRY_OR(status, done,
               moe_device_download(dev, host, (const char *)t.data + begin * size, n * size));
    MOE_TRY_OR(status, done, moe_device_sync(dev));
    for (int64_t i = 0; i < n && status == MOE_OK; i++) {
      double value = value_at(host, t.dtype, i);
      if (!isfinite(value)) status = non_finite(dev, op, name, begin + i, value);
    }
  }
done:
  free(host);
  return status;
}

moe_status moe_check_finite(moe_device *dev, const char *op, const char *name, moe_tensor t) {
  if (!dev->options.debug || !moe_tensor_present(t) || t.dtype == MOE_I32) return MOE_OK;
  return check_values(dev, op, name, t, moe_tensor_count(t));
}

moe_status moe_check_finite_rows(moe_device *dev, const char *op, const char *name, moe_tensor t,
                                 moe_tensor offsets) {
  if (!dev->options.debug || t.shape[0] == 0) return MOE_OK;
  int32_t used = 0;
  const int32_t *last = (const int32_t *)offsets.data + offsets.shape[0] - 1;
  MOE_TRY(moe_device_download(dev, &used, last, (int64_t)sizeof used));
  MOE_TRY(moe_device_sync(dev));
  int64_t rows = used < t.shape[0] ? used : t.shape[0];
  return check_values(dev, op, name, t, rows * (moe_tensor_count(t) / t.shape[0]));
}
