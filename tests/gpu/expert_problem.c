/* Random problems for Hopper's expert products: see expert_problem.h.
 *
 * The reference takes the same values as float32: the CPU backend, or cuBLAS in float32 where that
 * would be slow. A tensor that is wrong is shown as a map of its first wrong 128 x 192 tile, 16 x
 * 16 elements to a character: which part is wrong says why. */
#include "tests/gpu/expert_problem.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

enum { TAIL = 40, NORMALS = 1000003 };
static const double OFFSET = 3.0; /* what sums of squares are added to */

const char *const product_names[] = {"up",
                                     "up, slopes",
                                     "down",
                                     "down_backward",
                                     "down_backward, a kept",
                                     "down_backward, slopes",
                                     "up_backward",
                                     "grad w13",
                                     "grad w2",
                                     "half w13",
                                     "half w2"};

static moe_device *hopper, *cublas, *cpu;
static float normals[NORMALS];

static void *memory(int64_t bytes) {
  void *p = calloc(1, (size_t)bytes + 1);
  cr_assert(p != NULL, "no memory");
  return p;
}

static void ok(moe_status status, const char *what) {
  cr_assert(status == MOE_OK, "%s: %s", what, moe_error_message());
}
#define OK(call) ok((call), #call)

static moe_device *device(moe_device_kind kind, const char *products) {
  moe_device *dev = NULL;
  moe_device_options options = {.kind = kind, .threads = 4}; /* other tests want cores, too */
  setenv("MOE_EXPERT_GEMM", products, 1);
  if (moe_device_open(&options, &dev) != MOE_OK)
    cr_skip_test("no Hopper GPU: %s", moe_error_message());
  return dev;
}

void problem_open(void) {
  hopper = device(MOE_DEVICE_CUDA, "sm90");
  cublas = device(MOE_DEVICE_CUDA, "cublas");
  cpu = device(MOE_DEVICE_CPU, "");
  moe_rng_normal_fill(5, 6, 0, NORMALS, 1.0f, normals);
}
void problem_close(void) {
  moe_device_close(hopper);
  moe_device_close(cublas);
  moe_device_close(cpu);
}

/* ---- problems -------------------------------------------------------------------------------- */

static float rounded(float x) {
  return moe_bf16_to_f32(moe_f32_to_bf16(x));
}

/* count values from place `seed` of the normals on; the prime period never lines up with rows. */
static float *draws(int64_t count, int64_t seed, double std) {
  float *v = memory(count * (int64_t)sizeof(float));
  for (int64_t i = 0; i < count; i++)
    v[i] = rounded((float)std * normals[(i + seed * 7919) % NORMALS]);
  return v;
}

/* Rows of [C, width]: zero where a segment is padded, NaN after the last. */
static float *row_draws(const problem *p, int64_t width, int64_t seed, double std) {
  float *v = draws(p->c * width, seed, std);
  for (int64_t j = 0; j < p->s.e; j++)
    for (int64_t i = (p->offsets[j] + p->s.rows[j]) * width; i < p->offsets[j + 1] * width; i++)
      v[i] = 0.0f;
  for (int64_t i = p->used * width; i < p->c * width; i++) v[i] = NAN;
  return v;
}

