/* Parameters, once.
 *
 * params.c holds THE parameter table: one row per kind of tensor with its name, shape, pool,
 * initial values and export names. Init, optimizer, reductions, checkpoints and conversion read it.
 *
 * The weights of a rank lie in four flat pools. Within a pool, tensors follow each other in an
 * order that makes fused views possible: q, k, v of a layer are one [(H+2G)d, D] matrix; w1, w3 of
 * an expert one [2, F, D]; all experts of a layer one [e, 2, F, D] and one [e, D, F]. */
#ifndef MOE_CORE_MODEL_PARAMS_H
#define MOE_CORE_MODEL_PARAMS_H

#include "core/base/config.h"
#include "kernels/device.h"
#include "parallel/shard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  MOE_POOL_DENSE,  /* replicated matrices, compute type, decayed */
  MOE_POOL_ROUTER, /* replicated router weights, f32, decayed */
  MOE_POOL_GAIN,   /* replicated norm gains, f32, not decayed */
  MOE_POOL_EXPERT, /* this rank's experts, compute type, decayed */
  MOE_POOLS
} moe_pool_kind;

typedef enum { MOE_INIT_NORMAL, MOE_INIT_NORMAL_OUT, MOE_INIT_ONES } moe_init_kind;

typedef struct {
  int64_t vocab, hidden, layers, heads, kv_heads, head_dim, experts, top_k, ffn;
} moe_dims;

/* A row of the table. `name` and `gguf` hold {L} for the layer and {E} for the global expert.
 * In GGUF the experts of a layer are merged into one tensor, whose name has no {E}. */
typedef struct {
  const char *name;  /* Hugging Face Mixtral's */
  const char *gguf;  /* llama.cpp's */
  const char *shape; /* letters of moe_dims: "VD", "QD" (Q = H d), "KD" (K = G d), "DQ", "ED", "FD",
                        "DF", "D" */
  moe_pool_kind pool;
  moe_init_kind init;
  char bundle; /* consecutive rows of one bundle lie together in memory; 0: alone */
} moe_param_row;

enum { MOE_PARAM_NAME = 96 };

/* One tensor of this rank. */
typedef struct {
  const moe_param_row *row;
  char name[MOE_PARAM_NAME];
  int64_t layer, expert; /* -1 where there is none; expert is the global number */
  int dims;
  int64_t shape[2];
  int64_t count;  /* elements */
  int64_t offset; /* elements from the start of its pool */
} moe_param;

typedef struct {
  moe_dims dims;
  moe_range experts; /* owned */
  int count;
  moe_param *list;               /* by pool, then by offset */
  int64_t pool_count[MOE_POOLS]; /* elements, without padding */
} moe_params;

moe_dims moe_dims_of(const moe_config *c);
/* All tensors of a rank that owns `experts` ({0, E}: the whole model). MOE_NO_MEMORY. */
moe_status moe_params_create(const moe_dims *dims, moe_range experts, moe_params *out);
void moe_params_destroy(moe_params *p);
const moe_param *moe_params_find(const moe_params *p, const char *name);
/* By the table's name pattern: moe_params_at(p, "model.layers.{L}.input_layernorm.weight", 3, -1).
 */
const moe_param *moe_params_at(const moe_params *p, const char *pattern, int64_t layer,
                               int64_t expert);
/* The table itself, ended by a row whose name is NULL. */
const moe_param_row *moe_param_table(void);
bool moe_pool_decays(moe_pool_kind pool);
/* f32 pools stay f32; the others have the compute type. */
moe_dtype moe_pool_dtype(moe_pool_kind pool, moe_dtype compute);
const char *moe_pool_name(moe_pool_kind pool);

/* out = initial values of a tensor's elements from `begin` on, drawn from (seed, name's row, layer,
 * expert, element) and rounded to out's type: the same on any rank, rank count and backend.
 * Local; queued on dev's stream. */
moe_status moe_param_init(moe_device *dev, const moe_param *p, const moe_dims *dims,
                          double init_std, uint64_t seed, int64_t begin, moe_tensor out);

/* Totals over the whole model. Active: what one token's matrix products touch (SPEC: attention,
 * router, K experts, head). */
int64_t moe_dims_parameters(const moe_dims *d);
int64_t moe_dims_active_matmul(const moe_dims *d);
/* Model FLOPs per token, forward and backward, at sequence length S:
 *     6 * active matrix parameters + L * 6 * S * H * d     (causal attention: half the square) */
double moe_dims_flops_per_token(const moe_dims *d, int64_t seq);

#ifdef __cplusplus
}
#endif
#endif
