/* The operations' test harness: see op_check.h.
 *
 * Each tensor is a block of device memory with GUARD bytes of a pattern before and after it. Blocks
 * and host memory are kept in one list, checked and released when the body ends. */
#include "tests/support/op_check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

enum { GUARD = 512, PATTERN = 0xA5, MOST = 4096, SEED = 20240229 };

typedef struct {
  char *base;    /* device block: guard, data, guard; or NULL */
  int64_t bytes; /* of the data */
  void *host;    /* malloc'd */
  char name[32];
} owned;

static owned list[MOST];
static int listed;
static moe_device *device;
static char place[64]; /* "CPU, bf16" */

/* ---- failures ---------------------------------------------------------------------------- */

void op_fail(const char *file, int line, const char *condition, const char *format, ...) {
  fprintf(stderr, "%s:%d: [%s] %s: ", file, line, place, condition);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  fflush(NULL);
  abort();
}

void op_expect_ok(moe_status status, const char *call, const char *file, int line) {
  if (status != MOE_OK) op_fail(file, line, call, "%s", moe_error_message());
}

void op_expect_refused(moe_status code, const char *text, moe_status status, const char *call,
                       const char *file, int line) {
  if (status != code)
    op_fail(file, line, call, "gave %s, not %s", moe_status_name(status), moe_status_name(code));
  if (strstr(moe_error_message(), text) == NULL)
    op_fail(file, line, call, "the message \"%s\" does not say \"%s\"", moe_error_message(), text);
}

/* ---- the list of what a body owns -------------------------------------------------------- */

static owned *own(const char *name) {
  op_require(listed < MOST, "a body makes more than %d tensors", MOST);
  owned *o = &list[listed++];
  memset(o, 0, sizeof *o);
  snprintf(o->name, sizeof o->name, "%s", name);
  return o;
}

static void *own_host(const char *name, int64_t bytes) {
  owned *o = own(name);
  o->host = calloc(1, (size_t)bytes + 1);
  op_require(o->host != NULL, "out of memory");
  return o->host;
}

static char *own_device(const char *name, int64_t bytes) {
  char pattern[GUARD];
  memset(pattern, PATTERN, sizeof pattern);
  owned *o = own(name);
  o->bytes = bytes;
  o->base = moe_device_alloc(device, bytes + 2 * GUARD);
  op_require(o->base != NULL, "no device memory for %s", name);
  op_ok(moe_device_upload(device, o->base, pattern, GUARD));
  op_ok(moe_device_upload(device, o->base + GUARD + bytes, pattern, GUARD));
  op_ok(moe_device_sync(device));
  return o->base + GUARD;
}

static void check_guard(const owned *o, const char *zone, const char *side) {
  char found[GUARD];
  op_ok(moe_device_download(device, found, zone, GUARD));
  op_ok(moe_device_sync(device));
  for (int i = 0; i < GUARD; i++)
    op_require((unsigned char)found[i] == PATTERN, "wrote %s tensor %s", side, o->name);
}

static void check_guards(const owned *o) {
  if (o->base == NULL) return;
  check_guard(o, o->base, "before");
  check_guard(o, o->base + GUARD + o->bytes, "past the end of");
}

static void release_all(void) {
  op_ok(moe_device_sync(device));
  for (int i = 0; i < listed; i++) check_guards(&list[i]);
  for (int i = 0; i < listed; i++) {
    moe_device_free(device, list[i].base);
    free(list[i].host);
  }
  listed = 0;
  moe_device_set_scratch(device, NULL, 0);
}

/* ---- running a body ---------------------------------------------------------------------- */

static bool open_device(moe_device_kind kind, int threads) {
  const char *only = getenv("MOE_TEST_BACKEND");
  const char *name = kind == MOE_DEVICE_CPU ? "cpu" : "cuda";
  if (only != NULL && strcmp(only, name) != 0) return false;
  moe_device_options options = {.kind = kind, .threads = threads, .deterministic = true};
  if (moe_device_open(&options, &device) == MOE_OK) return true;
  op_require(kind != MOE_DEVICE_CPU && only == NULL, "%s", moe_error_message());
  moe_error_clear();
  return false;
}

static void run(void (*plain)(moe_device *), void (*typed)(moe_device *, moe_dtype),
                moe_dtype act) {
  const char *backend = moe_device_what(device) == MOE_DEVICE_CUDA ? "CUDA" : "CPU";
  snprintf(place, sizeof place, "%s%s%s", backend, typed != NULL ? ", " : "",
           typed != NULL ? moe_dtype_name(act) : "");
  if (typed != NULL)
    typed(device, act);
  else
    plain(device);
  release_all();
}

static void close_device(void) {
  moe_device_close(device);
  device = NULL;
}

