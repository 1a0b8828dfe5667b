/* Updated weights on their way: REDUCE carries a piece while MAIN updates the next.
 *
 * Only a chunk's first part goes that way. Memory sets the pace of an update, and what travels
 * beside it passes through memory too: most travels beside the next forward pass, which it hardly
 * disturbs, and which begins with what came first.
 *
 * Between two replicas a piece goes straight to its place: a gather is a copy when the one whom it
 * is for has his own row where it belongs already. The first chunk travels first, as it is needed
 * first. With more, an all-gather brings everyone's k-th piece. It delivers them side by side, but
 * a chunk apart is where they belong: hence the staging, one slot of which EXCHANGE empties while
 * the other fills. Such copies within one memory wait for multiprocessors. */
#include "parallel/pool_gather.h"

#include "core/base/integers.h"
#include "kernels/lanes.h"
#include "kernels/ops.h"

enum { EARLY = 8 }; /* one in so many elements travels while others are updated */

static bool is_pair(const moe_pool_gather *g) {
  return moe_comm_size(g->group) == 2;
}

moe_pool_gather moe_pool_gather_of(moe_device *dev, const moe_grad_pool *pool, moe_tensor weights) {
  int size = moe_comm_size(pool->beside);
  moe_pool_gather g = {
      .dev = dev,
      .group = pool->beside,
      .weights = weights,
      .staging = pool->staging,
      .own = moe_pool_chunk(moe_tensor_count(weights), size, moe_comm_rank(pool->beside)),
      .piece = moe_tensor_count(pool->staging) / 2 / size,
      .awaited = MOE_GATHER_MARKS};
  int64_t part = (moe_range_size(g.own) + MOE_GATHER_MARKS - 1) / MOE_GATHER_MARKS;
  if (is_pair(&g)) g.piece = moe_round_up64(part, MOE_POOL_ALIGN);
  return g;
}

void moe_pool_gather_release(moe_pool_gather *g) {
  if (!g->dev) return;
  moe_status status = moe_device_wait_lane(g->dev, MOE_LANE_REDUCE);
  if (status == MOE_OK) status = moe_device_wait_lane(g->dev, MOE_LANE_EXCHANGE);
  if (status == MOE_OK) moe_device_sync(g->dev);
  for (int i = 0; i < MOE_GATHER_MARKS; i++) moe_device_forget(g->dev, &g->there[i]);
}

bool moe_pool_gather_next(moe_pool_gather *g, moe_range *piece) {
  bool early = g->given < moe_range_size(g->own) / EARLY;
  piece->begin = g->own.begin + g->given;
  piece->end = early ? moe_min64(piece->begin + g->piece, g->own.end) : g->own.end;
  g->given = piece->end - g->own.begin;
  return piece->begin < piece->end;
}

/* How many of a chunk's parts end by its element `end`, or have begun before. */
static int parts_ended(const moe_pool_gather *g, int64_t end) {
  return (int)(end * MOE_GATHER_MARKS / moe_range_size(g->own));
}
static int parts_begun(const moe_pool_gather *g, int64_t end) {
  int64_t chunk = moe_range_size(g->own);
  return (int)((end * MOE_GATHER_MARKS + chunk - 1) / chunk);
}

/* Elements [begin, end) of others' chunks are where they belong after what is queued by now. */
static void are_there(moe_pool_gather *g, moe_range part) {
  for (int i = parts_ended(g, part.begin); i < parts_ended(g, part.end); i++)
    moe_device_mark(g->dev, &g->there[i]);
}

/* ---- two replicas -------------------------------------------------------------------------- */

/* A piece of the owner's chunk, counted from its begin, to the other. */
static moe_status bring(moe_pool_gather *g, int owner, moe_range piece) {
  int rank = moe_comm_rank(g->group);
  int64_t n = moe_range_size(piece), begin = owner * moe_range_size(g->own) + piece.begin;
  moe_tensor rows = moe_tensor_rows(g->weights, begin - owner * n, 2 * n);
  moe_tensor row = moe_tensor_rows(rows, rank * n, n);
  MOE_TRY(moe_comm_gather(g->group, row, rows, 1 - owner));
  if (rank != owner) are_there(g, piece);
  return MOE_OK;
}

/* A part of the owner's chunk, in pieces. */
static moe_status bring_part(moe_pool_gather *g, int owner, moe_range part) {
  moe_device_use_lane(g->dev, MOE_LANE_REDUCE);
  MOE_TRY(moe_device_wait_lane(g->dev, MOE_LANE_MAIN));
  for (int64_t at = part.begin; at < part.end; at += g->piece)
    MOE_TRY(bring(g, owner, (moe_range){at, moe_min64(at + g->piece, part.end)}));
  return MOE_OK;
}

