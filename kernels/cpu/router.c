/* The router: softmax over experts, the K largest, and the way back.
 *
 * Logits are f32 products; whatever is summed over experts or tokens is summed in f64. Half
 * precision x is converted a small tile at a time on the stack, so the router needs no scratch.
 *
 * Gradient, with p = softmax(l), C the chosen experts, S = sum of p over C, gate_j = p_j / S:
 *     dL/dp_j  = [j in C] (dgate_j - sum_k dgate_k gate_k) / S  +  aux_scale load_j
 *     dL/dl_j  = p_j (dL/dp_j - sum_i p_i dL/dp_i)  +  z_scale 2 lse p_j
 * A dropped assignment has left no trace but its share of S, which counts as a constant. */
#include <float.h>
#include <math.h>

#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_math.h"

enum {
  TILE_ROWS = 32,     /* tokens and */
  TILE_COLUMNS = 256, /* columns of x in a tile: 32 KiB of stack */
  EXPERTS_AT_ONCE = 128
};

/* ---- forward --------------------------------------------------------------------------------- */

/* logits [rows, E] of the tokens from `row` on. */
static void make_logits(moe_tensor x, moe_tensor weight, int64_t row, int64_t rows, float *logits) {
  int64_t width = x.shape[1], e = weight.shape[0];
  float buffer[TILE_ROWS * TILE_COLUMNS];
  for (int64_t c = 0; c < width; c += TILE_COLUMNS) {
    int64_t n = moe_min64(TILE_COLUMNS, width - c);
    moe_cpu_matrix t = moe_cpu_block(x, row, rows, c, n, buffer);
    moe_cpu_product(MOE_NT, rows, e, n, t.data, t.stride, (const float *)weight.data + c, width,
                    c > 0 ? 1.0f : 0.0f, logits, e);
  }
}

/* Logits of one token become probabilities; returns their log-sum-exp. */
static float soften(float *p, int64_t e) {
  float top = -INFINITY;
  double sum = 0.0;
  for (int64_t j = 0; j < e; j++) top = p[j] > top ? p[j] : top;
  for (int64_t j = 0; j < e; j++) sum += exp((double)p[j] - (double)top);
  double lse = (double)top + log(sum);
  for (int64_t j = 0; j < e; j++) p[j] = (float)exp((double)p[j] - lse);
  return (float)lse;
}

/* Insert each expert into the list of the k best so far; an equal one stays behind. `best` holds
 * the list's scores meanwhile, then the gates. */
static void choose(const float *p, const float *bias, int64_t e, int64_t k, int32_t *experts,
                   float *best) {
  for (int64_t j = 0; j < e; j++) {
    float score = bias ? p[j] + bias[j] : p[j];
    int64_t at = moe_min64(j, k);
    while (at > 0 && score > best[at - 1]) at--;
    if (at == k) continue;
    for (int64_t i = moe_min64(j, k - 1); i > at; i--) {
      best[i] = best[i - 1];
      experts[i] = experts[i - 1];
    }
    best[at] = score;
    experts[at] = (int32_t)j;
  }
  double sum = 0.0;
  for (int64_t i = 0; i < k; i++) sum += (double)p[experts[i]];
  for (int64_t i = 0; i < k; i++) /* a bias may choose experts whose p is zero */
    best[i] = (float)(sum < (double)FLT_MIN ? 1.0 / (double)k : (double)p[experts[i]] / sum);
}

/* One group's rows of the three blocks of stats. */
static void sum_group(moe_tensor probs, const float *lse, moe_tensor experts, int64_t begin,
                      int64_t end, float *load, float *mass, float *z) {
  int64_t e = probs.shape[1], k = experts.shape[1];
  const int32_t *expert = experts.data;
  const float *p = probs.data;
  for (int64_t first = 0; first < e; first += EXPERTS_AT_ONCE) {
    int64_t n = moe_min64(EXPERTS_AT_ONCE, e - first), counts[EXPERTS_AT_ONCE] = {0};
    double sums[EXPERTS_AT_ONCE] = {0};
    for (int64_t i = begin * k; i < end * k; i++)
      if (expert[i] >= first && expert[i] < first + n) counts[expert[i] - first]++;
    for (int64_t t = begin; t < end; t++)
      for (int64_t j = 0; j < n; j++) sums[j] += (double)p[t * e + first + j];
    for (int64_t j = 0; j < n; j++) {
      load[first + j] = (float)counts[j];
      mass[first + j] = (float)sums[j];
    }
  }
  double squares = 0.0;
  for (int64_t t = begin; t < end; t++) squares += (double)lse[t] * (double)lse[t];
  *z = (float)squares;
}

