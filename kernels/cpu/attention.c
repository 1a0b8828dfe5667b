/* Causal attention in blocks, with one idea: the query heads that share a K/V head are stacked, so
 * that scores, probabilities and all gradients are matrix products of a few hundred rows.
 *
 * A stack is `tokens` consecutive queries times `rep` heads, row = token * rep + head. It walks the
 * keys it can see in blocks; each row's visible keys are one range [begin, end) of the block, so a
 * mask is never stored: what is outside the range is set to zero. Forward keeps the running maximum
 * and sum (online softmax); backward makes the probabilities again from lse.
 *
 * Threads: forward over stacks; backward over (sequence, K/V head, part of its query heads), where
 * every task sums its own dK and dV, added up in a fixed order: the same bits from run to run.
 * Source: Dao et al. 2022, arXiv:2205.14135; multi-query: Shazeer 2019, arXiv:1911.02150. */
#include <math.h>

#include <omp.h>

#include "kernels/cpu/attention_row.h"
#include "kernels/cpu/cpu_blas.h"

enum { STACK_ROWS = 256, STACK_TOKENS = 64, KEY_BLOCK = 256 };

/* One call's tensors and block sizes. */
typedef struct {
  moe_attention_shape s;
  moe_tensor qkv;
  const int32_t *doc_start; /* NULL: one document */
  int64_t rep;              /* query heads in a stack */
  int64_t tokens;           /* queries in a stack */
  int64_t keys;             /* keys in a block */
  int64_t stride;           /* elements from one token of qkv to the next */
  float scale;
} problem;

/* One thread's work memory. [rows, d]: q, out, dout; [rows, keys]: p, dp; [keys, d]: k, v. */
typedef struct {
  float *q, *out, *dout, *p, *dp, *k, *v, *peak, *sum;
} work;

/* Consecutive queries of one sequence, for the heads [head, head + rep) that read K/V head kv. */
typedef struct {
  int64_t batch, head, kv, begin, end, rows;
} stack;

typedef struct {
  const float *data;
  int64_t stride;
} panel;

static problem make_problem(moe_attention_shape s, int64_t rep, moe_tensor qkv,
                            moe_tensor doc_start) {
  problem p = {s, qkv, doc_start.data, rep, 0, 0, (s.heads + 2 * s.kv_heads) * s.head_dim, 0.0f};
  p.tokens = moe_max64(1, moe_min64(s.seq, moe_min64(STACK_TOKENS, STACK_ROWS / rep)));
  p.keys = moe_max64(1, moe_min64(s.seq, KEY_BLOCK));
  p.scale = (float)(1.0 / sqrt((double)s.head_dim));
  return p;
}

/* ---- scratch --------------------------------------------------------------------------------- */

static float *take(float *base, int64_t *used, int64_t count) {
  float *taken = base ? base + *used : NULL;
  *used += (count + 15) / 16 * 16;
  return taken;
}

/* Lay the buffers out in `base` (NULL: only count); returns how many floats they are. */
static int64_t make_work(const problem *p, float *base, work *w) {
  int64_t rows = p->tokens * p->rep, d = p->s.head_dim, used = 0;
  w->q = take(base, &used, rows * d);
  w->out = take(base, &used, rows * d);
  w->dout = take(base, &used, rows * d);
  w->p = take(base, &used, rows * p->keys);
  w->dp = take(base, &used, rows * p->keys);
  w->k = take(base, &used, p->keys * d);
  w->v = take(base, &used, p->keys * d);
  w->peak = take(base, &used, rows);
  w->sum = take(base, &used, rows);
  return used;
}

static int64_t work_floats(const problem *p) {
  work w;
  return make_work(p, NULL, &w);
}

/* In how many parts backward splits the query heads of a K/V head: enough tasks for all threads,
 * evenly or plenty. A divisor of H/G. */
static int64_t backward_parts(moe_attention_shape s, int threads) {
  int64_t rep = s.heads / s.kv_heads, parts = 1;
  for (; parts < rep; parts++) {
    int64_t tasks = s.batch * s.kv_heads * parts;
    if (rep % parts == 0 && (tasks % threads == 0 || tasks >= 4 * threads)) break;
  }
  return parts;
}

