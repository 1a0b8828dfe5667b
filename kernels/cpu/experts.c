/* The experts' SwiGLU networks over rows sorted by expert.
 *
 * Four of the five ops are one thing: rows of each expert's segment times that expert's weights,
 * then a pass over the result while it is in cache. grouped_product does it in panels of rows,
 * which threads share out; the pass is a `finish` function (SwiGLU, its derivative, or none).
 * f32 tensors are used where they lie. Half-precision weights are converted once per expert, rows
 * panel by panel, into scratch.
 *
 * Rows are panels of the segment, so the bits do not depend on the number of threads.
 * Source: Shazeer 2020, arXiv:2002.05202. */
#include <omp.h>

#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_math.h"

enum {
  PANEL_ROWS = 256, /* rows of a product; also the terms of one step of a weight gradient */
  CHUNK = 256       /* elements of a row that a pass holds on the stack */
};

typedef struct grouped grouped;

/* One of the four products, and what its finish needs. */
struct grouped {
  moe_gemm_form form;
  moe_tensor left;    /* [C, k] */
  moe_tensor weights; /* [e, n, k] for MOE_NT, [e, k, n] for MOE_NN */
  moe_tensor result;  /* [C, n]: where f32 products go, and what a NULL finish stores */
  int64_t n, k;
  const int32_t *offsets;
  int64_t experts;
  const float *gates; /* for the finish */
  moe_tensor gu, a;
  moe_gu_kind kind;
  float *dgates;
  /* After the products of rows [row, row + rows), whose f32 values lie in `values`. */
  void (*finish)(const grouped *g, int64_t row, int64_t rows, float *values);
};

/* ---- scratch --------------------------------------------------------------------------------- */

/* Half precision: one expert's weights, and for each thread a panel of both sides of a product; or
 * for a weight gradient one panel of both sides, and the sums of one expert's bf16 gradient. */
static int64_t weight_floats(int64_t n, int64_t k) {
  return (n * k + 15) / 16 * 16;
}

static int64_t panel_floats(int64_t n, int64_t k) {
  return PANEL_ROWS * ((n + k + 15) / 16 * 16);
}

int64_t moe_cpu_expert_scratch(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                               moe_dtype dtype) {
  (void)rows;
  if (dtype == MOE_F32) return 0;
  return (int64_t)sizeof(float) *
         (weight_floats(2 * ffn, hidden) + moe_cpu_threads(dev) * panel_floats(2 * ffn, hidden));
}

static moe_status get_scratch(moe_device *dev, moe_dtype dtype, int64_t floats, float **out) {
  *out = NULL;
  if (dtype == MOE_F32) return MOE_OK;
  *out = moe_device_scratch(dev, floats * (int64_t)sizeof(float));
  if (*out) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY,
                  "kernel scratch is too small: an expert product needs %lld bytes: plan it with "
                  "moe_expert_scratch",
                  (long long)(floats * (int64_t)sizeof(float)));
}

/* ---- products -------------------------------------------------------------------------------- */

/* Rows [row, row + rows) of one expert. */
static void one_panel(const grouped *g, int64_t row, int64_t rows, const float *weights,
                      float *panel) {
  const float *left = moe_cpu_view(g->left, row * g->k, rows * g->k, panel);
  float *values = panel + PANEL_ROWS * g->k;
  if (g->result.dtype == MOE_F32) values = (float *)g->result.data + row * g->n;
  moe_cpu_product(g->form, rows, g->n, g->k, left, g->k, weights, g->form == MOE_NT ? g->k : g->n,
                  0.0f, values, g->n);
  if (g->finish)
    g->finish(g, row, rows, values);
  else if (g->result.dtype != MOE_F32)
    moe_cpu_store(g->result, row * g->n, rows * g->n, values);
}