problem problem_make(shape s, int64_t seed) {
  problem p = {.s = s};
  for (int64_t j = 0; j < s.e; j++)
    p.offsets[j + 1] = p.offsets[j] + (int32_t)((s.rows[j] + s.pad - 1) / s.pad * s.pad);
  p.used = p.offsets[s.e];
  p.c = p.used + TAIL;
  p.x = row_draws(&p, s.d, seed + 1, 1.0);
  p.dy = row_draws(&p, s.d, seed + 2, 1.0);
  p.gates = row_draws(&p, 1, seed + 3, 0.5);
  p.gu = row_draws(&p, 2 * s.f, seed + 4, 1.5);
  p.a = row_draws(&p, s.f, seed + 5, 1.0);
  p.w13 = draws(s.e * 2 * s.f * s.d, seed + 6, 1.0 / sqrt((double)s.d));
  p.w2 = draws(s.e * s.d * s.f, seed + 7, 1.0 / sqrt((double)s.f));
  p.base = draws(s.e * 2 * s.f * s.d, seed + 8, 3.0);
  return p;
}
void problem_release(problem *p) {
  float *all[] = {p->x, p->dy, p->gates, p->gu, p->a, p->w13, p->w2, p->base};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* ---- one product on one device --------------------------------------------------------------- */

static int results(product k, const problem *p, result *r) {
  int64_t d = p->s.d, f = p->s.f, e = p->s.e;
  const double half = 3e-3, sums = 1e-4;
  bool up = k == UP || k == SLOPES_UP;
  result gu = {up ? "gu" : "dgu", p->c, p->used, 2 * f, half, MOE_BF16, NULL};
  result a = {"a", p->c, p->used, f, up ? 2 * half : half, MOE_BF16, NULL};
  result gates = {"dgates", p->c, p->used, 1, sums, MOE_F32, NULL};
  result rows = {k == DOWN ? "y" : "dx", p->c, p->used, d, half, MOE_BF16, NULL};
  result w13 = {"dw13", e * 2 * f, e * 2 * f, d, sums, MOE_F32, NULL};
  result w2 = {"dw2", e * d, e * d, f, sums, MOE_F32, NULL};
  result squares = {"squares", 1, 1, 2, k >= HALF_W13 ? half : sums, MOE_F32, NULL};
  r[1] = squares;
  switch (k) {
  case UP:
  case SLOPES_UP:
    r[0] = gu, r[1] = a;
    return 2;
  case DOWN_BACKWARD:
    r[0] = gu, r[1] = a, r[2] = gates;
    return 3;
  case KEPT_BACKWARD:
    r[0] = gu, r[1] = gates;
    return 2;
  case SLOPES_BACKWARD:
    r[0] = gu;
    return 1;
  case GRAD_W13:
    r[0] = w13;
    return 2;
  case GRAD_W2:
    r[0] = w2;
    return 2;
  case HALF_W13:
    r[0] = w13, r[0].tolerance = half;
    return 2;
  case HALF_W2:
    r[0] = w2, r[0].tolerance = half;
    return 2;
  default:
    r[0] = rows;
    return 1;
  }
}

enum { MOST_TENSORS = 16 };
typedef struct {
  moe_device *dev;
  moe_dtype act;
  void *data[MOST_TENSORS];
  int count;
} bench;

static moe_tensor tensor(bench *b, moe_dtype dtype, int64_t n0, int64_t n1, int64_t n2) {
  int dims = n2 > 0 ? 3 : n1 > 0 ? 2 : 1;
  moe_tensor t = {NULL, dtype, dims, {n0, n1, n2, 1}};
  t.data = b->data[b->count++] = moe_device_alloc(b->dev, moe_tensor_bytes(t) + 1);
  cr_assert(t.data != NULL, "no device memory");
  return t;
}
static void send(bench *b, moe_tensor t, const void *from) {
  OK(moe_device_upload(b->dev, t.data, from, moe_tensor_bytes(t)));
  OK(moe_device_sync(b->dev));
}
static moe_tensor put(bench *b, moe_dtype dtype, const float *v, int64_t n0, int64_t n1,
                      int64_t n2) {
  moe_tensor t = tensor(b, dtype, n0, n1, n2);
  int64_t n = moe_tensor_count(t);
  if (dtype == MOE_F32) {
    send(b, t, v);
    return t;
  }
  uint16_t *bits = memory(2 * n);
  for (int64_t i = 0; i < n; i++) bits[i] = moe_f32_to_bf16(v[i]);
  send(b, t, bits);
  free(bits);
  return t;
}
static moe_tensor poisoned(bench *b, moe_dtype dtype, int64_t n0, int64_t n1, int64_t n2) {
  moe_tensor t = tensor(b, dtype, n0, n1, n2);
  char *nan = memory(moe_tensor_bytes(t));
  memset(nan, 0xff, (size_t)moe_tensor_bytes(t));
  send(b, t, nan);
  free(nan);
  return t;
}
static float *get(bench *b, moe_tensor t) {
  int64_t n = moe_tensor_count(t);
  float *v = memory(n * (int64_t)sizeof(float));
  uint16_t *bits = memory(2 * n);
  bool half = t.dtype == MOE_BF16;
  OK(moe_device_download(b->dev, half ? (void *)bits : v, t.data, moe_tensor_bytes(t)));
  OK(moe_device_sync(b->dev));
  for (int64_t i = 0; i < n && half; i++) v[i] = moe_bf16_to_f32(bits[i]);
  free(bits);
  return v;
}

/* The call added the squares of dw, as it is stored, to OFFSET. Returns them as two floats whose
 * sum has all of their bits. */
static float *check_squares(bench *b, moe_tensor squares, moe_tensor dw) {
  double sum = 0.0, got;
  float *v = get(b, dw), *halves = memory(2 * (int64_t)sizeof(float));
  int64_t n = moe_tensor_count(dw);
  for (int64_t i = 0; i < n; i++) sum += (double)v[i] * (double)v[i];
  OK(moe_device_download(b->dev, &got, squares.data, (int64_t)sizeof got));
  OK(moe_device_sync(b->dev));
  cr_assert(fabs(got - OFFSET - sum) <= 1e-6 * sum, "squares of %s [%lld]: %.9g, not %.9g",
            moe_dtype_name(dw.dtype), (long long)n, got - OFFSET, sum);
  halves[0] = (float)got;
  halves[1] = (float)(got - (double)halves[0]);
  free(v);
  return halves;
}

/* The product's outputs as floats, with inputs and outputs of type act. */
static int run_on(moe_device *dev, product k, moe_dtype act, const problem *p, int accumulate,
                  result *r) {
  bench b = {.dev = dev, .act = act};
  int64_t d = p->s.d, f = p->s.f, e = p->s.e, c = p->c;
  moe_tensor offsets = tensor(&b, MOE_I32, e + 1, 0, 0), squares = moe_tensor_none(), out[3];
  send(&b, offsets, p->offsets);
  int64_t bytes = moe_expert_scratch(dev, c, d, f, act);
  moe_tensor scratch = poisoned(&b, MOE_F32, bytes / 4 + 1, 0, 0);
  moe_device_set_scratch(dev, scratch.data, bytes);
#define ROWS(v, width) put(&b, act, p->v, c, width, 0)
#define GATES put(&b, MOE_F32, p->gates, c, 0, 0)
  if (k == UP || k == SLOPES_UP) {
    out[0] = poisoned(&b, act, c, 2 * f, 0), out[1] = poisoned(&b, act, c, f, 0);
    OK(moe_expert_up(dev, ROWS(x, d), offsets, put(&b, act, p->w13, e, 2 * f, d), GATES,
                     k == UP ? MOE_GU_VALUES : MOE_GU_SLOPES, out[0], out[1]));
  } else if (k == DOWN) {
    out[0] = poisoned(&b, act, c, d, 0);
    OK(moe_expert_down(dev, ROWS(a, f), offsets, put(&b, act, p->w2, e, d, f), out[0]));
  } else if (k >= DOWN_BACKWARD && k <= SLOPES_BACKWARD) {
    bool slopes = k == SLOPES_BACKWARD, remake = k == DOWN_BACKWARD;
    moe_gu_kind kind = slopes ? MOE_GU_SLOPES : remake ? MOE_GU_VALUES : MOE_GU_AND_A;
    moe_tensor a = poisoned(&b, act, c, f, 0);
    moe_tensor dgates = slopes ? moe_tensor_none() : poisoned(&b, MOE_F32, c, 0, 0);
    out[0] = ROWS(gu, 2 * f), out[1] = remake ? a : dgates, out[2] = dgates;
    OK(moe_expert_down_backward(dev, ROWS(dy, d), offsets, put(&b, act, p->w2, e, d, f), GATES,
                                kind, out[0], a, dgates));
  } else if (k == UP_BACKWARD) {
    out[0] = poisoned(&b, act, c, d, 0);
    OK(moe_expert_up_backward(dev, ROWS(gu, 2 * f), offsets, put(&b, act, p->w13, e, 2 * f, d),
                              out[0]));
  } else {
    bool w13 = k == GRAD_W13 || k == HALF_W13;
    int64_t m = w13 ? 2 * f : d, n = w13 ? d : f;
    moe_dtype type = k == HALF_W13 || k == HALF_W2 ? act : MOE_F32;
    out[0] = accumulate ? put(&b, type, p->base, e, m, n) : poisoned(&b, type, e, m, n);
    moe_tensor left = w13 ? ROWS(gu, m) : ROWS(dy, m);
    moe_tensor right = w13 ? ROWS(x, n) : ROWS(a, n);
    const double before = OFFSET;
    squares = tensor(&b, MOE_F64, 1, 0, 0);
    send(&b, squares, &before);
    OK(moe_expert_weight_grad(dev, left, right, offsets, accumulate, out[0], squares));
  }
  ok(moe_device_sync(dev), product_names[k]);
  int count = results(k, p, r);
  bool grad = moe_tensor_present(squares);
  for (int i = 0; i < (grad ? 1 : count); i++) r[i].v = get(&b, out[i]);
  if (grad) r[1].v = check_squares(&b, squares, out[0]);
  moe_device_set_scratch(dev, NULL, 0);
  for (int i = 0; i < b.count; i++) moe_device_free(dev, b.data[i]);
  return count;
}

/* ---- comparing ------------------------------------------------------------------------------- */

typedef struct {
  double error, worst;  /* relative: of 2-norms, and of one element against its size + the rms */
  int64_t at;           /* of the worst */
  int64_t nan, touched; /* NaN in the segments' rows; elements changed after them */
  double rms;
  bool good;
} verdict;

static double off(const result *got, const result *want, int64_t i, double rms) {
  double w = (double)want->v[i], d = fabs((double)got->v[i] - w);
  return isnan(d) ? INFINITY : d / (fabs(w) + rms + 1e-30);
}

static verdict compare(const result *got, const result *want) {
  int64_t n = got->checked * got->columns;
  double error = 0.0, norm = 0.0;
  verdict v = {0};
  for (int64_t i = 0; i < n; i++) {
    double w = (double)want->v[i], d = (double)got->v[i] - w;
    v.nan += isnan(got->v[i]) != 0;
    error += d * d, norm += w * w;
  }
  v.rms = n > 0 ? sqrt(norm / (double)n) : 0.0;
  v.error = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
  for (int64_t i = 0; i < n; i++) {
    double o = off(got, want, i, v.rms);
    if (o > v.worst) v.worst = o, v.at = i;
  }
  for (int64_t i = n; i < got->rows * got->columns; i++) v.touched += !isnan(got->v[i]);
  v.good = v.error <= got->tolerance && v.worst <= 30.0 * got->tolerance && v.nan + v.touched == 0;
  return v;
}

/* The tile of the first wrong element: 16 x 16 elements to a character, '.' right, 'x' wrong, 'N'
 * NaN, '0' all zero though they should not be; and the first wrong elements. */
static void show_map(const result *got, const result *want, const verdict *v) {
  int64_t n = got->checked * got->columns, first = 0, shown = 0;
  double limit = 30.0 * got->tolerance;
  while (first < n && off(got, want, first, v->rms) <= limit) first++;
  if (first == n) first = v->at;
  int64_t top = first / got->columns / 128 * 128, left = first % got->columns / 192 * 192;
  printf("    tile of row %lld, column %lld (rows count from the buffer's start)\n", (long long)top,
         (long long)left);
  for (int64_t i = top; i < top + 128 && i < got->checked; i += 16) {
    printf("    %6lld ", (long long)i);
    for (int64_t j = left; j < left + 192 && j < got->columns; j += 16) {
      int64_t bad = 0, nan = 0, zero = 0, all = 0;
      for (int64_t r = i; r < i + 16 && r < got->checked; r++)
        for (int64_t c = j; c < j + 16 && c < got->columns; c++, all++) {
          float g = got->v[r * got->columns + c], w = want->v[r * got->columns + c];
          bad += off(got, want, r * got->columns + c, v->rms) > limit;
          nan += isnan(g) != 0;
          zero += g == 0.0f && w != 0.0f;
        }
      putchar(nan > 0 ? 'N' : bad == 0 ? '.' : zero == all ? '0' : 'x');
    }
    putchar('\n');
  }
  for (int64_t i = first; i < n && shown < 6; i++)
    if (off(got, want, i, v->rms) > limit) {
      printf("    [%lld, %lld] is %.6g, not %.6g\n", (long long)(i / got->columns),
             (long long)(i % got->columns), (double)got->v[i], (double)want->v[i]);
      shown++;
    }
}

static void show(product k, const problem *p, const result *got, const result *want,
                 const verdict *v, const char *note) {
  printf("%-13s %-6s D %4lld F %5lld e %2lld C %6lld pad %3lld %-14s %9.2e of %.0e  worst %8.2e at "
         "%lld,%lld  %s\n",
         product_names[k], got->name, (long long)p->s.d, (long long)p->s.f, (long long)p->s.e,
         (long long)p->c, (long long)p->s.pad, note, v->error, got->tolerance, v->worst,
         (long long)(v->at / got->columns), (long long)(v->at % got->columns),
         v->good ? "ok" : "WRONG");
  if (v->nan + v->touched > 0)
    printf("    %lld NaN in the segments' rows, %lld elements written after them\n",
           (long long)v->nan, (long long)v->touched);
  if (!v->good) show_map(got, want, v);
  fflush(stdout);
}

int problem_run(product k, const problem *p, int accumulate, result *r) {
  return run_on(hopper, k, MOE_BF16, p, accumulate, r);
}

int problem_check(product k, const problem *p, int accumulate, const char *quiet) {
  double work = 2.0 * (double)p->c * (double)p->s.d * (double)p->s.f;
  bool by_cpu = quiet != NULL || work < 5e8;
  result want[3], got[3];
  int wrong = 0, count = run_on(by_cpu ? cpu : cublas, k, MOE_F32, p, accumulate, want);
  problem_run(k, p, accumulate, got);
  for (int i = 0; i < count; i++) {
    verdict v = compare(&got[i], &want[i]);
    char note[64];
    snprintf(note, sizeof note, "%s%s%s", by_cpu ? "CPU" : "cuBLAS", accumulate ? ", adds" : "",
             quiet != NULL ? quiet : "");
    if (!v.good || quiet == NULL) show(k, p, &got[i], &want[i], &v, note);
    wrong += !v.good;
    free(got[i].v), free(want[i].v);
  }
  return wrong;
}

static int repeat(product k, const problem *p, int accumulate, int times) {
  result first[3], again[3];
  int differ = 0, count = problem_run(k, p, accumulate, first);
  for (int turn = 0; turn < times; turn++) {
    problem_run(k, p, accumulate, again);
    for (int i = 0; i < count; i++) {
      int64_t n = first[i].checked * first[i].columns, other = 0;
      for (int64_t j = 0; j < n; j++) other += first[i].v[j] != again[i].v[j];
      if (other > 0)
        printf("%s: %s differs in %lld of %lld elements\n", product_names[k], first[i].name,
               (long long)other, (long long)n);
      differ += other > 0;
      free(again[i].v);
    }
  }
  for (int i = 0; i < count; i++) free(first[i].v);
  return differ;
}

int problem_repeat(product k, const problem *p, int times) {
  int differ = 0;
  for (int adds = 0; adds <= (k >= GRAD_W13); adds++) differ += repeat(k, p, adds, times);
  return differ;
}