static int64_t forward_floats(moe_attention_shape s, int threads) {
  problem p = make_problem(s, s.heads / s.kv_heads, moe_tensor_none(), moe_tensor_none());
  return threads * work_floats(&p);
}

static int64_t backward_floats(moe_attention_shape s, int threads) {
  int64_t parts = backward_parts(s, threads);
  problem p = make_problem(s, s.heads / s.kv_heads / parts, moe_tensor_none(), moe_tensor_none());
  return threads * work_floats(&p) + s.batch * s.kv_heads * parts * 2 * s.seq * s.head_dim;
}

int64_t moe_cpu_attention_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype) {
  (void)dtype;
  int threads = moe_cpu_threads(dev);
  return (int64_t)sizeof(float) *
         moe_max64(forward_floats(shape, threads), backward_floats(shape, threads));
}

static moe_status get_scratch(moe_device *dev, int64_t floats, float **out) {
  *out = moe_device_scratch(dev, floats * (int64_t)sizeof(float));
  if (*out) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY,
                  "kernel scratch is too small: attention needs %lld bytes: plan it with "
                  "moe_attention_scratch",
                  (long long)(floats * (int64_t)sizeof(float)));
}

/* ---- blocks ---------------------------------------------------------------------------------- */

static stack make_stack(const problem *p, int64_t batch, int64_t head, int64_t begin) {
  int64_t end = moe_min64(begin + p->tokens, p->s.seq);
  stack k = {batch, head, head / (p->s.heads / p->s.kv_heads), begin, end, (end - begin) * p->rep};
  return k;
}

/* The first key that token `i` sees. */
static int64_t first_key(const problem *p, int64_t batch, int64_t i) {
  if (!p->doc_start) return 0;
  int64_t start = p->doc_start[batch * p->s.seq + i];
  return moe_min64(moe_max64(start, 0), i);
}

/* The stack's rows of a tensor whose tokens are `stride` apart, the stack's heads consecutive. */
static void load_stack(const problem *p, const stack *k, moe_tensor t, int64_t stride, float *out) {
  int64_t d = p->s.head_dim, width = p->rep * d;
  for (int64_t i = k->begin; i < k->end; i++)
    moe_cpu_load(t, (k->batch * p->s.seq + i) * stride + k->head * d, width,
                 out + (i - k->begin) * width);
}

static void store_stack(const problem *p, const stack *k, moe_tensor t, int64_t stride,
                        const float *values) {
  int64_t d = p->s.head_dim, width = p->rep * d;
  for (int64_t i = k->begin; i < k->end; i++)
    moe_cpu_store(t, (k->batch * p->s.seq + i) * stride + k->head * d, width,
                  values + (i - k->begin) * width);
}

/* n keys (which 0) or values (which 1) from `begin` on: qkv's own memory when that is f32. */
static panel view_keys(const problem *p, const stack *k, int which, int64_t begin, int64_t n,
                       float *buffer) {
  int64_t d = p->s.head_dim, column = (p->s.heads + which * p->s.kv_heads + k->kv) * d;
  int64_t at = (k->batch * p->s.seq + begin) * p->stride + column;
  if (p->qkv.dtype == MOE_F32) return (panel){(const float *)p->qkv.data + at, p->stride};
  for (int64_t i = 0; i < n; i++) moe_cpu_load(p->qkv, at + i * p->stride, d, buffer + i * d);
  return (panel){buffer, d};
}

/* The visible columns of row `r` among the block's n keys from `first` on: [*a, *b). */
static void visible(const problem *p, const stack *k, int64_t r, int64_t first, int64_t n,
                    int64_t *a, int64_t *b) {
  int64_t i = k->begin + r / p->rep;
  *a = moe_min64(moe_max64(first_key(p, k->batch, i) - first, 0), n);
  *b = moe_max64(moe_min64(i + 1 - first, n), *a);
}

static void clear(float *x, int64_t n) {
  memset(x, 0, (size_t)n * sizeof(float));
}

/* ---- forward --------------------------------------------------------------------------------- */

static void soften_block(const problem *p, const stack *k, int64_t first, int64_t n, work *w) {
  int64_t d = p->s.head_dim;
  for (int64_t r = 0; r < k->rows; r++) {
    float *row = w->p + r * n;
    int64_t a, b;
    visible(p, k, r, first, n, &a, &b);
    clear(row, a);
    if (b > a) moe_cpu_soften_row(row + a, b - a, d, &w->peak[r], &w->sum[r], w->out + r * d);
    clear(row + b, n - b);
  }
}