static moe_status grouped_product(moe_device *dev, const grouped *g) {
  int threads = moe_cpu_threads(dev);
  int64_t size = g->n * g->k, each = panel_floats(g->n, g->k);
  bool half = g->weights.dtype != MOE_F32;
  float *scratch;
  MOE_TRY(get_scratch(dev, g->weights.dtype, weight_floats(g->n, g->k) + threads * each, &scratch));
#pragma omp parallel num_threads(threads)
  {
    float *panel = half ? scratch + weight_floats(g->n, g->k) + omp_get_thread_num() * each : NULL;
    for (int64_t j = 0; j < g->experts; j++) {
      int64_t begin = g->offsets[j], end = g->offsets[j + 1];
      if (begin >= end) continue;
      const float *weights = half ? scratch : (const float *)g->weights.data + j * size;
      if (half) {
#pragma omp for
        for (int64_t i = 0; i < size; i += 4096)
          moe_cpu_load(g->weights, j * size + i, moe_min64(4096, size - i), scratch + i);
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t row = begin; row < end; row += PANEL_ROWS)
        one_panel(g, row, moe_min64(PANEL_ROWS, end - row), weights, panel);
      if (half) {
#pragma omp barrier
      }
    }
  }
  return MOE_OK;
}

/* ---- SwiGLU ---------------------------------------------------------------------------------- */

/* n elements of one row: a, and in place of gate and up its derivatives with respect to them.
 *     h = silu(g) u, s = sigmoid(g):   dh/dg = s (1 + g (1 - s)) u,   dh/du = g s */
static void make_slopes(int64_t n, float scale, float *gate, float *up, float *a) {
#pragma omp simd
  for (int64_t f = 0; f < n; f++) {
    float g = gate[f], u = up[f], s = moe_sigmoidf(g);
    a[f] = scale * moe_swigluf(g, s, u);
    gate[f] = scale * u * s * (1.0f + g * (1.0f - s));
    up[f] = scale * g * s;
  }
}

static void make_a(int64_t n, float scale, const float *gate, const float *up, float *a) {
#pragma omp simd
  for (int64_t f = 0; f < n; f++) a[f] = scale * moe_swigluf(gate[f], moe_sigmoidf(gate[f]), up[f]);
}

/* Columns [i, i + n) of row r, at `gate` and `up`. Values are stored first and read back, so that
 * backward, which has only what is stored, makes the same a. */
static void finish_up_chunk(const grouped *g, int64_t r, int64_t i, int64_t n, float *gate,
                            float *up) {
  int64_t ffn = g->n / 2, at = r * g->n + i;
  bool half = g->gu.dtype != MOE_F32, slopes = g->kind == MOE_GU_SLOPES;
  float hidden[CHUNK], *a = half ? hidden : (float *)g->a.data + r * ffn + i;
  if (slopes) make_slopes(n, g->gates[r], gate, up, a);
  if (half) {
    moe_cpu_store(g->gu, at, n, gate);
    moe_cpu_store(g->gu, at + ffn, n, up);
  }
  if (half && !slopes) {
    moe_cpu_load(g->gu, at, n, gate);
    moe_cpu_load(g->gu, at + ffn, n, up);
  }
  if (!slopes) make_a(n, g->gates[r], gate, up, a);
  if (half) moe_cpu_store(g->a, r * ffn + i, n, hidden);
}

static void finish_up(const grouped *g, int64_t row, int64_t rows, float *values) {
  int64_t ffn = g->n / 2;
  for (int64_t r = row; r < row + rows; r++, values += g->n)
    for (int64_t i = 0; i < ffn; i += CHUNK)
      finish_up_chunk(g, r, i, moe_min64(CHUNK, ffn - i), values + i, values + ffn + i);
}

moe_status moe_cpu_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                             moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  grouped g = {.form = MOE_NT,
               .left = x,
               .weights = w13,
               .result = gu,
               .n = gu.shape[1],
               .k = x.shape[1],
               .offsets = offsets.data,
               .experts = offsets.shape[0] - 1,
               .gates = gates.data,
               .kind = kind,
               .gu = gu,
               .a = a,
               .finish = finish_up};
  return grouped_product(dev, &g);
}

moe_status moe_cpu_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                               moe_tensor y) {
  grouped g = {.form = MOE_NT,
               .left = a,
               .weights = w2,
               .result = y,
               .n = y.shape[1],
               .k = a.shape[1],
               .offsets = offsets.data,
               .experts = offsets.shape[0] - 1};
  return grouped_product(dev, &g);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* n elements of one row: gate and up become their gradients, da becomes a. Returns the sum of
 * da * silu(gate) * up. */
static float differentiate(int64_t n, float scale, float *gate, float *up, float *da) {
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int64_t f = 0; f < n; f++) {
    float g = gate[f], u = up[f], grad = da[f];
    float s = moe_sigmoidf(g), h = moe_swigluf(g, s, u);
    dot += grad * h;
    grad *= scale;
    gate[f] = grad * u * s * (1.0f + g * (1.0f - s));
    up[f] = grad * g * s;
    da[f] = scale * h;
  }
  return dot;
}

