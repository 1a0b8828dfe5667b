/* The generator's insides, shared by generate.c (the passes) and generate_setup.c. Private to
 * core/model.
 *
 * Letters: T tokens of a pass, at most M; B slots; C sorted rows of expert work; the others as in
 * ops.h. */
#ifndef MOE_CORE_MODEL_GENERATE_STATE_H
#define MOE_CORE_MODEL_GENERATE_STATE_H

#include "core/model/generate.h"
#include "core/model/kv_cache.h"
#include "core/model/views.h"

typedef struct {
  moe_tensor tokens, positions, targets; /* i32 [M] */
  moe_tensor x, sum, h, delta;           /* [M, D]; x and sum: the residual stream, by turns */
  moe_tensor rstd;                       /* f32 [M] */
  moe_tensor qkv, attended;              /* [M, (H+2G)d], [M, H d] */
  moe_tensor probs, router_lse;          /* f32 [M, E], [M] */
  moe_tensor experts, gates;             /* [M, K] */
  moe_tensor stats;                      /* f32 [1, 2E + 1] */
  moe_tensor offsets, pair, slot;        /* i32 [e + 1], [C], [M, K] */
  moe_tensor xs, ys, gu, a;              /* [C, D], [C, D], [C, 2F], [C, F] */
  moe_tensor sorted_gates;               /* f32 [C] */
  moe_tensor hidden;                     /* [few K, F] */
  moe_tensor few_terms, terms;           /* several ranks: f32 [few K, D], [M K, D] */
  moe_tensor logits;                     /* f32 [logit rows, V] */
  moe_tensor loss;                       /* f64 [2] */
} moe_generator_work;

enum { MOE_STEPS_KEPT = 2 };
/* Places in `cells`. ZERO never changes. */
enum { MOE_CELL_ZERO, MOE_CELL_LENGTH, MOE_CELL_STREAM, MOE_CELL_RUNNING, MOE_CELLS };

struct moe_generator {
  moe_generator_options options;
  moe_dims dims;
  double norm_eps;
  moe_dtype dtype;
  int64_t most_tokens; /* M */
  int64_t few;         /* up to so many tokens, experts work without sorting */
  int64_t pad;         /* expert segments are padded to this */
  moe_params params;
  moe_tensor pools[MOE_POOLS];
  moe_layer_weights *layers; /* [L] */
  moe_tensor embed, gain, head;
  moe_tensor bias;       /* f32 [L, E] or absent */
  moe_tensor rope_table; /* f32 [room + 1, d] */
  moe_kv_cache cache;
  moe_generator_work work;
  /* Each slot on the device, i32 [B]: the token to feed next, tokens cached, the text's stream, and
   * 1 while it runs (else 0: its length stays). */
  moe_tensor token, lengths, streams, running;
  int64_t *length; /* [B] lengths as the host knows them: of slots that do not run */
  /* Pinned host memory. staged: a pass's tokens, positions and targets [3, M]; drawn: the tokens of
   * the last steps [MOE_STEPS_KEPT, B]; cells: single values on their way to the device. */
  int32_t *staged, *drawn, *cells;
  moe_mark done[MOE_STEPS_KEPT]; /* when drawn is there */
  int64_t steps;
  moe_graph *graph; /* the step, once recorded */
};

/* Sorted rows that any routing of `tokens` tokens fits in. */
int64_t moe_generator_sorted_rows(const moe_generator *g, int64_t tokens);

#endif
