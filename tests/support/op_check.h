/* The operations' test harness.
 *
 * A test of an operation is a body that takes a device (and an act type); op_each runs it on every
 * backend that this machine has. Tensors made here live on the device, between guard zones that are
 * looked at when the tensor is read and when the body ends; outputs start as NaN. Values are
 * float64 on the host, as the type stores them, so references need no rounding of their own.
 *
 * A failed expectation prints what, where (backend, type) and by how much, and aborts: under
 * Criterion that fails the test, elsewhere the program. */
#ifndef MOE_TESTS_SUPPORT_OP_CHECK_H
#define MOE_TESTS_SUPPORT_OP_CHECK_H

#include "kernels/ops.h"

/* ---- running a body ---------------------------------------------------------------------- */

/* For each backend (CPU; CUDA where a device opens) and each of f32, bf16, f16. The environment
 * variable MOE_TEST_BACKEND=cpu|cuda keeps one. */
void op_each(void (*body)(moe_device *dev, moe_dtype act));
/* For each backend. */
void op_each_device(void (*body)(moe_device *dev));
/* One body, on a CPU device with so many threads. */
void op_with_threads(int threads, void (*body)(moe_device *dev));

/* ---- tensors on the device --------------------------------------------------------------- */

typedef struct {
  moe_tensor t;     /* on the device */
  int64_t count;    /* elements */
  double *v;        /* the values: as filled, or as last read; owned by the harness */
  const char *name; /* for messages */
} op_tensor;

/* Sizes: dims 1 to 4 numbers, e.g. OP_SHAPE(t, d). */
typedef struct {
  int dims;
  int64_t size[MOE_MAX_DIMS];
} op_shape;
#define OP_SHAPE(...) \
  ((op_shape){(int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), {__VA_ARGS__}})

/* Normal draws of deviation `std` (a different stream for each name), rounded to the type. */
op_tensor op_random(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape, double std);
/* These values, rounded to the type; integers for MOE_I32, bits for MOE_LOW16. */
op_tensor op_values(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape,
                    const double *values);
op_tensor op_ints(moe_device *dev, const char *name, op_shape shape, const int32_t *values);
/* One value everywhere. */
op_tensor op_filled(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape,
                    double value);
/* An output: NaN everywhere (INT32_MIN for MOE_I32, all ones for MOE_LOW16). */
op_tensor op_output(moe_device *dev, const char *name, moe_dtype dtype, op_shape shape);
/* A second tensor with the same contents. */
op_tensor op_clone(moe_device *dev, op_tensor x);
/* Device memory handed to the device as its scratch, guarded like a tensor. */
void op_scratch(moe_device *dev, int64_t bytes);

/* Wait for the device, check the guards, bring the values to x->v and return it. */
double *op_read(op_tensor *x);

/* ---- expectations ------------------------------------------------------------------------ */

#define op_require(condition, ...) \
  ((condition) ? (void)0 : op_fail(__FILE__, __LINE__, #condition, __VA_ARGS__))
_Noreturn void op_fail(const char *file, int line, const char *condition, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* status must be MOE_OK. */
#define op_ok(call) op_expect_ok((call), #call, __FILE__, __LINE__)
void op_expect_ok(moe_status status, const char *call, const char *file, int line);
/* status must be `code`, with a message that contains `text`. */
#define op_refuses(code, text, call) \
  op_expect_refused((code), (text), (call), #call, __FILE__, __LINE__)
void op_expect_refused(moe_status code, const char *text, moe_status status, const char *call,
                       const char *file, int line);

/* |x - reference| / |reference| (2-norms; absolute when the reference is zero) within tolerance,
 * and no element off by more than 30 times tolerance * (its size + the reference's root mean
 * square). */
#define op_close(x, reference, tolerance) \
  op_expect_close(&(x), (reference), (tolerance), __FILE__, __LINE__)
void op_expect_close(op_tensor *x, const double *reference, double tolerance, const char *file,
                     int line);
/* Every element exactly. */
#define op_equal(x, reference) op_expect_equal(&(x), (reference), __FILE__, __LINE__)
void op_expect_equal(op_tensor *x, const double *reference, const char *file, int line);

/* What one rounding to the type, or a few f32 operations, may cost: 1e-6, 3e-3 or 4e-4. */
double op_tolerance(moe_dtype dtype);
/* What float32 sums of products of `in` may lose: 1e-6; on a GPU 1e-5 for half precision, whose
 * tensor cores cut off bits as they add. */
double op_sum_tolerance(moe_device *dev, moe_dtype in);
/* A value as the type stores it. */
double op_round(moe_dtype dtype, double value);

/* ---- gradients --------------------------------------------------------------------------- */

/* Central differences of a float64 reference: gradient[i] = (f(x + h e_i) - f(x - h e_i)) / 2h with
 * h = 1e-5 (1 + |x_i|). x is restored. */
void op_differences(double (*f)(const double *x, void *context), void *context, double *x,
                    int64_t count, double *gradient);

/* Host memory that lasts until the body ends. */
double *op_doubles(int64_t count);
int32_t *op_int32s(int64_t count);
/* Uniform in [0, below), by number: the same every time. */
int64_t op_pick(const char *name, int64_t index, int64_t below);
double op_dot(const double *a, const double *b, int64_t count);

#endif