/* The same where gate and up hold a's derivatives: then da stays and there is no sum. */
static float apply_slopes(int64_t n, float *gate, float *up, const float *da) {
#pragma omp simd
  for (int64_t f = 0; f < n; f++) gate[f] *= da[f], up[f] *= da[f];
  return 0.0f;
}

/* Columns [i, i + n) of row r, whose da lies in `da`. */
static float finish_chunk(const grouped *g, int64_t r, int64_t i, int64_t n, float *da) {
  int64_t ffn = g->n, at = r * 2 * ffn + i;
  bool half = g->gu.dtype != MOE_F32, slopes = g->kind == MOE_GU_SLOPES;
  float gate_part[CHUNK], up_part[CHUNK];
  float *gate = half ? gate_part : (float *)g->gu.data + at, *up = half ? up_part : gate + ffn;
  if (half) {
    moe_cpu_load(g->gu, at, n, gate);
    moe_cpu_load(g->gu, at + ffn, n, up);
  }
  float dot = slopes ? apply_slopes(n, gate, up, da) : differentiate(n, g->gates[r], gate, up, da);
  if (half) {
    moe_cpu_store(g->gu, at, n, gate);
    moe_cpu_store(g->gu, at + ffn, n, up);
  }
  if (half && !slopes) moe_cpu_store(g->a, r * ffn + i, n, da); /* f32: da lies where a belongs */
  return dot;
}

static void finish_down_backward(const grouped *g, int64_t row, int64_t rows, float *values) {
  for (int64_t r = row; r < row + rows; r++) {
    double dot = 0.0;
    for (int64_t i = 0; i < g->n; i += CHUNK)
      dot +=
          (double)finish_chunk(g, r, i, moe_min64(CHUNK, g->n - i), values + (r - row) * g->n + i);
    if (g->dgates) g->dgates[r] = (float)dot;
  }
}

moe_status moe_cpu_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                        moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                        moe_tensor gu, moe_tensor a, moe_tensor dgates) {
  grouped g = {.form = MOE_NN,
               .left = dy,
               .weights = w2,
               .result = a, /* f32: da is made where a will be */
               .n = a.shape[1],
               .k = dy.shape[1],
               .offsets = offsets.data,
               .experts = offsets.shape[0] - 1,
               .gates = gates.data,
               .gu = gu,
               .a = a,
               .kind = kind,
               .dgates = dgates.data,
               .finish = finish_down_backward};
  return grouped_product(dev, &g);
}

/* In f64: rows are short, and there are few of them. */
static float dot_of_rows(moe_tensor x, int64_t i, moe_tensor y, int64_t j) {
  int64_t width = x.shape[1];
  double sum = 0.0;
  for (int64_t c = 0; c < width; c += CHUNK) {
    int64_t n = moe_min64(CHUNK, width - c);
    float x_part[CHUNK], y_part[CHUNK];
    const float *p = moe_cpu_view(x, i * width + c, n, x_part);
    const float *q = moe_cpu_view(y, j * width + c, n, y_part);
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += (double)p[k] * (double)q[k];
  }
  return (float)sum;
}

moe_status moe_cpu_gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                                  moe_tensor gates, moe_tensor dgates) {
  const int32_t *slots = slot.data;
  const float *gate = gates.data;
  float *out = dgates.data;
#pragma omp parallel for num_threads(moe_cpu_threads(dev))
  for (int64_t i = 0; i < moe_tensor_count(slot); i++) {
    bool known = slots[i] >= 0 && slots[i] < y.shape[0] && gate[i] != 0.0f;
    out[i] = known ? dot_of_rows(dy, i / slot.shape[1], y, slots[i]) / gate[i] : 0.0f;
  }
  return MOE_OK;
}

