/* The experts' products on Hopper: own kernels against cuBLAS, at the 6.9b model's sizes.
 *
 *   experts_sm90 [EXPERTS] [NAME]       default 8 experts; products whose name contains NAME
 *   experts_sm90 EXPERTS NAME SECONDS   what they draw, each repeated for SECONDS
 *
 * Three contestants take turns, one launch each, so that all meet the same clocks and temperature:
 *   own      the fused kernel
 *   GEMM     cuBLAS's products alone, one per expert, sizes known to the host
 *   cuBLAS   the cuBLAS path of the same operation: the products, then SwiGLU in passes of its own
 * Columns are medians of ROUNDS launches between device events, the device idle before each
 * ("burst"), then own and GEMM again in unbroken runs of SUSTAINED launches, where the power limit
 * rules. Inputs are random and, where they would fit the cache, rotate over several copies.
 * up and down_backward have gu hold g and u, or slopes, where the forward's a is kept.
 * down_backward changes gu in place: in its unbroken run each launch has a fresh copy, and there
 * are as many launches as FRESH_GB holds copies. For SECONDS it takes turns with a copy, whose time
 * and joules, measured alone, are taken off again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/power.h"
#include "tests/bench/draws.h"

enum { D = 768, F = 6144, MOST_EXPERTS = 16, FEW_COPIES = 3, ROUNDS = 21, SUSTAINED = 40 };
enum { FRESH_GB = 40 };
enum { OWN = 0, GEMM, CUBLAS, CONTESTANTS };
typedef enum {
  UP,
  SLOPES_UP,
  DOWN,
  DOWN_BACKWARD,
  KEPT_BACKWARD,
  SLOPES_BACKWARD,
  UP_BACKWARD,
  GRAD_W13,
  GRAD_W2,
  PRODUCTS
} product;
static const char *const names[] = {"up",
                                    "up, slopes",
                                    "down",
                                    "down_backward",
                                    "down_backward, a kept",
                                    "down_backward, slopes",
                                    "up_backward",
                                    "grad w13",
                                    "grad w2"};

static moe_device *own, *cublas;
static int64_t e, C, bounds[MOST_EXPERTS + 1]; /* experts, rows, where segments begin */
static int turn;                               /* which copy of rotating inputs */
static moe_tensor draws;
static moe_power *meter;

/* ---- tensors --------------------------------------------------------------------------------- */

typedef struct {
  moe_tensor copy[SUSTAINED];
  int copies;
} rotating;

static moe_tensor at(rotating x) {
  return x.copy[turn % x.copies];
}

static bool makes_gu(product k) {
  return k == UP || k == SLOPES_UP;
}
static bool changes_gu(product k) {
  return k >= DOWN_BACKWARD && k <= SLOPES_BACKWARD;
}

static void copy_more(rotating *x, moe_tensor t, int copies, double scale) {
  for (; x->copies < copies; x->copies++) {
    t.data = moe_device_alloc(own, moe_tensor_bytes(t));
    if (t.data == NULL)
      must(moe_fail(MOE_NO_MEMORY, "experts_sm90: no device memory: give fewer EXPERTS"));
    fill(own, draws, t, scale);
    x->copy[x->copies] = t;
  }
}
static rotating make(moe_dtype dtype, int64_t n0, int64_t n1, int64_t n2, double scale) {
  rotating x = {.copies = 0};
  moe_tensor t = {NULL, dtype, n2 > 0 ? 3 : n1 > 0 ? 2 : 1, {n0, n1, n2, 1}};
  copy_more(&x, t, moe_tensor_bytes(t) < 256 << 20 ? FEW_COPIES : 1, scale);
  return x;
}
static void release(rotating *x) {
  for (int i = 0; i < x->copies; i++) moe_device_free(own, x->copy[i].data);
}

static rotating x, dy, a, gu, pristine, w13, w2, gates, dgates, rows_out, a_out, dw13, dw2;
static moe_tensor offsets, scratch;
static rotating *const all[] = {&x,     &dy,     &a,        &gu,    &pristine, &w13, &w2,
                                &gates, &dgates, &rows_out, &a_out, &dw13,     &dw2};

