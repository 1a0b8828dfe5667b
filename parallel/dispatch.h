/* Dispatch: tokens travel to the ranks of their experts and back.
 *
 * A token goes once to each rank that owns any of its experts, with its (expert, gate) pairs; that
 * rank sums its experts' outputs, so one row comes back. Two exchanges with the same result:
 *
 *   all-to-all   rows sorted by destination; row counts are exchanged first
 *   all-gather   every rank receives all rows of the group, and returns each rank its tokens' sums.
 *                Moves less when most tokens visit most ranks (ep = 2, K = 4). `auto` takes it
 *                unless all-to-all is expected to send under 90 % (on a GPU: 40 %) of its rows
 *                (uniform routing, dispatch_plan.h).
 *
 * MOE_DEDUP=off in the environment of all ranks (for benchmarks) sends by all-to-all a row for each
 * of a token's experts, even where several live on one rank: what sending once per rank saves.
 *
 * Exchanges run on the device's exchange lane (kernels/lanes.h): every call below starts what it
 * names, and moe_dispatch_wait must follow before results are used or sources are written. Work
 * queued between the two hides the exchange. Their memory is best of moe_comm_alloc.
 *
 * With ep = 1 nothing moves: a route's tensors ARE the caller's x, experts and gates, which must
 * therefore stay as they are until the backward pass is done. Otherwise they are copies.
 *
 *   send     x [T, D], experts, gates [T, K]  ->  rows [R, D], experts, gates [R, K] of my experts
 *   return   rows [R, D]                      ->  out [T, D] = sum over destinations
 * The gradients travel the same ways: moe_dispatch_send_grad carries dout to the rows,
 * moe_dispatch_return_grad sums the rows' dx and collects the gates' gradients.
 *
 * Layers share one moe_dispatcher (buffers); what a layer must keep until its backward lies in a
 * moe_route. R varies from step to step, up to T * ep (MOE_DEDUP=off: times the
 * experts of one rank, up to K). */
#ifndef MOE_PARALLEL_DISPATCH_H
#define MOE_PARALLEL_DISPATCH_H

#include "core/base/arena.h"
#include "parallel/mesh.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_dispatcher moe_dispatcher;

/* One micro-batch's routing of one layer. */
typedef struct {
  int64_t rows;       /* R now */
  moe_tensor experts; /* i32 [R, K] this rank's expert numbers 0..e-1, or -1 */
  moe_tensor gates;   /* f32 [R, K], 0 where -1 */
  moe_tensor x;       /* [R, D] received rows */
  /* private: the batch's tokens, memory for the most rows, and the way back */
  int64_t tokens;
  bool x_is_sent;
  moe_tensor experts_room, gates_room, x_room;
  moe_tensor sent_token; /* all-to-all: i32 [T * min(ep, K)] token of each sent row */
  moe_tensor slot;       /* i32 [T, min(ep, K)] the sent rows of each token, or -1 */
  moe_tensor gate_slot;  /* i32 [T, K] each gate's place among the sent rows' [S, K], or -1 */
  int64_t *send_rows, *send_at, *recv_rows, *recv_at; /* [ep], host */
} moe_route;

typedef struct {
  int64_t tokens, hidden, top_k; /* T, D, K */
  moe_dtype dtype;
  int exchange; /* MOE_EXCHANGE_AUTO, ALLTOALL or ALLGATHER of core/base/config.h */
} moe_dispatch_shape;

/* Local. Takes buffers from `memory` (EXCHANGE). The mesh is borrowed. */
moe_status moe_dispatcher_create(moe_device *dev, const moe_mesh *mesh, moe_dispatch_shape shape,
                                 moe_memory *memory, moe_dispatcher **out);
void moe_dispatcher_destroy(moe_dispatcher *d);
/* Local. Room for one layer's route, from `arena`. */
moe_status moe_route_create(moe_dispatcher *d, moe_arena *arena, moe_route *out);
void moe_route_destroy(moe_route *r);
/* The most rows a route can have. */
int64_t moe_dispatch_max_rows(const moe_dispatcher *d);
/* "all-to-all", "all-to-all per expert", "all-gather" or "none", for logs. */
const char *moe_dispatch_exchange_name(const moe_dispatcher *d);

/* What is started since runs on from here: results are there for what is queued next. Local. */
moe_status moe_dispatch_wait(moe_dispatcher *d);

/* All collective over the expert group. Optional, before send: start carrying x [T, D] while its
 * experts are not known yet. Does nothing when the exchange is not an all-gather. */
moe_status moe_dispatch_send_early(moe_dispatcher *d, moe_tensor x, moe_route *route);
/* experts i32 [T, K] global numbers (-1: dropped). A batch
 * may have fewer than T tokens; by all-gather it has the same number on every rank. */
moe_status moe_dispatch_send(moe_dispatcher *d, moe_tensor x, moe_tensor experts, moe_tensor gates,
                             moe_route *route);
/* out [T, D] act (written whole); a token with no experts gets zeros. With ep = 1 out may be rows.
 */
moe_status moe_dispatch_return(moe_dispatcher *d, const moe_route *route, moe_tensor rows,
                               moe_tensor out);
/* rows [R, D] act out = dout [T, D] of each row's token. */
moe_status moe_dispatch_send_grad(moe_dispatcher *d, const moe_route *route, moe_tensor dout,
                                  moe_tensor rows);
/* dx [T, D] act out = sum of the token's rows; dgates f32 [T, K] out, from row_dgates f32 [R, K],
 * which is 0 where route->experts is -1. A dropped assignment's dgate is 0. */
moe_status moe_dispatch_return_grad(moe_dispatcher *d, const moe_route *route, moe_tensor rows,
                                    moe_tensor row_dgates, moe_tensor dx, moe_tensor dgates);
/* Seconds that arithmetic waited for exchanges (on a CPU: all they took), and bytes sent to other
 * ranks, since the last call. After the device was waited for. */
void moe_dispatch_cost(moe_dispatcher *d, double *seconds, double *bytes);

#ifdef __cplusplus
}
#endif
#endif