static void forward_stack(const problem *p, const stack *k, work *w, moe_tensor out, float *lse) {
  int64_t d = p->s.head_dim, begin = first_key(p, k->batch, k->begin);
  load_stack(p, k, p->qkv, p->stride, w->q);
  moe_cpu_scale_row(w->q, k->rows * d, p->scale);
  clear(w->out, k->rows * d);
  clear(w->sum, k->rows);
  for (int64_t r = 0; r < k->rows; r++) w->peak[r] = -INFINITY;

  for (int64_t first = begin; first < k->end; first += p->keys) {
    int64_t n = moe_min64(p->keys, k->end - first);
    panel key = view_keys(p, k, 0, first, n, w->k), value = view_keys(p, k, 1, first, n, w->v);
    moe_cpu_product(MOE_NT, k->rows, n, d, w->q, d, key.data, key.stride, 0.0f, w->p, n);
    soften_block(p, k, first, n, w);
    moe_cpu_product(MOE_NN, k->rows, d, n, w->p, n, value.data, value.stride, 1.0f, w->out, d);
  }

  for (int64_t r = 0; r < k->rows; r++) {
    int64_t head = k->head + r % p->rep, i = k->begin + r / p->rep;
    lse[(k->batch * p->s.heads + head) * p->s.seq + i] = w->peak[r] + logf(w->sum[r]);
    moe_cpu_scale_row(w->out + r * d, d, 1.0f / w->sum[r]);
  }
  store_stack(p, k, out, p->s.heads * d, w->out);
}

moe_status moe_cpu_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                             moe_tensor doc_start, moe_tensor out, moe_tensor lse) {
  problem p = make_problem(shape, shape.heads / shape.kv_heads, qkv, doc_start);
  int64_t blocks = (shape.seq + p.tokens - 1) / p.tokens, groups = shape.batch * shape.kv_heads;
  int threads = moe_cpu_threads(dev);
  float *scratch;
  MOE_TRY(get_scratch(dev, forward_floats(shape, threads), &scratch));
#pragma omp parallel num_threads(threads)
  {
    work w;
    make_work(&p, scratch + omp_get_thread_num() * work_floats(&p), &w);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks * groups; i++) { /* the longest stacks first */
      int64_t block = blocks - 1 - i / groups, group = i % groups;
      stack k =
          make_stack(&p, group / shape.kv_heads, group % shape.kv_heads * p.rep, block * p.tokens);
      forward_stack(&p, &k, &w, out, lse.data);
    }
  }
  return MOE_OK;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* Each row's lse into w->peak and sum over d of dout * out into w->sum. w->out holds out. */
static void row_terms(const problem *p, const stack *k, const float *lse, work *w) {
  int64_t d = p->s.head_dim;
  for (int64_t r = 0; r < k->rows; r++) {
    const float *dout = w->dout + r * d, *out = w->out + r * d;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < d; j++) dot += dout[j] * out[j];
    int64_t head = k->head + r % p->rep, i = k->begin + r / p->rep;
    w->peak[r] = lse[(k->batch * p->s.heads + head) * p->s.seq + i];
    w->sum[r] = dot;
  }
}

/* Scores become probabilities (w->p); dP becomes dS = P (dP - sum) (w->dp). */
static void differentiate_block(const problem *p, const stack *k, int64_t first, int64_t n,
                                work *w) {
  for (int64_t r = 0; r < k->rows; r++) {
    float *prob = w->p + r * n, *grad = w->dp + r * n, lse = w->peak[r], sum = w->sum[r];
    int64_t a, b;
    visible(p, k, r, first, n, &a, &b);
    clear(prob, a);
    clear(grad, a);
#pragma omp simd
    for (int64_t j = a; j < b; j++) {
      float e = moe_expf(prob[j] - lse);
      prob[j] = e;
      grad[j] = e * (grad[j] - sum);
    }
    clear(prob + b, n - b);
    clear(grad + b, n - b);
  }
}

