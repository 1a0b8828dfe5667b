/* The mesh: world = ep x edp.
 *
 * Consecutive ranks form an expert-parallel group (its members together own all experts); ranks at
 * the same place of different groups are replicas of the same experts:
 *     rank = replica * ep + place */
#ifndef MOE_PARALLEL_MESH_H
#define MOE_PARALLEL_MESH_H

#include "parallel/comm.h"
#include "parallel/shard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_comm *world;    /* all ranks: replicated parameters */
  moe_comm *experts;  /* this rank's expert-parallel group: dispatch and combine (ep ranks) */
  moe_comm *replicas; /* ranks owning the same experts: their gradients (edp ranks) */
  moe_comm *world_beside, *replicas_beside; /* comm.h; NULL without moe_mesh_create_beside */
  int ep, edp;
  moe_range owned; /* experts of this rank, of every layer */
  int64_t num_experts;
} moe_mesh;

/* The default ep: the largest divisor of `world` that is at most num_experts. */
int moe_mesh_default_ep(int world, int64_t num_experts);
/* Collective over world (which the mesh borrows). ep 0: the default. MOE_USAGE when ep does not
 * divide the world or exceeds num_experts, with how to mend it. */
moe_status moe_mesh_create(moe_comm *world, int ep, int64_t num_experts, moe_mesh *out);
/* Collective over world: groups for sums that run beside arithmetic. With `sharded` optimizer state
 * there is one for replicas alone, and only if copies carry what it does (moe_comm_by_copies). */
moe_status moe_mesh_create_beside(moe_mesh *m, bool sharded);
void moe_mesh_destroy(moe_mesh *m);

#ifdef __cplusplus
}
#endif
#endif