void op_each(void (*body)(moe_device *dev, moe_dtype act)) {
  const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};
  for (moe_device_kind kind = MOE_DEVICE_CPU; kind <= MOE_DEVICE_CUDA; kind++) {
    if (!open_device(kind, 2)) continue;
    for (int i = 0; i < 3; i++) run(NULL, body, types[i]);
    close_device();
  }
}

void op_each_device(void (*body)(moe_device *dev)) {
  for (moe_device_kind kind = MOE_DEVICE_CPU; kind <= MOE_DEVICE_CUDA; kind++) {
    if (!open_device(kind, 2)) continue;
    run(body, NULL, MOE_F32);
    close_device();
  }
}

void op_with_threads(int threads, void (*body)(moe_device *dev)) {
  if (!open_device(MOE_DEVICE_CPU, threads)) return;
  run(body, NULL, MOE_F32);
  close_device();
}

/* ---- values and bytes -------------------------------------------------------------------- */

static void encode(moe_dtype dtype, double value, char *to) {
  float f = (float)value;
  uint16_t half = dtype == MOE_BF16 ? moe_f32_to_bf16(f) : moe_f32_to_f16(f);
  int32_t integer = isnan(value) ? INT32_MIN : (int32_t)value;
  switch (dtype) {
  case MOE_F32:
    memcpy(to, &f, sizeof f);
    break;
  case MOE_BF16:
  case MOE_F16:
    memcpy(to, &half, sizeof half);
    break;
  case MOE_I32:
    memcpy(to, &integer, sizeof integer);
    break;
  case MOE_F64:
    memcpy(to, &value, sizeof value);
    break;
  case MOE_LOW16:
    half = isnan(value) ? 0xffff : (uint16_t)value;
    memcpy(to, &half, sizeof half);
    break;
  }
}

static double decode(moe_dtype dtype, const char *from) {
  float f;
  uint16_t half;
  int32_t integer;
  double value = 0.0;
  switch (dtype) {
  case MOE_F32:
    memcpy(&f, from, sizeof f);
    return (double)f;
  case MOE_BF16:
    memcpy(&half, from, sizeof half);
    return (double)moe_bf16_to_f32(half);
  case MOE_F16:
    memcpy(&half, from, sizeof half);
    return (double)moe_f16_to_f32(half);
  case MOE_I32:
    memcpy(&integer, from, sizeof integer);
    return (double)integer;
  case MOE_F64:
    memcpy(&value, from, sizeof value);
    break;
  case MOE_LOW16:
    memcpy(&half, from, sizeof half);
    return (double)half;
  }
  return value;
}

double op_round(moe_dtype dtype, double value) {
  char bytes[8];
  encode(dtype, value, bytes);
  return decode(dtype, bytes);
}

double op_tolerance(moe_dtype dtype) {
  return dtype == MOE_BF16 ? 3e-3 : dtype == MOE_F16 ? 4e-4 : 1e-6;
}

double op_sum_tolerance(moe_device *dev, moe_dtype in) {
  return in == MOE_F32 || moe_device_is_host(dev) ? 1e-6 : 1e-5;
}

/* ---- tensors ----------------------------------------------------------------------------- */

/* Bring x->v to the device, rounded; x->v becomes what was stored. */
static void upload(op_tensor *x) {
  int64_t size = moe_dtype_size(x->t.dtype);
  char *bytes = malloc((size_t)(x->count * size) + 1);
  op_require(bytes != NULL, "out of memory");
  for (int64_t i = 0; i < x->count; i++) {
    encode(x->t.dtype, x->v[i], bytes + i * size);
    x->v[i] = decode(x->t.dtype, bytes + i * size);
  }
  op_ok(moe_device_upload(device, x->t.data, bytes, x->count * size));
  op_ok(moe_device_sync(device));
  free(bytes);
}

static op_tensor make(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape) {
  op_require(dev == device, "the body must use the device it was given");
  op_tensor x = {.t = {.dtype = dtype, .dims = shape.dims}, .name = name};
  for (int i = 0; i < MOE_MAX_DIMS; i++) x.t.shape[i] = i < shape.dims ? shape.size[i] : 1;
  x.count = moe_tensor_count(x.t);
  x.t.data = own_device(name, moe_tensor_bytes(x.t));
  x.v = op_doubles(x.count);
  return x;
}

op_tensor op_random(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape,
                    double std) {
  op_tensor x = make(dev, name, dtype, shape);
  float *draws = own_host(name, x.count * (int64_t)sizeof *draws);
  moe_rng_normal_fill(SEED, moe_rng_stream(name, 0, 0), 0, x.count, (float)std, draws);
  for (int64_t i = 0; i < x.count; i++) x.v[i] = (double)draws[i];
  upload(&x);
  return x;
}

