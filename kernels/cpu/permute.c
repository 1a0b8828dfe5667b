/* Sorting token-expert pairs by expert, and moving rows into and out of that order.
 *
 * The plan is a stable counting sort whose only memory is its outputs: offsets holds the counts,
 * then serves as each expert's cursor while pairs are placed, and is made again from the cursors.
 * The moves read the plan one way each (pair: gather, slot: combine), so every output element has
 * one writer and sums have a fixed order. */
#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_math.h"

enum { CHUNK = 512 }; /* elements of a row held on the stack */

/* ---- plan ------------------------------------------------------------------------------------ */

/* offset[j] = how many pairs expert j has; offset[e] = 0. */
static void count(const int32_t *expert, int64_t pairs, int64_t e, int32_t *offset) {
  memset(offset, 0, (size_t)(e + 1) * sizeof *offset);
  for (int64_t i = 0; i < pairs; i++)
    if (expert[i] >= 0 && expert[i] < e) offset[expert[i]]++;
}

moe_status moe_cpu_permute_plan(moe_device *dev, moe_tensor experts, int64_t pad,
                                moe_tensor offsets, moe_tensor pair, moe_tensor slot) {
  (void)dev;
  int64_t pairs = moe_tensor_count(experts), e = offsets.shape[0] - 1, rows = 0;
  const int32_t *expert = experts.data;
  int32_t *offset = offsets.data, *pair_at = pair.data, *slot_of = slot.data;

  count(expert, pairs, e, offset);
  for (int64_t j = 0; j <= e; j++) { /* counts -> where segments begin */
    int64_t segment = moe_round_up64(offset[j], pad);
    offset[j] = (int32_t)rows;
    rows += segment;
  }
  memset(pair_at, 0xff, (size_t)pair.shape[0] * sizeof *pair_at); /* all -1 */
  for (int64_t i = 0; i < pairs; i++) {
    bool mine = expert[i] >= 0 && expert[i] < e;
    slot_of[i] = mine ? offset[expert[i]]++ : -1;
    if (mine) pair_at[slot_of[i]] = (int32_t)i;
  }
  for (int64_t j = e; j > 0; j--) /* a cursor ended where its segment's padding begins */
    offset[j] = (int32_t)moe_round_up64(offset[j - 1], pad);
  offset[0] = 0;
  return MOE_OK;
}

moe_status moe_cpu_permute_window(moe_device *dev, moe_tensor offsets, int64_t begin, int64_t rows,
                                  moe_tensor out) {
  (void)dev;
  const int32_t *offset = offsets.data;
  int32_t *clipped = out.data;
  for (int64_t j = 0; j < offsets.shape[0]; j++) {
    int64_t at = offset[j] - begin;
    clipped[j] = (int32_t)(at < 0 ? 0 : moe_min64(at, rows));
  }
  return MOE_OK;
}

/* ---- gather ---------------------------------------------------------------------------------- */

moe_status moe_cpu_gather_rows(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                               moe_tensor out) {
  size_t bytes = (size_t)(out.shape[1] * moe_dtype_size(out.dtype));
  const int32_t *pair_at = pair.data;
  const char *from = src.data;
  char *to = out.data;
#pragma omp parallel for num_threads(moe_cpu_threads(dev))
  for (int64_t i = 0; i < out.shape[0]; i++) {
    if (pair_at[i] < 0)
      memset(to + (size_t)i * bytes, 0, bytes);
    else
      memcpy(to + (size_t)i * bytes, from + (size_t)(pair_at[i] / group) * bytes, bytes);
  }
  return MOE_OK;
}

moe_status moe_cpu_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair,
                                moe_tensor out) {
  (void)dev;
  const int32_t *pair_at = pair.data;
  const float *from = values.data;
  float *to = out.data;
  for (int64_t i = 0; i < out.shape[0]; i++) to[i] = pair_at[i] < 0 ? 0.0f : from[pair_at[i]];
  return MOE_OK;
}

/* ---- combine --------------------------------------------------------------------------------- */

/* sum += n <= CHUNK elements of src. */
static void add_part(moe_tensor src, int64_t at, int64_t n, float *sum) {
  float buffer[CHUNK];
  const float *part = moe_cpu_view(src, at, n, buffer);
#pragma omp simd
  for (int64_t c = 0; c < n; c++) sum[c] += part[c];
}

/* Columns [column, column + n) of row r: n <= CHUNK. */
static void combine_chunk(moe_tensor src, const int32_t *slots, int64_t k, int64_t begin, int beta,
                          moe_tensor out, int64_t r, int64_t column, int64_t n) {
  int64_t width = out.shape[1];
  float sum[CHUNK];
  if (beta)
    moe_cpu_load(out, r * width + column, n, sum);
  else
    memset(sum, 0, (size_t)n * sizeof *sum);
  for (int64_t i = 0; i < k; i++) {
    int64_t at = slots[i] - begin;
    if (slots[i] < 0 || at < 0 || at >= src.shape[0]) continue;
    add_part(src, at * width + column, n, sum);
  }
  moe_cpu_store(out, r * width + column, n, sum);
}

moe_status moe_cpu_combine_rows(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                                int beta, moe_tensor out) {
  int64_t k = slot.shape[1], width = out.shape[1];
  const int32_t *slots = slot.data;
#pragma omp parallel for num_threads(moe_cpu_threads(dev))
  for (int64_t r = 0; r < out.shape[0]; r++)
    for (int64_t c = 0; c < width; c += CHUNK)
      combine_chunk(src, slots + r * k, k, begin, beta, out, r, c, moe_min64(CHUNK, width - c));
  return MOE_OK;
}

moe_status moe_cpu_sum_choices(moe_device *dev, moe_tensor terms, moe_tensor out) {
  int64_t k = terms.shape[0] / out.shape[0], width = out.shape[1];
#pragma omp parallel for num_threads(moe_cpu_threads(dev))
  for (int64_t r = 0; r < out.shape[0]; r++) {
    for (int64_t c = 0; c < width; c += CHUNK) {
      int64_t n = moe_min64(CHUNK, width - c);
      float sum[CHUNK] = {0};
      for (int64_t i = 0; i < k; i++) add_part(terms, (r * k + i) * width + c, n, sum);
      moe_cpu_store(out, r * width + c, n, sum);
    }
  }
  return MOE_OK;
}

moe_status moe_cpu_combine_gates(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                                 int beta, moe_tensor out) {
  (void)dev;
  const int32_t *slots = slot.data;
  const float *from = src.data;
  float *to = out.data;
  for (int64_t i = 0; i < moe_tensor_count(slot); i++) {
    int64_t at = slots[i] - begin;
    if (slots[i] >= 0 && at >= 0 && at < src.shape[0])
      to[i] = from[at];
    else if (!beta)
      to[i] = 0.0f;
  }
  return MOE_OK;
}