static void set_up(const int64_t *rows) {
  int32_t host[MOST_EXPERTS + 1] = {0};
  for (int64_t j = 0; j < e; j++) bounds[j + 1] = bounds[j] + rows[j];
  for (int64_t j = 0; j <= e; j++) host[j] = (int32_t)bounds[j];
  C = bounds[e];
  moe_dtype act = MOE_BF16;
  x = make(act, C, D, 0, 1), dy = make(act, C, D, 0, 1), a = make(act, C, F, 0, 1);
  gu = make(act, C, 2 * F, 0, 1), pristine = make(act, C, 2 * F, 0, 1);
  w13 = make(act, e, 2 * F, D, 0.03), w2 = make(act, e, D, F, 0.01);
  gates = make(MOE_F32, C, 0, 0, 0.25), dgates = make(MOE_F32, C, 0, 0, 0);
  rows_out = make(act, C, D, 0, 0), a_out = make(act, C, F, 0, 0);
  dw13 = make(MOE_F32, e, 2 * F, D, 0), dw2 = make(MOE_F32, e, D, F, 0);
  int64_t bytes = moe_expert_scratch(own, C, D, F, act);
  scratch = moe_tensor_1d(moe_device_alloc(own, bytes), MOE_F32, bytes / 4);
  moe_device_set_scratch(own, scratch.data, bytes);
  offsets = moe_tensor_1d(moe_device_alloc(own, 4 * (e + 1)), MOE_I32, e + 1);
  must(moe_device_upload(own, offsets.data, host, 4 * (e + 1)));
  must(moe_device_sync(own));
}
static void tear_down(void) {
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) release(all[i]);
  moe_device_set_scratch(own, NULL, 0);
  moe_device_free(own, scratch.data);
  moe_device_free(cublas, offsets.data); /* forgets what it knew of them */
}

/* ---- contestants ----------------------------------------------------------------------------- */

static void operation(moe_device *dev, product k) {
  switch (k) {
  case UP:
  case SLOPES_UP:
    must(moe_expert_up(dev, at(x), offsets, at(w13), at(gates),
                       k == UP ? MOE_GU_VALUES : MOE_GU_SLOPES, at(gu), at(a_out)));
    break;
  case DOWN:
    must(moe_expert_down(dev, at(a), offsets, at(w2), at(rows_out)));
    break;
  case DOWN_BACKWARD:
  case KEPT_BACKWARD:
    must(moe_expert_down_backward(dev, at(dy), offsets, at(w2), at(gates),
                                  k == DOWN_BACKWARD ? MOE_GU_VALUES : MOE_GU_AND_A, at(gu),
                                  at(a_out), at(dgates)));
    break;
  case SLOPES_BACKWARD:
    must(moe_expert_down_backward(dev, at(dy), offsets, at(w2), at(gates), MOE_GU_SLOPES, at(gu),
                                  at(a_out), moe_tensor_none()));
    break;
  case UP_BACKWARD:
    must(moe_expert_up_backward(dev, at(pristine), offsets, at(w13), at(rows_out)));
    break;
  case GRAD_W13:
    must(moe_expert_weight_grad(dev, at(pristine), at(x), offsets, 1, at(dw13), moe_tensor_none()));
    break;
  default:
    must(moe_expert_weight_grad(dev, at(dy), at(a), offsets, 1, at(dw2), moe_tensor_none()));
  }
}

/* Rows of expert j; its matrix of [e, m, n]. */
static moe_tensor part(moe_tensor t, int64_t j) {
  return moe_tensor_rows(t, bounds[j], bounds[j + 1] - bounds[j]);
}
static moe_tensor matrix(moe_tensor t, int64_t j) {
  moe_tensor m = moe_tensor_2d(t.data, t.dtype, t.shape[1], t.shape[2]);
  m.data = (char *)t.data + j * moe_tensor_bytes(m);
  return m;
}

static void products_alone(product k) {
  moe_gemm_form form = k <= DOWN ? MOE_NT : k <= UP_BACKWARD ? MOE_NN : MOE_TN;
  for (int64_t j = 0; j < e; j++) {
    moe_tensor l = makes_gu(k)        ? part(at(x), j)
                   : k == DOWN        ? part(at(a), j)
                   : k == GRAD_W13    ? part(at(pristine), j)
                   : k == UP_BACKWARD ? part(at(pristine), j)
                                      : part(at(dy), j);
    moe_tensor r = makes_gu(k) || k == UP_BACKWARD ? matrix(at(w13), j)
                   : k == DOWN || changes_gu(k)    ? matrix(at(w2), j)
                   : k == GRAD_W13                 ? part(at(x), j)
                                                   : part(at(a), j);
    moe_tensor o = makes_gu(k)     ? part(at(gu), j)
                   : changes_gu(k) ? part(at(a_out), j)
                   : k == GRAD_W13 ? matrix(at(dw13), j)
                   : k == GRAD_W2  ? matrix(at(dw2), j)
                                   : part(at(rows_out), j);
    must(moe_gemm(cublas, form, l, r, k >= GRAD_W13 ? 1.0f : 0.0f, o));
  }
}

