/* A small checkpoint whose every bit is a function of (role, tensor, step, element), so that any
 * rank can write any part of it and any test can tell what a loaded element must be. */
#ifndef MOE_TESTS_CHECKPOINT_SAMPLE_H
#define MOE_TESTS_CHECKPOINT_SAMPLE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"

typedef struct {
  const char *name;
  moe_dtype dtype; /* of the param; masters and moments are f32 */
  int dims;
  int64_t shape[2];
} sample_tensor;

#define SAMPLE_EXPERT "model.layers.0.block_sparse_moe.experts."
static const sample_tensor sample_tensors[] = {
    {"model.embed_tokens.weight", MOE_BF16, 2, {37, 16}},
    {"model.norm.weight", MOE_F32, 1, {16, 1}},
    {"model.layers.0.self_attn.q_proj.weight", MOE_F16, 2, {70, 301}},
    {"model.layers.0.block_sparse_moe.gate.weight", MOE_F32, 2, {3, 16}},
    {SAMPLE_EXPERT "0.w1.weight", MOE_BF16, 2, {24, 16}},
    {SAMPLE_EXPERT "1.w1.weight", MOE_BF16, 2, {24, 16}},
    {SAMPLE_EXPERT "2.w1.weight", MOE_BF16, 2, {24, 16}},
    {"one.element", MOE_F64, 1, {1, 1}},
    {"whole.numbers", MOE_I32, 1, {1001, 1}},
};
enum { SAMPLE_TENSORS = sizeof sample_tensors / sizeof sample_tensors[0] };

static inline uint64_t sample_mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static inline uint64_t sample_key(int a, int b, int64_t c) {
  return sample_mix(sample_mix(sample_mix((uint64_t)a) + (uint64_t)b) + (uint64_t)c);
}

static inline int64_t sample_total(int tensor) {
  const sample_tensor *t = &sample_tensors[tensor];
  return t->shape[0] * (t->dims == 2 ? t->shape[1] : 1);
}

/* Elements [begin, begin + count) of a tensor with room for its data, which is zero. */
static inline moe_piece sample_piece(int role, int tensor, int64_t begin, int64_t count) {
  const sample_tensor *t = &sample_tensors[tensor];
  moe_piece p = {.role = (moe_role)role, .dims = t->dims, .begin = begin, .count = count};
  p.dtype = role == MOE_ROLE_PARAM ? t->dtype : MOE_F32;
  snprintf(p.name, sizeof p.name, "%s", t->name);
  memcpy(p.shape, t->shape, sizeof p.shape);
  p.data = calloc((size_t)count + 1, (size_t)moe_dtype_size(p.dtype));
  return p;
}

/* What the piece must hold: any bits, those of NaNs too. */
static inline void sample_fill(moe_piece *p, int tensor, int64_t step) {
  /* an f32 param is its own master */
  bool is_master = p->role == MOE_ROLE_PARAM && p->dtype == MOE_F32;
  uint64_t key = sample_key(is_master ? MOE_ROLE_MASTER : (int)p->role, tensor, step);
  size_t size = (size_t)moe_dtype_size(p->dtype);
  for (int64_t i = 0; i < p->count; i++) {
    uint64_t bits = sample_mix(key + (uint64_t)(p->begin + i));
    memcpy((char *)p->data + (size_t)i * size, &bits, size);
  }
}

static inline bool sample_is_right(const moe_piece *p, int tensor, int64_t step) {
  moe_piece expected = sample_piece((int)p->role, tensor, p->begin, p->count);
  sample_fill(&expected, tensor, step);
  size_t bytes = (size_t)(p->count * moe_dtype_size(p->dtype));
  bool right = memcmp(p->data, expected.data, bytes) == 0;
  free(expected.data);
  return right;
}

/* Where part k of `parts` begins; cuts are anywhere, parts may be empty. Every fourth tensor is not
 * cut, but written whole by one of them. */
static inline int64_t sample_cut(int role, int tensor, int parts, int k) {
  int64_t total = sample_total(tensor), cut[64] = {0};
  if (k == 0 || k == parts) return k == 0 ? 0 : total;
  if (tensor % 4 == 0) return k <= (role + tensor) % parts ? 0 : total;
  for (int i = 0; i < parts - 1; i++)
    cut[i] = (int64_t)(sample_key(role + 10 * tensor, parts, i) % (uint64_t)(total + 1));
  for (int i = 0; i < parts - 1; i++)
    for (int j = i + 1; j < parts - 1; j++)
      if (cut[j] < cut[i]) {
        int64_t t = cut[i];
        cut[i] = cut[j];
        cut[j] = t;
      }
  return cut[k - 1];
}

enum { SAMPLE_PIECES = MOE_ROLES * SAMPLE_TENSORS };

/* Part k of the whole checkpoint of a step, filled: SAMPLE_PIECES pieces. */
static inline void sample_make(moe_piece *pieces, int k, int parts, int64_t step) {
  for (int role = 0; role < MOE_ROLES; role++)
    for (int t = 0; t < SAMPLE_TENSORS; t++) {
      int64_t begin = sample_cut(role, t, parts, k), end = sample_cut(role, t, parts, k + 1);
      moe_piece *p = pieces++;
      *p = sample_piece(role, t, begin, end - begin);
      sample_fill(p, t, step);
    }
}

static inline void sample_free(moe_piece *pieces, int n) {
  for (int i = 0; i < n; i++) free(pieces[i].data);
}

static inline moe_run_state sample_state(int64_t step) {
  moe_run_state s = {.step = step, .tokens = step * 1000, .loss_scale = 65536.0};
  s.samples = INT64_MAX - step; /* beyond 2^53 */
  s.seed = UINT64_MAX;
  s.data_fingerprint = 0x8000000000000001u;
  return s;
}

#endif