moe_status moe_cpu_router(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                          moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                          moe_tensor stats) {
  int64_t tokens = x.shape[0], e = weight.shape[0], k = experts.shape[1];
  int64_t groups = stats.shape[0];
  float *p = probs.data, *load = stats.data;
#pragma omp parallel num_threads(moe_cpu_threads(dev))
  {
#pragma omp for
    for (int64_t row = 0; row < tokens; row += TILE_ROWS) {
      int64_t rows = moe_min64(TILE_ROWS, tokens - row);
      make_logits(x, weight, row, rows, p + row * e);
      for (int64_t t = row; t < row + rows; t++) {
        ((float *)lse.data)[t] = soften(p + t * e, e);
        choose(p + t * e, bias.data, e, k, (int32_t *)experts.data + t * k,
               (float *)gates.data + t * k);
      }
    }
#pragma omp for
    for (int64_t g = 0; g < groups; g++)
      sum_group(probs, lse.data, experts, tokens * g / groups, tokens * (g + 1) / groups,
                load + g * e, load + (groups + g) * e, load + 2 * groups * e + g);
  }
  return MOE_OK;
}

/* ---- drop ------------------------------------------------------------------------------------ */

/* Probabilities are not negative, so their bits order as they do. */
static uint32_t order_bits(float p) {
  uint32_t bits;
  memcpy(&bits, &p, sizeof bits);
  return bits;
}

/* What an expert keeps: everything above `cut`, and of those at `cut` the first `ties`. */
typedef struct {
  uint32_t cut;
  int64_t count, ties;
} allowance;

/* For experts [first, first + n): assignments whose bits reach `cut` (strictly: exceed it). */
static void count_reaching(moe_tensor probs, moe_tensor experts, int64_t first, int64_t n,
                           const uint32_t *cut, bool strictly, int64_t *count) {
  int64_t e = probs.shape[1], k = experts.shape[1];
  const int32_t *expert = experts.data;
  memset(count, 0, (size_t)n * sizeof *count);
  for (int64_t i = 0; i < moe_tensor_count(experts); i++) {
    int64_t j = expert[i] - first;
    if (expert[i] < 0 || j < 0 || j >= n) continue;
    uint32_t bits = order_bits(((const float *)probs.data)[i / k * e + expert[i]]);
    count[j] += bits > cut[j] || (!strictly && bits == cut[j]);
  }
}

/* Find each expert's cut: the largest value that more than `capacity - 1` assignments reach, one
 * bit at a time from the top; 0 when there are fewer. */
static void find_cuts(moe_tensor probs, moe_tensor experts, int64_t first, int64_t n,
                      int64_t capacity, uint32_t *cut, int64_t *ties) {
  uint32_t trial[EXPERTS_AT_ONCE];
  int64_t count[EXPERTS_AT_ONCE];
  memset(cut, 0, (size_t)n * sizeof *cut);
  for (int bit = 31; bit >= 0; bit--) {
    for (int64_t j = 0; j < n; j++) trial[j] = cut[j] | (uint32_t)1 << bit;
    count_reaching(probs, experts, first, n, trial, false, count);
    for (int64_t j = 0; j < n; j++)
      if (count[j] >= capacity) cut[j] = trial[j];
  }
  count_reaching(probs, experts, first, n, cut, true, count);
  for (int64_t j = 0; j < n; j++) ties[j] = capacity - count[j];
}

