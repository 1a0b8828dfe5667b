/* A snapshot: the state of one step on its way from the training thread to the one that writes it.
 *
 * Bytes of all pieces, one after the other, go through a ring of host memory (pinned on a GPU).
 * When the ring holds them all, filling it is one copy and training goes on at once; when it is
 * smaller, the filling thread waits for the writing one, so memory stays bounded and the wait is
 * what the missing memory costs. Nobody sees a mixture of two steps: training goes on only when the
 * last byte has been copied. One thread fills while one takes; all functions are local. */
#ifndef MOE_CHECKPOINT_SNAPSHOT_H
#define MOE_CHECKPOINT_SNAPSHOT_H

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_snapshot moe_snapshot;

/* A ring of `bytes` of host memory of dev, or what there is: smaller when that is not to be had.
 * MOE_NO_MEMORY when not even 1 MiB is. */
moe_status moe_snapshot_create(moe_device *dev, int64_t bytes, moe_snapshot **out);
void moe_snapshot_destroy(moe_snapshot *s);
int64_t moe_snapshot_bytes(const moe_snapshot *s);

/* Begin anew: out[0..n) are the pieces as moe_shard_write takes them from the snapshot, with dev
 * NULL, in this order. Both lists must stay until fill and the writing have ended. */
void moe_snapshot_begin(moe_snapshot *s, const moe_piece *pieces, int n, moe_piece *out);
/* Training thread: copy what the pieces hold now. Returns when the copy is complete, or when the
 * writer has given up (then it is MOE_OK too: the writer has the error). */
moe_status moe_snapshot_fill(moe_snapshot *s);
/* Writing thread: it takes no more. To be called at its end, whether it went well or not. */
void moe_snapshot_leave(moe_snapshot *s);

#ifdef __cplusplus
}
#endif
#endif
