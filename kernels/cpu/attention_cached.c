/* Attention over a cache of keys and values, for generation.
 *
 * The same idea as attention.c: the query heads that share a K/V head are stacked, row = token *
 * rep + head, so that a block of keys is two matrix products. The new tokens' keys and values are
 * put into the cache first, so that all keys lie in one place.
 *
 * A long cache and few queries are few stacks for many threads; a stack is therefore cut along the
 * keys into spans. Each span keeps its own running maximum, sum and output; they are merged in span
 * order. The cut depends on the sizes alone, so the bits do not depend on the number of threads.
 * Source: Dao et al. 2022, arXiv:2205.14135; "flash-decoding", Dao et al. 2023. */
#include <math.h>

#include <omp.h>

#include "kernels/cpu/attention_row.h"
#include "kernels/cpu/cpu_blas.h"

enum { STACK_ROWS = 256, STACK_TOKENS = 64, KEY_BLOCK = 256, SPAN_KEYS = 4096, MOST_SPANS = 16 };

/* One call. */
typedef struct {
  moe_attention_shape s;
  int64_t room, rep;
  int64_t tokens; /* queries in a stack */
  int64_t blocks; /* stacks of one sequence and K/V head */
  int64_t spans;  /* parts of a stack */
  moe_tensor qkv, keys, values, out;
  const int32_t *lengths;
  float scale;
} problem;

/* One part of a stack: [rows, d] out; peak and sum [rows]. */
typedef struct {
  float *out, *peak, *sum;
} part;

/* One thread's work: q [rows, d], p [rows, KEY_BLOCK], k and v [KEY_BLOCK, d]. */
typedef struct {
  float *q, *p, *k, *v;
} work;

static int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

static problem make_problem(moe_attention_shape s, int64_t room) {
  problem p = {.s = s, .room = room, .rep = s.heads / s.kv_heads};
  p.tokens = clamp(STACK_ROWS / p.rep, 1, clamp(s.seq, 1, STACK_TOKENS));
  p.blocks = (s.seq + p.tokens - 1) / p.tokens;
  /* long chunks have enough stacks */
  p.spans = p.blocks > 1 ? 1 : clamp((room + SPAN_KEYS - 1) / SPAN_KEYS, 1, MOST_SPANS);
  p.scale = (float)(1.0 / sqrt((double)s.head_dim));
  return p;
}

/* ---- scratch --------------------------------------------------------------------------------- */

static int64_t part_floats(const problem *p) {
  return p->tokens * p->rep * (p->s.head_dim + 2);
}

static int64_t work_floats(const problem *p) {
  int64_t rows = p->tokens * p->rep, d = p->s.head_dim;
  return rows * (d + KEY_BLOCK) + 2 * KEY_BLOCK * d;
}

static int64_t parts_of(const problem *p) {
  return p->s.batch * p->s.kv_heads * p->blocks * p->spans;
}

static int64_t scratch_bytes(const problem *p, int threads) {
  return (int64_t)sizeof(float) * (threads * work_floats(p) + parts_of(p) * part_floats(p));
}

int64_t moe_cpu_attention_cached_scratch(moe_device *dev, moe_attention_shape shape, int64_t room,
                                         moe_dtype dtype) {
  (void)dtype;
  problem p = make_problem(shape, room);
  return scratch_bytes(&p, moe_cpu_threads(dev));
}

static work make_work(const problem *p, float *base) {
  int64_t rows = p->tokens * p->rep, d = p->s.head_dim;
  work w;
  w.q = base;
  w.p = w.q + rows * d;
  w.k = w.p + rows * KEY_BLOCK;
  w.v = w.k + KEY_BLOCK * d;
  return w;
}

static part make_part(const problem *p, float *base, int64_t index) {
  int64_t rows = p->tokens * p->rep;
  part x;
  x.out = base + index * part_floats(p);
  x.peak = x.out + rows * p->s.head_dim;
  x.sum = x.peak + rows;
  return x;
}

