/* Gradient reduction and the optimizer's shards.
 *
 * Parameters lie in flat pools (core/model/params.h). A pool is replicated over a group: the world
 * for dense parameters, the replicas for experts. Each rank is responsible for an equal chunk of
 * the pool (moe_pool_chunk): it counts that chunk in the global norm, saves it to checkpoints and,
 * with zero1, alone keeps its optimizer state. */
#ifndef MOE_PARALLEL_GRAD_SYNC_H
#define MOE_PARALLEL_GRAD_SYNC_H

#include "parallel/mesh.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Pools are padded to a multiple of size * MOE_POOL_ALIGN elements, so chunks are equal. */
enum { MOE_POOL_ALIGN = 64 };
int64_t moe_pool_padded(int64_t count, int size);
moe_range moe_pool_chunk(int64_t padded, int size, int rank);

/* One pool's gradients f32 or bf16 [padded] and who shares them. bf16 is summed as comm.h says: in
 * f32 and rounded once by MPI, and by the owners of a sharded pool with staging; NCCL rounds at
 * every addition along its rings and trees, or sums in f32 inside a switch. */
typedef struct {
  moe_tensor grads;
  moe_comm *group;
  bool shard;   /* zero1: only the own chunk is complete afterwards */
  bool counted; /* sum_squares has this pool's squares already; only where the group is one rank */
  moe_comm *beside; /* the group once more, for moe_grad_sum_from; NULL: all is summed at the end */
  moe_tensor staging; /* sharded, with beside: where parts of all ranks meet; else absent */
  moe_tensor squares; /* with staging: moe_grad_sync's sum_squares, 0 at first, to which owners add
                       * what they sum; absent: all is read again at the end */
  int64_t summed;     /* so many elements, the last ones, are summed or on their way; 0 at first */
} moe_grad_pool;

/* Staging for a pool of this size and type: elements, two slots of a piece from each rank. A piece
 * is at most a quarter of a chunk, so that while one travels another can be worked on, and large
 * enough to hide what it costs to begin: MOE_STAGING bytes in all. */
enum { MOE_STAGING = 256 << 20 };
int64_t moe_pool_staging(int64_t padded, int size, moe_dtype dtype);

/* One owner at a time receives, size - 1 times what each other sends: with more ranks that takes
 * longer than backward (0007), and a pool is reduce-scattered at the end, by all links at once. */
enum { MOE_OWNER_RANKS = 4 };

/* Elements [begin, ...) of the pool are final: they may be summed beside what is queued from now on
 * (MOE_LANE_REDUCE), and are as soon as they make a bucket or begin is 0. Backward fills pools from
 * their ends, so `begin` falls from call to call. Without shard a bucket has at least
 * moe_grad_bucket bytes. A sharded pool's fill its staging or end where a chunk does; without
 * staging, or with more than MOE_OWNER_RANKS, such a pool waits for the end. Collective over the
 * pool's group. */
extern int64_t moe_grad_bucket; /* for tests to lower */
moe_status moe_grad_sum_from(moe_device *dev, moe_grad_pool *pool, int64_t begin);
/* The same, begin being where `first` lies in the pool. */
moe_status moe_grad_final(moe_device *dev, moe_grad_pool *pool, moe_tensor first);

/* Collective over the world: sum what is left of each pool over its group, then sum_squares f64 [1]
 * (device) = squared global norm, each parameter counted once. What it holds before counts if a
 * pool says so. Sets summed back to 0. */
moe_status moe_grad_sync(moe_device *dev, moe_comm *world, moe_grad_pool *pools, int n,
                         moe_tensor sum_squares);

#ifdef __cplusplus
}
#endif
#endif