moe_status moe_cpu_router_drop(moe_device *dev, moe_tensor probs, int64_t capacity,
                               moe_tensor experts, moe_tensor gates, moe_tensor dropped) {
  (void)dev;
  int64_t e = probs.shape[1], k = experts.shape[1], lost = 0;
  int32_t *expert = experts.data;
  for (int64_t first = 0; first < e; first += EXPERTS_AT_ONCE) {
    int64_t n = moe_min64(EXPERTS_AT_ONCE, e - first), ties[EXPERTS_AT_ONCE];
    uint32_t cut[EXPERTS_AT_ONCE];
    find_cuts(probs, experts, first, n, capacity, cut, ties);
    for (int64_t i = 0; i < moe_tensor_count(experts); i++) {
      int64_t j = expert[i] - first;
      if (expert[i] < 0 || j < 0 || j >= n) continue;
      uint32_t bits = order_bits(((const float *)probs.data)[i / k * e + expert[i]]);
      if (bits > cut[j] || (bits == cut[j] && ties[j]-- > 0)) continue;
      expert[i] = -1;
      ((float *)gates.data)[i] = 0.0f;
      lost++;
    }
  }
  *(float *)dropped.data = (float)lost;
  return MOE_OK;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* The sum of p over one token's choice, as its gates remember it; 0 when all were dropped, or when
 * they were equal because p was zero: then no gradient passes. */
static double chosen_mass(const float *p, const int32_t *experts, const float *gates, int64_t k) {
  int64_t largest = 0;
  for (int64_t i = 1; i < k; i++)
    if (gates[i] > gates[largest]) largest = i;
  if (experts[largest] < 0 || gates[largest] <= 0.0f) return 0.0;
  double mass = (double)p[experts[largest]] / (double)gates[largest];
  return mass < (double)FLT_MIN ? 0.0 : mass;
}

/* One token's gradient with respect to its logits. */
static void token_gradient(const float *dgates, const float *p, const int32_t *experts,
                           const float *gates, int64_t e, int64_t k, const float *load,
                           double aux_scale, double z_slope, float *dlogits) {
  double mass = chosen_mass(p, experts, gates, k), mean = 0.0, dot = 0.0;
  for (int64_t i = 0; i < k; i++)
    if (experts[i] >= 0) mean += (double)dgates[i] * (double)gates[i];
  for (int64_t j = 0; j < e; j++) {
    dlogits[j] = (float)(aux_scale * (double)load[j]);
    dot += aux_scale * (double)load[j] * (double)p[j];
  }
  for (int64_t i = 0; i < k && mass > 0.0; i++) {
    if (experts[i] < 0) continue;
    double dp = ((double)dgates[i] - mean) / mass;
    dlogits[experts[i]] += (float)dp;
    dot += dp * (double)p[experts[i]];
  }
  for (int64_t j = 0; j < e; j++)
    dlogits[j] = (float)((double)p[j] * ((double)dlogits[j] - dot + z_slope));
}

/* dx += dlogits weight for the tokens from `row` on. */
static void add_dx(const float *dlogits, moe_tensor weight, int64_t row, int64_t rows,
                   moe_tensor dx) {
  int64_t width = dx.shape[1], e = weight.shape[0];
  float buffer[TILE_ROWS * TILE_COLUMNS];
  for (int64_t c = 0; c < width; c += TILE_COLUMNS) {
    int64_t n = moe_min64(TILE_COLUMNS, width - c), at = row * width + c;
    bool direct = dx.dtype == MOE_F32;
    moe_cpu_matrix t = moe_cpu_block(dx, row, rows, c, n, buffer);
    float *sum = direct ? (float *)dx.data + at : buffer;
    moe_cpu_product(MOE_NN, rows, n, e, dlogits + row * e, e, (const float *)weight.data + c, width,
                    1.0f, sum, t.stride);
    for (int64_t r = 0; r < rows && !direct; r++)
      moe_cpu_store(dx, at + r * width, n, buffer + r * n);
  }
}

/* Columns [c, c + n) of dweight += dlogits^T x, over all tokens in order. */
static void add_dweight(const float *dlogits, moe_tensor x, int64_t c, int64_t n,
                        moe_tensor dweight) {
  int64_t tokens = x.shape[0], width = x.shape[1], e = dweight.shape[0];
  int64_t step = x.dtype == MOE_F32 ? tokens : TILE_ROWS;
  float buffer[TILE_ROWS * TILE_COLUMNS];
  for (int64_t row = 0; row < tokens; row += step) {
    int64_t rows = moe_min64(step, tokens - row);
    moe_cpu_matrix t = moe_cpu_block(x, row, rows, c, n, buffer);
    moe_cpu_product(MOE_TN, e, n, rows, dlogits + row * e, e, t.data, t.stride, 1.0f,
                    (float *)dweight.data + c, width);
  }
}

moe_status moe_cpu_router_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                   moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                   moe_tensor experts, moe_tensor gates, moe_tensor load,
                                   float aux_scale, float z_scale, moe_tensor dlogits,
                                   moe_tensor dx, moe_tensor dweight) {
  int64_t tokens = x.shape[0], width = x.shape[1], e = weight.shape[0], k = experts.shape[1];
  int64_t group = tokens / load.shape[0];
  float *grad = dlogits.data;
#pragma omp parallel num_threads(moe_cpu_threads(dev))
  {
#pragma omp for
    for (int64_t row = 0; row < tokens; row += TILE_ROWS) {
      int64_t rows = moe_min64(TILE_ROWS, tokens - row);
      for (int64_t t = row; t < row + rows; t++)
        token_gradient((const float *)dgates.data + t * k, (const float *)probs.data + t * e,
                       (const int32_t *)experts.data + t * k, (const float *)gates.data + t * k, e,
                       k, (const float *)load.data + t / group * e, (double)aux_scale,
                       2.0 * (double)z_scale * (double)((const float *)lse.data)[t], grad + t * e);
      add_dx(grad, weight, row, rows, dx);
    }
#pragma omp for
    for (int64_t c = 0; c < width; c += TILE_COLUMNS)
      add_dweight(grad, x, c, moe_min64(TILE_COLUMNS, width - c), dweight);
  }
  return MOE_OK;
}