/* ---- the cache ------------------------------------------------------------------------------- */

static int64_t position(const problem *p, int64_t b, int64_t i) {
  return p->lengths[b] + i;
}

/* Token i of sequence b: its keys and values, all heads, to its position. */
static void append(const problem *p, int64_t b, int64_t i) {
  int64_t width = p->s.kv_heads * p->s.head_dim, at = position(p, b, i);
  if (at < 0 || at >= p->room) return;
  int64_t size = moe_dtype_size(p->qkv.dtype);
  const char *from =
      (const char *)p->qkv.data +
      ((b * p->s.seq + i + 1) * (p->s.heads + 2 * p->s.kv_heads) * p->s.head_dim - 2 * width) *
          size;
  int64_t to = (b * p->room + at) * width * size;
  memcpy((char *)p->keys.data + to, from, (size_t)(width * size));
  memcpy((char *)p->values.data + to, from + width * size, (size_t)(width * size));
}

typedef struct {
  const float *data;
  int64_t stride;
} panel;

/* n keys or values of K/V head g from `first` on: the cache's own memory when that is f32. */
static panel view(const problem *p, moe_tensor cache, int64_t b, int64_t g, int64_t first,
                  int64_t n, float *buffer) {
  int64_t d = p->s.head_dim, stride = p->s.kv_heads * d;
  int64_t at = (b * p->room + first) * stride + g * d;
  if (cache.dtype == MOE_F32) return (panel){(const float *)cache.data + at, stride};
  for (int64_t i = 0; i < n; i++) moe_cpu_load(cache, at + i * stride, d, buffer + i * d);
  return (panel){buffer, d};
}

/* ---- one part -------------------------------------------------------------------------------- */

/* Queries [begin, end) of sequence b for K/V head g. */
typedef struct {
  int64_t b, g, begin, end, rows;
} stack;

/* Part numbers run over spans, then blocks, K/V heads and sequences. Rows past room are cut off. */
static stack stack_of(const problem *p, int64_t index) {
  int64_t block = index / p->spans % p->blocks, group = index / p->spans / p->blocks;
  stack k = {.b = group / p->s.kv_heads, .g = group % p->s.kv_heads};
  int64_t length = p->lengths[k.b];
  k.begin = clamp(-length, block * p->tokens, p->s.seq);
  k.end =
      clamp(clamp((block + 1) * p->tokens, 0, p->s.seq), 0, clamp(p->room - length, 0, p->s.seq));
  if (k.end < k.begin) k.end = k.begin;
  k.rows = (k.end - k.begin) * p->rep;
  return k;
}

static void load_queries(const problem *p, const stack *k, float *q) {
  int64_t d = p->s.head_dim, stride = (p->s.heads + 2 * p->s.kv_heads) * d, width = p->rep * d;
  for (int64_t i = k->begin; i < k->end; i++)
    moe_cpu_load(p->qkv, (k->b * p->s.seq + i) * stride + k->g * width, width,
                 q + (i - k->begin) * width);
  moe_cpu_scale_row(q, k->rows * d, p->scale);
}

/* Scores of keys [first, first + n) become probabilities; what a row does not see becomes 0. */
static void soften(const problem *p, const stack *k, int64_t first, int64_t n, float *scores,
                   part *x) {
  int64_t d = p->s.head_dim;
  for (int64_t r = 0; r < k->rows; r++) {
    float *row = scores + r * n;
    int64_t seen = clamp(position(p, k->b, k->begin + r / p->rep) + 1 - first, 0, n);
    if (seen > 0) moe_cpu_soften_row(row, seen, d, &x->peak[r], &x->sum[r], x->out + r * d);
    memset(row + seen, 0, (size_t)(n - seen) * sizeof *row);
  }
}