static void contest(int who, product k) {
  if (who == GEMM)
    products_alone(k);
  else
    operation(who == OWN ? own : cublas, k);
}

static void settle(void) {
  must(moe_device_sync(own));
  must(moe_device_sync(cublas));
}

/* Seconds per launch of `count` launches. */
static double launches(int who, product k, int count) {
  moe_device *dev = who == OWN ? own : cublas;
  moe_mark from = {0}, to = {0};
  settle();
  dev->backend->mark(dev, &from);
  for (int i = 0; i < count; i++, turn++) contest(who, k);
  dev->backend->mark(dev, &to);
  settle();
  double s = dev->backend->between(dev, &from, &to) / count;
  dev->backend->forget(dev, &from);
  dev->backend->forget(dev, &to);
  return s;
}

static double tera_flops(product k) {
  return 1e-12 * (double)C * D * F * (makes_gu(k) || k == UP_BACKWARD || k == GRAD_W13 ? 4 : 2);
}

/* ---- measuring ------------------------------------------------------------------------------- */

static int by_value(const void *p, const void *q) {
  double b = *(const double *)p, c = *(const double *)q;
  return (b > c) - (b < c);
}

/* Seconds per launch of own and GEMM in unbroken runs. */
static void sustain(product k, double seconds[2]) {
  int count = SUSTAINED;
  if (changes_gu(k)) {
    int64_t most = ((int64_t)FRESH_GB << 30) / moe_tensor_bytes(gu.copy[0]);
    count = most < gu.copies ? gu.copies : most < SUSTAINED ? (int)most : SUSTAINED;
    for (int i = 0; i < gu.copies; i++) fill(own, draws, gu.copy[i], 1);
    copy_more(&gu, gu.copy[0], count, 1);
  }
  for (int who = OWN; who <= GEMM; who++) seconds[who] = launches(who, k, count);
  if (changes_gu(k) || makes_gu(k)) /* these wrote over gu */
    for (int i = 0; i < gu.copies; i++) fill(own, draws, gu.copy[i], 1);
}

static void measure(product k) {
  double s[CONTESTANTS][ROUNDS], sustained[2];
  for (int round = -2; round < ROUNDS; round++)
    for (int who = 0; who < CONTESTANTS; who++) {
      if (changes_gu(k) && who != GEMM) must(moe_copy(own, at(gu), at(pristine)));
      double one = launches(who, k, 1);
      if (round >= 0) s[who][round] = one;
    }
  for (int who = 0; who < CONTESTANTS; who++) qsort(s[who], ROUNDS, sizeof(double), by_value);
  sustain(k, sustained);
  double tera = tera_flops(k);
  double *m[] = {&s[OWN][ROUNDS / 2], &s[GEMM][ROUNDS / 2], &s[CUBLAS][ROUNDS / 2]};
  printf("%-21s %8.4f %8.4f %8.4f  %6.1f %6.1f %6.1f   %5.2f %5.2f   %6.1f %6.1f %5.2f\n", names[k],
         1e3 * *m[0], 1e3 * *m[1], 1e3 * *m[2], tera / *m[0], tera / *m[1], tera / *m[2],
         *m[1] / *m[0], *m[2] / *m[0], tera / sustained[0], tera / sustained[1],
         sustained[1] / sustained[0]);
  fflush(stdout);
}

/* ---- power ----------------------------------------------------------------------------------- */

typedef struct {
  double seconds, joules; /* of a call */
  moe_power_use use;
} drawn;

static drawn repeat(int who, product k, double seconds, bool fresh, bool work) {
  moe_power_run run = {.dev = who == OWN ? own : cublas, .meter = meter, .seconds = seconds};
  settle();
  for (; moe_power_goes_on(&run); turn++) {
    if (fresh) must(moe_copy(own, at(gu), at(pristine)));
    if (work) contest(who, k);
  }
  must(run.status);
  double s = run.use.seconds / (double)run.calls;
  return (drawn){.seconds = s, .joules = s * run.use.watts, .use = run.use};
}

