/* One transformer block: attention, then experts. Private to core/model.
 *
 * Shape legend: T tokens of the micro-batch, D hidden, H, G, d heads, E experts, e of this rank, K
 * per token, F FFN size, R rows received from all ranks, C rows of one round of expert work. */
#ifndef MOE_CORE_MODEL_BLOCK_H
#define MOE_CORE_MODEL_BLOCK_H

#include "core/model/model.h"
#include "core/model/views.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What one layer's forward leaves for its backward. Layers that are recomputed share one, and so
 * does the layer after them, which finds it as it left it. */
typedef struct {
  moe_tensor h1, rstd1;         /* [T, D], [T] */
  moe_tensor qkv;               /* [T, (H+2G)d] after RoPE */
  moe_tensor attended, lse;     /* [T, H d], [B, H, S] */
  moe_tensor mid;               /* [T, D] x + attention */
  moe_tensor h2, rstd2;         /* [T, D], [T] */
  moe_tensor probs, router_lse; /* [T, E], [T] */
  moe_tensor experts, gates;    /* [T, K] */
  moe_route route;
  moe_tensor offsets;    /* i32 [e + 1] of the sorted rows */
  int64_t sorted_rows;   /* how many those are, or the most there can be */
  moe_tensor pair, slot; /* i32 [P], [R, K] */
} moe_stash;

/* Buffers that all layers use in turn. Where no row travels, rows are delta and dh, drows are dx,
 * and row_dgates are dgates. */
typedef struct {
  moe_tensor delta;           /* [T, D] what the block adds to the residual stream */
  moe_tensor dx;              /* [T, D] gradient of the residual stream */
  moe_tensor dh;              /* [T, D] of a norm's output; where delta was */
  moe_tensor dattended, dqkv; /* [T, H d], [T, (H+2G)d] */
  moe_tensor dgates, dlogits; /* f32 [T, K], [T, E] */
  moe_tensor rows;            /* [R, D] rows on their way back */
  moe_tensor drows;           /* [R, D] gradients received */
  moe_tensor row_dgates;      /* f32 [R, K] */
  moe_tensor window;          /* i32 [e + 1] */
  moe_tensor xs, ys, dxs, a;  /* [C, D], [C, D], [C, D], [C, F] sorted rows */
  moe_tensor gu_again; /* [C, 2F] of rounds after the first; absent when one round holds all */
  moe_tensor sorted_gates, sorted_dgates; /* f32 [C] */
  moe_tensor stats_again;                 /* where a recomputed router writes its statistics */
} moe_work;

/* Expert weight gradients not yet computed: they cover the next exchange. */
typedef struct {
  moe_tensor left, right, window, dw; /* ops.h, moe_expert_weight_grad; left absent: none is due */
  int accumulate;
  bool last; /* round: dw is then what it will be */
} moe_due_grad;

/* Sorted rows that are still to be summed to their tokens. */
typedef struct {
  moe_tensor y, slot; /* ops.h, moe_combine_rows */
} moe_left_rows;

typedef struct {
  moe_dims dims;
  const moe_config *config;
  moe_device *dev;
  const moe_mesh *mesh;
  moe_dispatcher *dispatcher;
  int64_t tokens; /* T */
  int64_t batch, seq;
  int64_t groups;     /* of router statistics: 1, or one per sequence */
  int64_t round_rows; /* C */
  int64_t pad;        /* expert segments are padded to this */
  moe_dtype dtype;
  moe_work work;
  moe_due_grad due;
  moe_left_rows left;      /* of the last experts; with ep 1 they are the delta */
  moe_tensor grad_squares; /* f64 [1] of the experts' gradients as they are made, or absent */
  moe_grad_pool *sums;     /* of the experts' gradients; NULL: others will add to them */
  moe_tensor forced;  /* i32 [T, K] experts in place of the router's; absent but in benchmarks */
  int32_t *rows_host; /* [1], pinned: a row count on its way to the host */
  moe_mark rows_asked;
  moe_tensor rope_table;                               /* f32 [S, d] */
  moe_tensor tokens_in, targets, positions, doc_start; /* i32 [T]; doc_start absent without masks */
} moe_block_env;

typedef struct {
  int64_t index;
  moe_layer_weights w, g;
  moe_tensor x;        /* [T, D] input: the residual stream with the last delta added */
  moe_stash *stash;    /* own or shared */
  moe_tensor gu;       /* [C, 2F] of the first round; shared likewise by layers that recompute it */
  moe_tensor xs, a, y; /* [C, D], [C, F], [C, D] of the first round; absent where a is recomputed */
  int recompute;       /* MOE_RECOMPUTE_NONE to BLOCK */
  moe_tensor bias;     /* f32 [E] or absent */
  moe_tensor stats;    /* f32 [groups (2E + 1)] of the current micro-batch */
  moe_tensor dropped;  /* f32 [1] of the current micro-batch */
  bool accumulate;     /* expert weight gradients add to what is there */
} moe_block;

/* The most sorted rows any routing can need. */
int64_t moe_block_most_rows(const moe_block_env *env);
/* Room for a stash (without gu and a) and for the shared buffers. Local. */
moe_status moe_stash_create(moe_block_env *env, moe_memory *memory, moe_stash *out);
void moe_stash_destroy(moe_stash *s);
void moe_work_create(moe_block_env *env, moe_memory *memory, bool training);

/* x_in [T, D] plus delta_in -> block->x; leaves stash->mid and env->work.delta. delta_in may be
 * absent when x_in is block->x already.
 * Collective over the expert group. */
moe_status moe_block_forward(moe_block_env *env, moe_block *b, moe_tensor x_in,
                             moe_tensor delta_in);
/* env->work.dx: gradient of the block's output, replaced by that of `mid` and then by that of the
 * block's input. The first may leave weights' gradients for later (moe_experts_backward_end).
 * aux_scale, z_scale: ops.h, moe_router_backward. Collective over the expert group. */
moe_status moe_block_backward_experts(moe_block_env *env, moe_block *b, float aux_scale,
                                      float z_scale);
moe_status moe_block_backward_attention(moe_block_env *env, moe_block *b);

/* The halves (attention.c, moe_layer.c). stash->h1 -> work.delta; stash->h2 -> work.delta,
 * but with ep 1 -> env->left. */
moe_status moe_attention_forward(moe_block_env *env, moe_block *b);
moe_status moe_attention_backward_pass(moe_block_env *env, moe_block *b); /* dx -> dh (of h1) */
moe_status moe_experts_forward(moe_block_env *env, moe_block *b, moe_tensor stats);
moe_status moe_experts_backward(moe_block_env *env, moe_block *b, float aux_scale,
                                float z_scale); /* with the norm before: dx += of mid */
/* rms_norm of what comes after experts: n.residual is their delta, or absent. */
moe_status moe_norm_after_experts(moe_block_env *env, moe_norm n);
/* The weight gradients that the last moe_experts_backward left. */
moe_status moe_experts_backward_end(moe_block_env *env);

#ifdef __cplusplus
}
#endif
#endif
