/* Where a matrix product's plan is kept: a small table by shape, types and alignment.
 *
 * Plain host code without CUDA, so that it is tested without a GPU. The table is set-associative:
 * a key hashes to a set of CUDA_PLAN_WAYS places; when they are full the least recently used goes.
 * So expert products, whose row counts change from step to step, cannot fill it up. */
#ifndef MOE_KERNELS_CUDA_PLANS_H
#define MOE_KERNELS_CUDA_PLANS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { CUDA_PLAN_COUNT = 1024, CUDA_PLAN_WAYS = 8 };

/* Compared byte by byte: made by cuda_plan_key_of alone, which zeroes the padding. */
typedef struct {
  int64_t m, n, k, lda, ldb, ldc;
  uint32_t align_a, align_b, align_c; /* bytes, powers of two up to 256 */
  int32_t form, dtype, c_dtype;
  int32_t keeps_c; /* beta is not 0 */
  int32_t used;    /* 1: tells a key from an empty place */
} cuda_plan_key;

typedef struct {
  cuda_plan_key keys[CUDA_PLAN_COUNT];
  uint64_t last_use[CUDA_PLAN_COUNT];
  uint64_t clock;
} cuda_plan_index;

/* The largest power of two up to 256 that divides the address. cuBLASLt assumes 256 unless told. */
static inline uint32_t cuda_alignment(const void *data) {
  uintptr_t bits = (uintptr_t)data | 256;
  return (uint32_t)(bits & (~bits + 1));
}

static inline cuda_plan_key cuda_plan_key_of(int form, int64_t m, int64_t n, int64_t k, int dtype,
                                             int c_dtype, const void *a, const void *b,
                                             const void *c, int64_t lda, int64_t ldb, int64_t ldc,
                                             float beta) {
  cuda_plan_key key;
  memset(&key, 0, sizeof key);
  key.m = m, key.n = n, key.k = k;
  key.lda = lda, key.ldb = ldb, key.ldc = ldc;
  key.align_a = cuda_alignment(a), key.align_b = cuda_alignment(b);
  key.align_c = cuda_alignment(c);
  key.form = form, key.dtype = dtype, key.c_dtype = c_dtype;
  key.keeps_c = beta < 0.0f || beta > 0.0f;
  key.used = 1;
  return key;
}

/* FNV-1a over the key's 8-byte words, mixed down. */
static inline uint64_t cuda_plan_hash(const cuda_plan_key *key) {
  uint64_t hash = 14695981039346656037u, word;
  for (size_t at = 0; at < sizeof *key; at += sizeof word) {
    memcpy(&word, (const char *)key + at, sizeof word);
    hash = (hash ^ word) * 1099511628211u;
    hash ^= hash >> 29;
  }
  return hash;
}

/* The place of `key`: *known tells whether it holds that key's plan already. Otherwise it is now
 * reserved for it, and the caller replaces what the place held. */
static inline int cuda_plan_place(cuda_plan_index *index, const cuda_plan_key *key, bool *known) {
  int first = (int)(cuda_plan_hash(key) % (CUDA_PLAN_COUNT / CUDA_PLAN_WAYS)) * CUDA_PLAN_WAYS;
  int oldest = first;
  for (int at = first; at < first + CUDA_PLAN_WAYS; at++) {
    if (memcmp(&index->keys[at], key, sizeof *key) == 0) {
      index->last_use[at] = ++index->clock;
      *known = true;
      return at;
    }
    if (index->last_use[at] < index->last_use[oldest]) oldest = at;
  }
  index->keys[oldest] = *key;
  index->last_use[oldest] = ++index->clock;
  *known = false;
  return oldest;
}

/* The plan for this place could not be made: the key is not known. */
static inline void cuda_plan_forget(cuda_plan_index *index, int at) {
  memset(&index->keys[at], 0, sizeof index->keys[at]);
  index->last_use[at] = 0;
}

#endif
