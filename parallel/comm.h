/* Communication: one interface over MPI (host memory) and NCCL (device memory).
 *
 * A moe_comm is a group of ranks. Data calls are collective over the group and queued on the
 * device's stream (MPI: they return when done). Counts are elements; above 2 GiB they are chunked
 * inside. Agreement and small host values always go through MPI. */
#ifndef MOE_PARALLEL_COMM_H
#define MOE_PARALLEL_COMM_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_comm moe_comm;
typedef enum { MOE_SUM, MOE_MAX, MOE_MIN } moe_reduce_op;

/* Start MPI (funneled; a program not under mpirun is a world of one) and end it. Once each. */
moe_status moe_comm_init(int *argc, char ***argv);
void moe_comm_finalize(void);
/* All ranks, for tensors of `dev`: NCCL when dev is CUDA and there is more than one rank. dev NULL:
 * for host values and agreement alone, before a device is open. */
moe_status moe_comm_world(moe_device *dev, moe_comm **out);
/* Collective over `parent`: ranks of one color form a group, ordered by key. */
moe_status moe_comm_split(moe_comm *parent, int color, int key, moe_comm **out);
/* Collective over c: the same ranks once more, for calls that run beside arithmetic on a lane of
 * their own. NCCL's kernels then take at most MOE_COMM_BESIDE multiprocessors: enough for most of
 * what a link carries, few enough for moe_device_lend. */
enum { MOE_COMM_BESIDE = 8 };
moe_status moe_comm_beside(moe_comm *c, moe_comm **out);
/* For a group from moe_comm_beside: copies alone carry all-gathers and gathers between shared
 * memory (moe_comm_share), so they take no multiprocessor from the kernels beside them: NCCL 2.28
 * and later within one node, with lanes; MPI always. The same on every rank of the group. */
bool moe_comm_by_copies(const moe_comm *c);
void moe_comm_destroy(moe_comm *c);

int moe_comm_rank(const moe_comm *c);
int moe_comm_size(const moe_comm *c);
/* This process among those of its node, before any device is open (0 without MPI). */
int moe_comm_local_rank(void);
int moe_comm_local_size(void);

/* Memory for tensors that travel between the ranks of a group, zeroed; NULL when there is not
 * enough. Local. Then, once for each, collective: make it known to the others. Where NCCL can (one
 * node, NVLink, the same size on every rank) the copy engines then carry what moves between such
 * tensors, at equal offsets on all ranks, and no multiprocessor is taken from the kernels beside. A
 * group shares at most MOE_COMM_SHARED pieces of memory. */
enum { MOE_COMM_SHARED = 4 };
void *moe_comm_alloc(moe_comm *c, int64_t bytes);
moe_status moe_comm_share(moe_comm *c, void *data, int64_t bytes);
void moe_comm_free(moe_comm *c, void *data);

/* x = reduction of all ranks' x, in place. f32, f64, i32; SUM also of bf16 and f16 (summed in f32).
 */
moe_status moe_comm_all_reduce(moe_comm *c, moe_tensor x, moe_reduce_op op);
/* x holds size equal chunks; afterwards chunk `rank` is the sum over ranks, the others undefined.
 * Count must be a multiple of size. */
moe_status moe_comm_reduce_scatter(moe_comm *c, moe_tensor x);
/* Chunk `rank` of x is this rank's; afterwards all chunks are everyone's. In place. */
moe_status moe_comm_all_gather(moe_comm *c, moe_tensor x);
/* The same from a separate tensor: out holds size copies of x's shape. */
moe_status moe_comm_all_gather_to(moe_comm *c, moe_tensor x, moe_tensor out);
/* Everyone's x to rank root, where out holds size copies of its shape, by rank; root's x may be its
 * copy there. Elsewhere out is a place like root's, at the same offset of shared memory, and stays
 * as it is. */
moe_status moe_comm_gather(moe_comm *c, moe_tensor x, moe_tensor out, int root);
/* out [rows, ...] = the sum over ranks of chunk `rank` of x (size * rows rows). x is kept. */
moe_status moe_comm_reduce_scatter_to(moe_comm *c, moe_tensor x, moe_tensor out);
/* Rows of `send` to rank r: [send_at[r], + send_rows[r]); received into recv likewise. Host arrays
 * of size ranks. Both tensors have rows of the same width and type. */
moe_status moe_comm_all_to_all(moe_comm *c, moe_tensor send, const int64_t *send_rows,
                               const int64_t *send_at, moe_tensor recv, const int64_t *recv_rows,
                               const int64_t *recv_at);
/* Chunk r of x [size * n] goes to rank r, whose chunk `rank` of out it becomes. Same shapes. */
moe_status moe_comm_exchange_chunks(moe_comm *c, moe_tensor x, moe_tensor out);
moe_status moe_comm_broadcast(moe_comm *c, moe_tensor x, int root);

/* Host values, over MPI whatever the device. */
moe_status moe_comm_host_all_reduce_i64(moe_comm *c, int64_t *x, int n, moe_reduce_op op);
moe_status moe_comm_host_all_reduce_f64(moe_comm *c, double *x, int n, moe_reduce_op op);
moe_status moe_comm_host_all_gather(moe_comm *c, const void *x, int64_t bytes, void *out);
/* Variable lengths to `root`: out is malloc'd there (the caller frees), lengths holds size entries.
 */
moe_status moe_comm_host_gather_bytes(moe_comm *c, const void *x, int64_t bytes, int root,
                                      void **out, int64_t *lengths);
moe_status moe_comm_host_broadcast(moe_comm *c, void *x, int64_t bytes, int root);
moe_status moe_comm_barrier(moe_comm *c);

/* Collective. Every rank returns the worst status of all and that rank's message, which names the
 * rank ("rank 3: ..."; a world of one has no need). MOE_OK only when all were. From bad to worst:
 * STOPPED, HUNG, FAILED, USAGE, DIVERGED, IO, DAMAGED, INVALID, NO_MEMORY; among equals the lowest
 * rank speaks. Messages are cut at 1 KiB. */
moe_status moe_agree(moe_comm *c, moe_status mine);
/* Local. Print the error and end the whole job with the status's exit code. Does not return. */
void moe_abort(moe_status status) __attribute__((noreturn));

#ifdef __cplusplus
}
#endif
#endif
