/* One call on two devices: see both.h. Tensors live until both_close. */
#include "tests/gpu/both.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

moe_device *both_dev[SIDES];

enum { MOST = 1024, SEED = 77 };
static void *owned[MOST][SIDES];
static int count;

void both_ok(moe_status status, const char *call, const char *file, int line) {
  cr_assert(status == MOE_OK, "%s:%d: %s: %s", file, line, call, moe_error_message());
}

void both_open(void) {
  moe_device_options options = {.kind = MOE_DEVICE_CUDA, .deterministic = true};
  if (moe_device_open(&options, &both_dev[GPU_SIDE]) != MOE_OK) {
    /* MOE_TEST_BACKEND=cuda promises a GPU: then a missing one is a failure */
    const char *wanted = getenv("MOE_TEST_BACKEND");
    cr_assert(wanted == NULL || strcmp(wanted, "cuda") != 0, "%s", moe_error_message());
    cr_skip_test("no GPU: %s", moe_error_message());
  }
  options.kind = MOE_DEVICE_CPU;
  both_ok(moe_device_open(&options, &both_dev[CPU_SIDE]), "open", __FILE__, __LINE__);
}

void both_close(void) {
  for (int s = 0; s < SIDES && both_dev[GPU_SIDE] != NULL; s++) {
    for (int i = 0; i < count; i++) moe_device_free(both_dev[s], owned[i][s]);
    moe_device_close(both_dev[s]);
  }
  count = 0;
}

static both make(const char *name, moe_dtype dtype, int dims, const int64_t *shape) {
  both x = {.name = name};
  cr_assert(count < MOST);
  for (int s = 0; s < SIDES; s++) {
    x.t[s] = (moe_tensor){.dtype = dtype, .dims = dims, .shape = {1, 1, 1, 1}};
    memcpy(x.t[s].shape, shape, (size_t)dims * sizeof *shape);
    x.t[s].data = moe_device_alloc(both_dev[s], moe_tensor_bytes(x.t[s]));
    cr_assert(x.t[s].data != NULL, "no memory for %s", name);
    owned[count][s] = x.t[s].data;
  }
  count++;
  return x;
}

void both_align(both x) {
  int64_t bytes = moe_tensor_bytes(x.t[CPU_SIDE]);
  both_ok(moe_device_upload(both_dev[GPU_SIDE], x.t[GPU_SIDE].data, x.t[CPU_SIDE].data, bytes),
          "upload", __FILE__, __LINE__);
  both_ok(moe_device_sync(both_dev[GPU_SIDE]), "sync", __FILE__, __LINE__);
}

both both_random(const char *name, moe_dtype dtype, int dims, const int64_t *shape, double std) {
  both x = make(name, dtype, dims, shape);
  moe_tensor host = x.t[CPU_SIDE], draws = host;
  int64_t n = moe_tensor_count(host);
  float *v = malloc((size_t)(4 * n) + 1);
  cr_assert(v != NULL);
  moe_rng_normal_fill(SEED, moe_rng_stream(name, 0, 0), 0, n, (float)std, v);
  draws.dtype = MOE_F32;
  draws.data = v;
  if (dtype == MOE_F64) /* not a type of moe_copy */
    for (int64_t i = 0; i < n; i++) ((double *)host.data)[i] = (double)v[i];
  else
    both_ok(moe_copy(both_dev[CPU_SIDE], host, draws), "copy", __FILE__, __LINE__);
  free(v);
  both_align(x);
  return x;
}

both both_output(const char *name, moe_dtype dtype, int dims, const int64_t *shape) {
  both x = make(name, dtype, dims, shape);
  memset(x.t[CPU_SIDE].data, 0xff, (size_t)moe_tensor_bytes(x.t[CPU_SIDE])); /* NaN, or -1 */
  both_align(x);
  return x;
}

both both_ints(const char *name, int dims, const int64_t *shape, int64_t low, int64_t high) {
  both x = make(name, MOE_I32, dims, shape);
  int32_t *v = x.t[CPU_SIDE].data;
  uint64_t stream = moe_rng_stream(name, 1, 0);
  for (int64_t i = 0; i < moe_tensor_count(x.t[0]); i++)
    v[i] = (int32_t)(low + (int64_t)(moe_rng_uniform_f64(SEED, stream, (uint64_t)i) *
                                     (double)(high - low)));
  both_align(x);
  return x;
}

both both_none(void) {
  return (both){.t = {moe_tensor_none(), moe_tensor_none()}, .name = "none"};
}

static double value(const char *data, moe_dtype dtype, int64_t i) {
  switch (dtype) {
  case MOE_F32:
    return (double)((const float *)(const void *)data)[i];
  case MOE_BF16:
    return (double)moe_bf16_to_f32(((const uint16_t *)(const void *)data)[i]);
  case MOE_F16:
    return (double)moe_f16_to_f32(((const uint16_t *)(const void *)data)[i]);
  case MOE_I32:
    return (double)((const int32_t *)(const void *)data)[i];
  case MOE_F64:
    return ((const double *)(const void *)data)[i];
  case MOE_LOW16:
    return (double)((const uint16_t *)(const void *)data)[i];
  }
  return 0.0;
}

static char *from_gpu(both x, int64_t bytes) {
  char *host = malloc((size_t)bytes + 1);
  cr_assert(host != NULL);
  both_ok(moe_device_download(both_dev[GPU_SIDE], host, x.t[GPU_SIDE].data, bytes), "download",
          __FILE__, __LINE__);
  both_ok(moe_device_sync(both_dev[GPU_SIDE]), "sync", __FILE__, __LINE__);
  return host;
}

static void compare(both x, int64_t n, double tolerance, const char *file, int line) {
  moe_dtype dtype = x.t[0].dtype;
  char *gpu = from_gpu(x, n * moe_dtype_size(dtype));
  double error = 0.0, norm = 0.0, worst = 0.0;
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    double a = value(x.t[CPU_SIDE].data, dtype, i), b = value(gpu, dtype, i), d = fabs(a - b);
    error += d * d;
    norm += a * a;
    if (!(d <= worst)) worst = d, at = i;
  }
  double relative = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
  bool good = dtype == MOE_I32 ? worst == 0.0 : relative <= tolerance;
  double want = n > 0 ? value(x.t[CPU_SIDE].data, dtype, at) : 0.0;
  double found = n > 0 ? value(gpu, dtype, at) : 0.0;
  free(gpu);
  cr_assert(good,
            "%s:%d: %s (%s): relative error %.3g, allowed %.3g; worst: element %lld is %.9g, "
            "not %.9g",
            file, line, x.name, moe_dtype_name(dtype), relative, tolerance, (long long)at, found,
            want);
}

void both_close_to(both x, double tolerance, const char *file, int line) {
  compare(x, moe_tensor_count(x.t[0]), tolerance, file, line);
}

void both_rows_close_to(both x, int64_t rows, double tolerance, const char *file, int line) {
  compare(x, rows * (moe_tensor_count(x.t[0]) / x.t[0].shape[0]), tolerance, file, line);
}

uint64_t both_hash(both x) {
  int64_t bytes = moe_tensor_bytes(x.t[GPU_SIDE]);
  char *gpu = from_gpu(x, bytes);
  uint64_t hash = 14695981039346656037u;
  for (int64_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)gpu[i]) * 1099511628211u;
  free(gpu);
  return hash;
}
