/* The dispatcher's insides, shared by dispatch.c (what travels) and dispatch_setup.c. Private to
 * parallel/. */
#ifndef MOE_PARALLEL_DISPATCH_STATE_H
#define MOE_PARALLEL_DISPATCH_STATE_H

#include "kernels/device.h"
#include "parallel/dispatch.h"
#include "parallel/dispatch_plan.h"

typedef enum { MOE_DISPATCH_NONE, MOE_DISPATCH_ALLTOALL, MOE_DISPATCH_ALLGATHER } moe_dispatch_kind;

struct moe_dispatcher {
  moe_device *dev;
  const moe_mesh *mesh;
  moe_dispatch_shape shape;
  moe_dispatch_kind exchange;
  bool per_expert;       /* all-to-all: a row per chosen expert, not per rank */
  double seconds, bytes; /* cost since it was last asked for */
  moe_mark (*waits)[2];  /* lanes: before and after each wait since then */
  int64_t wait_count, wait_room;
  /* all-gather, device: what comes back from every rank, and where each token's parts of it lie */
  moe_tensor parts;     /* act [ep T, D] */
  moe_tensor part_slot; /* i32 [T, ep] of parts, for part_tokens tokens */
  int64_t part_tokens;
  /* all-to-all, device: what is sent, or comes back; M rows per token at most (dispatch_plan.h) */
  moe_tensor rows;        /* act [T M, D] */
  moe_tensor row_gates;   /* f32 [T M, K] */
  moe_tensor row_experts; /* i32 [T M, K] */
  moe_tensor gate_places; /* i32 [T M K] */
  /* all-to-all, host */
  void *host; /* holds the plan and the counts */
  moe_dispatch_plan plan;
  int64_t *counts; /* [ep, ep] rows from rank to rank */
};

#endif
