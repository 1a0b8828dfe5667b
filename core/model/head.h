/* The head: final norm, logits, cross-entropy. Private to core/model.
 *
 * Logits exist only for a chunk of tokens at a time. Their gradient is made where they lie, and the
 * products that need it follow at once, so a step never holds [T, V]. */
#ifndef MOE_CORE_MODEL_HEAD_H
#define MOE_CORE_MODEL_HEAD_H

#include "core/model/block.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_tensor gain, weight, dgain, dweight; /* [D], [V, D] */
  moe_tensor x, h, rstd;                   /* [T, D], [T, D], [T] */
  moe_tensor dh;                           /* [T, D]; absent unless training */
  moe_tensor logits;                       /* [chunk, V] */
} moe_head;

/* Local. The weights' views are set by the caller. */
void moe_head_create(moe_block_env *env, moe_arena *arena, moe_head *out);
/* loss f64 [2] adds (ops.h, moe_cross_entropy). with_grad: also dh and the weight's gradient. */
moe_status moe_head_loss(moe_block_env *env, moe_head *head, moe_tensor x, moe_tensor delta,
                         float scale, bool with_grad, moe_tensor loss);
/* work.dx (written whole) and dgain, from dh. */
moe_status moe_head_backward(moe_block_env *env, moe_head *head);
/* logits f32 [T, V], host. Waits for the device. */
moe_status moe_head_logits(moe_block_env *env, moe_head *head, moe_tensor x, moe_tensor delta,
                           float *logits);

#ifdef __cplusplus
}
#endif
#endif