moe_status moe_cpu_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                      moe_tensor w13, moe_tensor dx) {
  grouped g = {.form = MOE_NN,
               .left = dgu,
               .weights = w13,
               .result = dx,
               .n = dx.shape[1],
               .k = dgu.shape[1],
               .offsets = offsets.data,
               .experts = offsets.shape[0] - 1};
  return grouped_product(dev, &g);
}

/* ---- weight gradients ------------------------------------------------------------------------ */

enum { GRAD_ROWS = 256 }; /* rows of dw that one thread makes at a time */

/* dw (+)= left^T right over `rows` rows, by all threads of the region; each owns blocks of dw. */
static void share_product(const float *left, int64_t m, const float *right, int64_t n, int64_t rows,
                          float beta, float *dw) {
#pragma omp for schedule(dynamic) nowait
  for (int64_t i = 0; i < m; i += GRAD_ROWS)
    moe_cpu_product(MOE_TN, moe_min64(GRAD_ROWS, m - i), n, rows, left + i, m, right, n, beta,
                    dw + i * n, n);
}

/* The same for half precision, panel by panel through scratch [PANEL_ROWS, m + n]. */
static void share_converted(moe_tensor left, moe_tensor right, int64_t begin, int64_t end,
                            float beta, float *scratch, float *dw) {
  int64_t m = left.shape[1], n = right.shape[1];
  for (int64_t row = begin; row < end; row += PANEL_ROWS, beta = 1.0f) {
    int64_t rows = moe_min64(PANEL_ROWS, end - row);
    float *right_panel = scratch + PANEL_ROWS * m;
#pragma omp for
    for (int64_t r = 0; r < rows; r++) {
      moe_cpu_load(left, (row + r) * m, m, scratch + r * m);
      moe_cpu_load(right, (row + r) * n, n, right_panel + r * n);
    }
    share_product(scratch, m, right_panel, n, rows, beta, dw);
#pragma omp barrier
  }
}

/* Expert j of a bf16 dw (+)= sums f32 [size], rounded once, by all threads of the region. */
static void share_rounding(moe_tensor dw, int64_t j, int64_t size, int accumulate, float *sums) {
#pragma omp for
  for (int64_t i = 0; i < size; i += CHUNK) {
    int64_t n = moe_min64(CHUNK, size - i);
    float before[CHUNK];
    if (accumulate) {
      moe_cpu_load(dw, j * size + i, n, before);
      for (int64_t k = 0; k < n; k++) sums[i + k] += before[k];
    }
    moe_cpu_store(dw, j * size + i, n, sums + i);
  }
}

moe_status moe_cpu_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                      moe_tensor offsets, int accumulate, moe_tensor dw,
                                      moe_tensor squares) {
  int64_t m = left.shape[1], n = right.shape[1], experts = offsets.shape[0] - 1;
  const int32_t *offset = offsets.data;
  bool rounded = left.dtype != MOE_F32 && dw.dtype != MOE_F32;
  float *scratch;
  MOE_TRY(get_scratch(dev, left.dtype, panel_floats(m, n) + (rounded ? weight_floats(m, n) : 0),
                      &scratch));
#pragma omp parallel num_threads(moe_cpu_threads(dev))
  for (int64_t j = 0; j < experts; j++) {
    int64_t begin = offset[j], end = offset[j + 1], bytes = m * n * moe_dtype_size(dw.dtype);
    char *out = (char *)dw.data + j * bytes;
    float *grad = (float *)out, beta = accumulate ? 1.0f : 0.0f;
    if (begin >= end) {
#pragma omp single nowait
      if (!accumulate) memset(out, 0, (size_t)bytes);
    } else if (rounded) {
      float *sums = scratch + panel_floats(m, n);
      share_converted(left, right, begin, end, 0.0f, scratch, sums);
      share_rounding(dw, j, m * n, accumulate, sums);
    } else if (left.dtype == MOE_F32) {
      share_product((const float *)left.data + begin * m, m, (const float *)right.data + begin * n,
                    n, end - begin, beta, grad);
    } else {
      share_converted(left, right, begin, end, beta, scratch, grad);
    }
  }
  return moe_tensor_present(squares) ? moe_cpu_sum_squares(dev, dw, squares) : MOE_OK;
}