static void draw(product k, double seconds) {
  printf("%-21s", names[k]);
  for (int who = OWN; who <= GEMM; who++) {
    bool fresh = who == OWN && changes_gu(k);
    drawn d = repeat(who, k, seconds, fresh, true);
    if (fresh) {
      drawn copy = repeat(who, k, seconds, true, false);
      d.seconds -= copy.seconds, d.joules -= copy.joules;
    }
    printf("   %8.4f %6.1f %5.0f %5.0f %4.0f%% %7.1f %6.3f%c", 1e3 * d.seconds,
           tera_flops(k) / d.seconds, d.use.watts, d.use.mhz, 100.0 * d.use.capped, 1e3 * d.joules,
           d.joules / tera_flops(k), fresh ? '*' : ' ');
    fflush(stdout);
  }
  printf("\n");
}

/* With 8192 rows for each expert. */
static void draw_all(double seconds, const char *only) {
  int64_t rows[MOST_EXPERTS];
  for (int64_t j = 0; j < e; j++) rows[j] = 8192;
  set_up(rows);
  printf(
      "%lld experts, 8192 rows each, D %d, F %d; own, then GEMM; *: W and MHz with a copy\n%-21s",
      (long long)e, D, F, "product");
  for (int who = OWN; who <= GEMM; who++)
    printf("   %8s %6s %5s %5s %5s %7s %6s ", "ms", "TFLOPs", "W", "MHz", "capped", "mJ", "pJ/F");
  printf("\n");
  for (int k = 0; k < PRODUCTS; k++)
    if (strstr(names[k], only) != NULL) draw((product)k, seconds);
  tear_down();
}

/* ---- all ------------------------------------------------------------------------------------- */

/* 4096 rows for each expert on average, the j-th with 1 / j of the first one's; whole tiles. */
static void zipf(int64_t *rows) {
  double sum = 0.0;
  for (int64_t j = 0; j < e; j++) sum += 1.0 / (double)(j + 1);
  for (int64_t j = 0; j < e; j++)
    rows[j] = 128 * (int64_t)(4096.0 * (double)e / (sum * (double)(j + 1)) / 128.0 + 0.5);
}

static void compare(const char *what, const int64_t *rows, const char *only) {
  set_up(rows);
  printf("\n%lld experts, %s rows each (%lld in all), D %d, F %d\n", (long long)e, what,
         (long long)C, D, F);
  printf("%-21s %26s  %20s   %11s   %s\n", "", "burst, ms", "TFLOP/s", "faster than",
         "sustained TFLOP/s");
  printf("%-21s %8s %8s %8s  %6s %6s %6s   %5s %5s   %6s %6s %5s\n", "product", "own", "GEMM",
         "cuBLAS", "own", "GEMM", "cuBLAS", "GEMM", "cuBL", "own", "GEMM", "ratio");
  for (int k = 0; k < PRODUCTS; k++)
    if (strstr(names[k], only) != NULL) measure((product)k);
  tear_down();
}

static moe_device *device(const char *products) {
  moe_device *dev;
  moe_device_options options = {.kind = MOE_DEVICE_CUDA};
  setenv("MOE_EXPERT_GEMM", products, 1);
  must(moe_device_open(&options, &dev));
  return dev;
}

int main(int argc, char **argv) {
  const char *only = argc > 2 ? argv[2] : "";
  double seconds = argc > 3 ? atof(argv[3]) : 0.0;
  e = argc > 1 ? atoll(argv[1]) : 8;
  if (e < 1 || e > MOST_EXPERTS) {
    fprintf(stderr, "experts_sm90: EXPERTS must be from 1 to %d\n", MOST_EXPERTS);
    return 2;
  }
  moe_log_init("experts_sm90", -1);
  own = device("sm90");
  cublas = device("cublas");
  draws = make_draws(own);
  printf("%s, bf16\n", moe_device_name(own));
  if (seconds > 0.0) {
    meter = moe_power_open(own);
    draw_all(seconds, only);
    moe_power_close(meter);
    return 0;
  }
  const int64_t each[] = {2048, 4096, 8192};
  for (int i = 0; i < 3; i++) {
    int64_t rows[MOST_EXPERTS];
    char text[32];
    for (int64_t j = 0; j < e; j++) rows[j] = each[i];
    snprintf(text, sizeof text, "%lld", (long long)each[i]);
    compare(text, rows, only);
  }
  int64_t uneven[MOST_EXPERTS];
  for (int64_t j = 0; j < e; j++) uneven[j] = 128 * (8 + 54 * (e - 1 - j) / (e > 1 ? e - 1 : 1));
  compare("1024 to 7936", uneven, only);
  zipf(uneven);
  compare("Zipf's", uneven, only);
  moe_device_close(own);
  moe_device_close(cublas);
  return 0;
}