static void attend(const problem *p, int64_t index, work *w, part *x) {
  stack k = stack_of(p, index);
  int64_t d = p->s.head_dim, keys = position(p, k.b, k.end); /* that any row sees */
  int64_t span = (keys + p->spans - 1) / p->spans, begin = index % p->spans * span;
  int64_t end = clamp(begin + span, 0, keys);
  memset(x->out, 0, (size_t)(k.rows * d) * sizeof *x->out);
  memset(x->sum, 0, (size_t)k.rows * sizeof *x->sum);
  for (int64_t r = 0; r < k.rows; r++) x->peak[r] = -INFINITY;
  if (k.rows == 0 || begin >= end) return;
  load_queries(p, &k, w->q);
  for (int64_t first = begin; first < end; first += KEY_BLOCK) {
    int64_t n = moe_min64(KEY_BLOCK, end - first);
    panel key = view(p, p->keys, k.b, k.g, first, n, w->k);
    panel value = view(p, p->values, k.b, k.g, first, n, w->v);
    moe_cpu_product(MOE_NT, k.rows, n, d, w->q, d, key.data, key.stride, 0.0f, w->p, n);
    soften(p, &k, first, n, w->p, x);
    moe_cpu_product(MOE_NN, k.rows, d, n, w->p, n, value.data, value.stride, 1.0f, x->out, d);
  }
}

/* The parts of one stack, in order, into out; the first part's memory takes the sum. */
static void merge(const problem *p, float *parts, int64_t first) {
  stack k = stack_of(p, first);
  int64_t d = p->s.head_dim, width = p->rep * d;
  part total = make_part(p, parts, first);
  for (int64_t r = 0; r < k.rows; r++) {
    float *out = total.out + r * d, top = total.peak[r];
    for (int64_t i = 1; i < p->spans; i++) top = fmaxf(top, make_part(p, parts, first + i).peak[r]);
    float shrink = moe_expf(total.peak[r] - top), sum = total.sum[r] * shrink;
    moe_cpu_scale_row(out, d, shrink);
    for (int64_t i = 1; i < p->spans; i++) {
      part x = make_part(p, parts, first + i);
      shrink = moe_expf(x.peak[r] - top);
      sum += x.sum[r] * shrink;
#pragma omp simd
      for (int64_t c = 0; c < d; c++) out[c] += shrink * x.out[r * d + c];
    }
    moe_cpu_scale_row(out, d, 1.0f / sum);
  }
  for (int64_t i = k.begin; i < k.end; i++)
    moe_cpu_store(p->out, (k.b * p->s.seq + i) * p->s.heads * d + k.g * width, width,
                  total.out + (i - k.begin) * width);
}

moe_status moe_cpu_attention_cached(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                    moe_tensor positions, moe_tensor table, moe_tensor keys,
                                    moe_tensor values, moe_tensor lengths, moe_tensor out) {
  problem p = make_problem(shape, keys.shape[1]);
  p.qkv = qkv, p.keys = keys, p.values = values, p.out = out, p.lengths = lengths.data;
  int threads = moe_cpu_threads(dev);
  int64_t bytes = scratch_bytes(&p, threads);
  float *scratch = moe_device_scratch(dev, bytes);
  if (!scratch)
    return moe_fail(MOE_NO_MEMORY,
                    "kernel scratch is too small: attention over a cache needs %lld bytes: plan "
                    "it with moe_attention_cached_scratch",
                    (long long)bytes);
  if (moe_tensor_present(table))
    MOE_TRY(moe_cpu_rope(dev, qkv, positions, table, shape.heads, shape.kv_heads, 1));
  float *parts = scratch + threads * work_floats(&p);
#pragma omp parallel num_threads(threads)
  {
    work w = make_work(&p, scratch + omp_get_thread_num() * work_floats(&p));
#pragma omp for
    for (int64_t i = 0; i < shape.batch * shape.seq; i++) append(&p, i / shape.seq, i % shape.seq);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < parts_of(&p); i++) {
      part x = make_part(&p, parts, i);
      attend(&p, i, &w, &x);
    }
#pragma omp for
    for (int64_t i = 0; i < parts_of(&p); i += p.spans) merge(&p, parts, i);
  }
  return MOE_OK;
}