op_tensor op_values(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape,
                    const double *values) {
  op_tensor x = make(dev, name, dtype, shape);
  memcpy(x.v, values, (size_t)x.count * sizeof *values);
  upload(&x);
  return x;
}

op_tensor op_ints(moe_device *dev, const char *name, op_shape shape, const int32_t *values) {
  op_tensor x = make(dev, name, MOE_I32, shape);
  for (int64_t i = 0; i < x.count; i++) x.v[i] = (double)values[i];
  upload(&x);
  return x;
}

op_tensor op_filled(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape,
                    double value) {
  op_tensor x = make(dev, name, dtype, shape);
  for (int64_t i = 0; i < x.count; i++) x.v[i] = value;
  upload(&x);
  return x;
}

op_tensor op_output(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape) {
  return op_filled(dev, name, dtype, shape, (double)NAN);
}

op_tensor op_clone(moe_device *dev, op_tensor x) {
  op_shape shape = {x.t.dims, {x.t.shape[0], x.t.shape[1], x.t.shape[2], x.t.shape[3]}};
  op_read(&x);
  return op_values(dev, x.name, x.t.dtype, shape, x.v);
}

void op_scratch(moe_device *dev, int64_t bytes) {
  op_require(dev == device, "the body must use the device it was given");
  char *data = own_device("scratch", bytes);
  char *poison = malloc((size_t)bytes + 1);
  op_require(poison != NULL, "out of memory");
  memset(poison, 0xFF, (size_t)bytes); /* NaN in every type */
  op_ok(moe_device_upload(dev, data, poison, bytes));
  op_ok(moe_device_sync(dev));
  free(poison);
  moe_device_set_scratch(dev, data, bytes);
}

double *op_read(op_tensor *x) {
  int64_t size = moe_dtype_size(x->t.dtype);
  char *bytes = malloc((size_t)(x->count * size) + 1);
  op_require(bytes != NULL, "out of memory");
  op_ok(moe_device_download(device, bytes, x->t.data, x->count * size));
  op_ok(moe_device_sync(device));
  for (int64_t i = 0; i < x->count; i++) x->v[i] = decode(x->t.dtype, bytes + i * size);
  free(bytes);
  for (int i = 0; i < listed; i++)
    if (list[i].base + GUARD == (char *)x->t.data) check_guards(&list[i]);
  return x->v;
}

/* ---- expectations ------------------------------------------------------------------------ */

void op_expect_close(op_tensor *x, const double *reference, double tolerance, const char *file,
                     int line) {
  const double *found = op_read(x);
  double error = 0.0, norm = op_dot(reference, reference, x->count);
  for (int64_t i = 0; i < x->count; i++)
    error += (found[i] - reference[i]) * (found[i] - reference[i]);
  double relative = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
  if (!(relative <= tolerance))
    op_fail(file, line, x->name, "relative error %.3g, allowed %.3g (element 0: %.9g, not %.9g)",
            relative, tolerance, x->count > 0 ? found[0] : 0.0, x->count > 0 ? reference[0] : 0.0);
  double typical = x->count > 0 ? sqrt(norm / (double)x->count) : 0.0;
  for (int64_t i = 0; i < x->count; i++)
    if (!(fabs(found[i] - reference[i]) <=
          30.0 * tolerance * (fabs(reference[i]) + typical) + (norm > 0.0 ? 0.0 : tolerance)))
      op_fail(file, line, x->name, "element %lld is %.9g, not %.9g", (long long)i, found[i],
              reference[i]);
}

void op_expect_equal(op_tensor *x, const double *reference, const char *file, int line) {
  const double *found = op_read(x);
  for (int64_t i = 0; i < x->count; i++)
    if (!(found[i] == reference[i]))
      op_fail(file, line, x->name, "element %lld is %.17g, not %.17g", (long long)i, found[i],
              reference[i]);
}

/* ---- references -------------------------------------------------------------------------- */

void op_differences(double (*f)(const double *x, void *context), void *context, double *x,
                    int64_t count, double *gradient) {
  for (int64_t i = 0; i < count; i++) {
    double kept = x[i], h = 1e-5 * (1.0 + fabs(kept));
    x[i] = kept + h;
    double above = f(x, context);
    x[i] = kept - h;
    double below = f(x, context);
    x[i] = kept;
    gradient[i] = (above - below) / (2.0 * h);
  }
}

double *op_doubles(int64_t count) {
  return own_host("host", count * (int64_t)sizeof(double));
}

int32_t *op_int32s(int64_t count) {
  return own_host("host", count * (int64_t)sizeof(int32_t));
}

int64_t op_pick(const char *name, int64_t index, int64_t below) {
  return (int64_t)(moe_rng_uniform_f64(SEED, moe_rng_stream(name, 1, 0), (uint64_t)index) *
                   (double)below);
}

double op_dot(const double *a, const double *b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}
