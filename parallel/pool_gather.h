/* Updated weights to all replicas, piece by piece: some while others are updated, most beside what
 * comes after and does not need them yet. For a sharded pool with staging (grad_sync.h), whose
 * gradients have been summed; two replicas leave the staging alone.
 *
 *   while (moe_pool_gather_next(g, &piece)) {
 *     ...queue the update of `piece` on MAIN...
 *     MOE_TRY(moe_pool_gather_send(g, piece));
 *   }
 *   MOE_TRY(moe_pool_gather_end(g));
 *   ...
 *   MOE_TRY(moe_pool_gather_need(g, some));        before MAIN is given what reads them */
#ifndef MOE_PARALLEL_POOL_GATHER_H
#define MOE_PARALLEL_POOL_GATHER_H

#include "parallel/grad_sync.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_GATHER_MARKS = 32 };

typedef struct {
  moe_device *dev; /* NULL: nothing ever travels, so nothing is waited for */
  moe_comm *group;
  moe_tensor weights, staging;
  moe_range own;
  int64_t piece;      /* elements that travel at once from a rank: a slot holds them from each */
  int64_t given;      /* elements of the own chunk that `next` has told */
  moe_range arriving; /* what lies in a slot, or will: elements counted from a chunk's begin */
  int slot;           /* where the next piece arrives, 0 or 1 */
  int awaited;        /* parts of MOE_GATHER_MARKS of others' chunks that MAIN waits for already */
  moe_mark there[MOE_GATHER_MARKS]; /* when each of these parts is where it belongs */
} moe_pool_gather;

/* Local. pool: of shard, beside and staging; weights [as its gradients], of no wider type. */
moe_pool_gather moe_pool_gather_of(moe_device *dev, const moe_grad_pool *pool, moe_tensor weights);
/* Local. Waits for what travels; before its memory goes. */
void moe_pool_gather_release(moe_pool_gather *g);
/* Local. What to update next of the own chunk, as a range of the pool; false after the last. */
bool moe_pool_gather_next(moe_pool_gather *g, moe_range *piece);
/* Both collective over the group. Sends go by MOE_LANE_REDUCE; with more than two replicas
 * MOE_LANE_EXCHANGE takes what arrived from the staging to its place, and the staging is free when
 * all of the pool was needed. */
moe_status moe_pool_gather_send(moe_pool_gather *g, moe_range piece);
moe_status moe_pool_gather_end(moe_pool_gather *g);
/* Local. What is queued from now on starts after elements `part` of the pool are everyone's. */
moe_status moe_pool_gather_need(moe_pool_gather *g, moe_range part);

#ifdef __cplusplus
}
#endif
#endif