/* ---- more ---------------------------------------------------------------------------------- */

/* Slot `slot` for pieces of n elements: [size, n], a row from each rank. */
static moe_tensor slot_of(const moe_pool_gather *g, int slot, int64_t n) {
  int size = moe_comm_size(g->group);
  int64_t bytes = moe_tensor_bytes(g->staging) / 2;
  return moe_tensor_2d((char *)g->staging.data + slot * bytes, g->weights.dtype, size, n);
}

/* What arrived last to its places in the others' chunks. */
static moe_status put_away(moe_pool_gather *g) {
  moe_range part = g->arriving;
  int64_t n = moe_range_size(part), chunk = moe_range_size(g->own);
  moe_tensor parts = slot_of(g, 1 - g->slot, n);
  if (n == 0) return MOE_OK;
  for (int r = 0; r < moe_comm_size(g->group); r++) {
    if (r == moe_comm_rank(g->group)) continue;
    moe_tensor place = moe_tensor_rows(g->weights, r * chunk + part.begin, n);
    MOE_TRY(moe_copy(g->dev, place, moe_tensor_rows(parts, r, 1)));
  }
  are_there(g, part);
  g->arriving = (moe_range){0, 0};
  return MOE_OK;
}

/* A piece that fits a slot. In this order: what EXCHANGE is told to put away must not wait for the
 * piece that comes next, and that piece must wait for what was put away from its slot, but not for
 * what is now. */
static moe_status send(moe_pool_gather *g, moe_range piece) {
  int64_t n = moe_range_size(piece), begin = g->own.begin + piece.begin;
  moe_device_use_lane(g->dev, MOE_LANE_EXCHANGE);
  MOE_TRY(moe_device_wait_lane(g->dev, MOE_LANE_REDUCE));
  moe_device_use_lane(g->dev, MOE_LANE_REDUCE);
  MOE_TRY(moe_device_wait_lane(g->dev, MOE_LANE_MAIN));
  MOE_TRY(moe_device_wait_lane(g->dev, MOE_LANE_EXCHANGE));
  MOE_TRY(moe_comm_all_gather_to(g->group, moe_tensor_rows(g->weights, begin, n),
                                 slot_of(g, g->slot, n)));
  moe_device_use_lane(g->dev, MOE_LANE_EXCHANGE);
  MOE_TRY(put_away(g));
  g->arriving = piece;
  g->slot = 1 - g->slot;
  return MOE_OK;
}

static moe_status send_part(moe_pool_gather *g, moe_range part) {
  for (int64_t at = part.begin; at < part.end; at += g->piece)
    MOE_TRY(send(g, (moe_range){at, moe_min64(at + g->piece, part.end)}));
  return MOE_OK;
}

/* What is still in a slot. */
static moe_status send_end(moe_pool_gather *g) {
  moe_device_use_lane(g->dev, MOE_LANE_EXCHANGE);
  MOE_TRY(moe_device_wait_lane(g->dev, MOE_LANE_REDUCE));
  return put_away(g);
}

/* ---- both ---------------------------------------------------------------------------------- */

moe_status moe_pool_gather_send(moe_pool_gather *g, moe_range piece) {
  moe_range part = {piece.begin - g->own.begin, piece.end - g->own.begin};
  g->awaited = 0;
  moe_status status = is_pair(g) ? bring_part(g, 0, part) : send_part(g, part);
  moe_device_use_lane(g->dev, MOE_LANE_MAIN);
  return status;
}

moe_status moe_pool_gather_end(moe_pool_gather *g) {
  moe_range chunk = {0, moe_range_size(g->own)};
  moe_status status = is_pair(g) ? bring_part(g, 1, chunk) : send_end(g);
  moe_device_use_lane(g->dev, MOE_LANE_MAIN);
  g->given = 0;
  return status;
}

moe_status moe_pool_gather_need(moe_pool_gather *g, moe_range part) {
  if (!g->dev || g->awaited == MOE_GATHER_MARKS || part.begin >= part.end) return MOE_OK;
  if (part.begin >= g->own.begin && part.end <= g->own.end) return MOE_OK;
  int64_t chunk = moe_range_size(g->own);
  bool one_chunk = part.begin / chunk == (part.end - 1) / chunk;
  int parts = parts_begun(g, one_chunk ? (part.end - 1) % chunk + 1 : chunk);
  if (parts <= g->awaited) return MOE_OK;
  g->awaited = parts;
  return moe_device_follow(g->dev, &g->there[parts - 1]);
}
