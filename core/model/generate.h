/* Generation: a model's forward pass over a key/value cache, and drawing the next token.
 *
 * A generator has `batch` slots of `room` positions. A slot holds one text: prefill reads its
 * prompt in passes of at most `chunk` tokens, so memory is bounded whatever the prompt's length;
 * then each step adds one token to every slot that runs. A step is the same operations on the same
 * memory every time (the drawn tokens and the lengths stay on the device), so on a GPU it is
 * recorded once and replayed, and the host reads tokens while the next step runs.
 *
 * On several ranks every rank has all tokens, the cache and attention; each computes what its own
 * experts add to all tokens, and all ranks sum that in one order: logits are the same bits on any
 * number of like ranks. Rank 0's draw is everyone's.
 *
 *   x = embed[tokens];  for each layer: x += attention(norm(x)); x += experts(norm(x))
 *   logits = norm(x) lm_head^T */
#ifndef MOE_CORE_MODEL_GENERATE_H
#define MOE_CORE_MODEL_GENERATE_H

#include "core/base/arena.h"
#include "core/model/params.h"
#include "kernels/ops.h"
#include "parallel/mesh.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_generator moe_generator;

typedef struct {
  const moe_config *config; /* resolved; [model] and precision.dtype are used */
  moe_device *dev;
  const moe_mesh *mesh; /* ep = all ranks; borrowed, like dev */
  int64_t batch;        /* slots */
  int64_t room;         /* positions per slot */
  int64_t chunk;        /* tokens of all slots in one pass */
  moe_sample_args sample;
  bool router_bias; /* room for a selection bias (ops.h, moe_router) */
  bool eager;       /* record no graph */
} moe_generator_options;

/* Local. Takes memory from `memory`, measuring or committed (core/base/arena.h). MOE_NO_MEMORY,
 * MOE_INVALID. */
moe_status moe_generator_create(const moe_generator_options *options, moe_memory *memory,
                                moe_generator **out);
void moe_generator_destroy(moe_generator *g);

int64_t moe_generator_batch(const moe_generator *g);
/* What to load the weights into: this rank's parameters, and their pools by moe_pool_kind. */
const moe_params *moe_generator_params(const moe_generator *g);
const moe_tensor *moe_generator_pools(const moe_generator *g);
/* Selection bias [L, E], host. Local; waits for the device. */
moe_status moe_generator_set_router_bias(moe_generator *g, const float *bias);

/* All of the following are collective over the mesh and take the same arguments on every rank. */

/* Forget what slots [first, first + count) hold. Queued. */
moe_status moe_generator_clear(moe_generator *g, int64_t first, int64_t count);
/* Add n tokens to each of slots [first, first + count), which hold equally many. tokens [count, n]
 * host. logits f32 [count, n, V] host or NULL: of the token after each. Waits for the device.
 * MOE_INVALID when the slots have no room for them or a token is not of the vocabulary. */
moe_status moe_generator_feed(moe_generator *g, int64_t first, int64_t count, const int32_t *tokens,
                              int64_t n, float *logits);
/* The same, adding the sum of -log p(target) and the number of targets to loss. targets [count, n];
 * -1 counts nothing. */
moe_status moe_generator_score(moe_generator *g, int64_t first, int64_t count,
                               const int32_t *tokens, const int32_t *targets, int64_t n,
                               double loss[2]);

/* Begin a text in an empty slot: feed the prompt (n >= 1) and draw the first token, which the next
 * step will feed. `stream` names the text to the random numbers: a token is a function of the seed,
 * the stream, its position and the logits alone. Waits for the device. */
moe_status moe_generator_start(moe_generator *g, int64_t slot, const int32_t *prompt, int64_t n,
                               int32_t stream, int32_t *first);
/* One step of every started slot. Queued. */
moe_status moe_generator_step(moe_generator *g);
/* The tokens [batch] that a step drew, valid until the step after the next: the last step (age 0)
 * or the one before it (age 1). Waits for that step alone. Slots not started then have any. */
moe_status moe_generator_tokens(moe_generator *g, int age, const int32_t **tokens);
/* Whether a step runs while the host goes on (so that age 1 is worth waiting for). Local. */
bool moe_generator_is_ahead(const moe_generator *g);

#ifdef __cplusplus
}
#endif
#endif