/* One stack's dQ, stored; its part of dk and dv [S, d], added. */
static void backward_stack(const problem *p, const stack *k, work *w, moe_tensor dout,
                           moe_tensor out, const float *lse, float *dk, float *dv,
                           moe_tensor dqkv) {
  int64_t d = p->s.head_dim, begin = first_key(p, k->batch, k->begin);
  load_stack(p, k, p->qkv, p->stride, w->q);
  moe_cpu_scale_row(w->q, k->rows * d, p->scale);
  load_stack(p, k, dout, p->s.heads * d, w->dout);
  load_stack(p, k, out, p->s.heads * d, w->out);
  row_terms(p, k, lse, w);
  float *dq = w->out;
  clear(dq, k->rows * d);

  for (int64_t first = begin; first < k->end; first += p->keys) {
    int64_t n = moe_min64(p->keys, k->end - first), at = first * d;
    panel key = view_keys(p, k, 0, first, n, w->k), value = view_keys(p, k, 1, first, n, w->v);
    moe_cpu_product(MOE_NT, k->rows, n, d, w->q, d, key.data, key.stride, 0.0f, w->p, n);
    moe_cpu_product(MOE_NT, k->rows, n, d, w->dout, d, value.data, value.stride, 0.0f, w->dp, n);
    differentiate_block(p, k, first, n, w);
    moe_cpu_product(MOE_TN, n, d, k->rows, w->p, n, w->dout, d, 1.0f, dv + at, d);
    moe_cpu_product(MOE_TN, n, d, k->rows, w->dp, n, w->q, d, 1.0f, dk + at, d);
    moe_cpu_product(MOE_NN, k->rows, d, n, w->dp, n, key.data, key.stride, 1.0f, dq, d);
  }
  moe_cpu_scale_row(dq, k->rows * d, p->scale);
  store_stack(p, k, dqkv, p->stride, dq);
}

/* dqkv's keys and values of one (sequence, K/V head): the sum over its parts of sums [2, S, d]. */
static void store_keys(const problem *p, int64_t group, int64_t parts, float *sums,
                       moe_tensor dqkv) {
  int64_t d = p->s.head_dim, half = p->s.seq * d, kv = group % p->s.kv_heads;
  float *total = sums + group * parts * 2 * half;
  for (int64_t part = 1; part < parts; part++) {
    const float *more = total + part * 2 * half;
#pragma omp simd
    for (int64_t i = 0; i < 2 * half; i++) total[i] += more[i];
  }
  for (int64_t i = 0; i < p->s.seq; i++) {
    int64_t row = (group / p->s.kv_heads * p->s.seq + i) * p->stride + (p->s.heads + kv) * d;
    moe_cpu_store(dqkv, row, d, total + i * d);
    moe_cpu_store(dqkv, row + p->s.kv_heads * d, d, total + half + i * d);
  }
}

moe_status moe_cpu_attention_backward(moe_device *dev, moe_attention_shape shape, moe_tensor dout,
                                      moe_tensor qkv, moe_tensor doc_start, moe_tensor out,
                                      moe_tensor lse, moe_tensor dqkv) {
  int threads = moe_cpu_threads(dev);
  int64_t parts = backward_parts(shape, threads);
  int64_t groups = shape.batch * shape.kv_heads, half = shape.seq * shape.head_dim;
  problem p = make_problem(shape, shape.heads / shape.kv_heads / parts, qkv, doc_start);
  float *scratch;
  MOE_TRY(get_scratch(dev, backward_floats(shape, threads), &scratch));
  float *sums = scratch + threads * work_floats(&p);
#pragma omp parallel num_threads(threads)
  {
    work w;
    make_work(&p, scratch + omp_get_thread_num() * work_floats(&p), &w);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < groups * parts; i++) {
      float *dk = sums + i * 2 * half, *dv = dk + half;
      clear(dk, 2 * half);
      for (int64_t begin = 0; begin < shape.seq; begin += p.tokens) {
        stack k =
            make_stack(&p, i / parts / shape.kv_heads, i % (parts * shape.kv_heads) * p.rep, begin);
        backward_stack(&p, &k, &w, dout, out, lse.data, dk, dv, dqkv);
      }
    }
#pragma omp for
    for (int64_t group = 0; group < groups; group++) store_keys(&p, group, parts, sums, dqkv);
  }
  return MOE_OK;
}
