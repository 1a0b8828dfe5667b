/* Dispatch: two ways of carrying rows to their experts' ranks and back.
 *
 * Everything that travels goes one of two directions, `carry_out` (tokens to rows) or `carry_back`
 * (rows summed to tokens), forward and backward alike; the exchanges differ only there. The
 * all-gather exchange never waits for the device. Its way back is not a reduce-scatter but an
 * exchange of chunks and a sum by the receiver: as many bytes, float32 sums in a fixed order, and
 * no multiprocessor is needed to carry them. The all-to-all one must know its row counts on the
 * host: it waits once per layer, in moe_dispatch_send, and keeps its index tensors in the route so
 * that the way back and the gradients need no planning. */
#include <stdlib.h>
#include <string.h>

#include "core/base/integers.h"
#include "core/base/log.h"
#include "kernels/lanes.h"
#include "kernels/ops.h"
#include "parallel/dispatch_state.h"

/* ---- the exchange lane --------------------------------------------------------------------- */

/* What is queued until leave_lane runs beside what MAIN is given next. */
static moe_status enter_lane(moe_dispatcher *d) {
  if (d->exchange == MOE_DISPATCH_NONE) return MOE_OK;
  moe_device_use_lane(d->dev, MOE_LANE_EXCHANGE);
  return moe_device_wait_lane(d->dev, MOE_LANE_MAIN);
}

static moe_status leave_lane(moe_dispatcher *d, moe_status status) {
  moe_device_use_lane(d->dev, MOE_LANE_MAIN);
  return status;
}

/* Room for one more wait's marks; without it the cost is told too low. */
static moe_mark *next_wait(moe_dispatcher *d) {
  if (moe_device_is_host(d->dev)) return NULL;
  if (d->wait_count == d->wait_room) {
    int64_t room = d->wait_room * 2 + 256;
    moe_mark(*more)[2] = realloc(d->waits, (size_t)room * sizeof *more);
    if (!more) return NULL;
    memset(more + d->wait_room, 0, (size_t)(room - d->wait_room) * sizeof *more);
    d->waits = more;
    d->wait_room = room;
  }
  return d->waits[d->wait_count++];
}

moe_status moe_dispatch_wait(moe_dispatcher *d) {
  if (d->exchange == MOE_DISPATCH_NONE) return MOE_OK;
  moe_mark *marks = next_wait(d);
  if (marks) moe_device_mark(d->dev, &marks[0]);
  moe_status status = moe_device_wait_lane(d->dev, MOE_LANE_EXCHANGE);
  if (marks) moe_device_mark(d->dev, &marks[1]);
  return status;
}

/* ---- exchanges, with their cost ------------------------------------------------------------ */

static int64_t width_bytes(moe_tensor t) {
  return t.shape[1] * moe_dtype_size(t.dtype);
}

static int64_t sum(const int64_t *x, int n) {
  int64_t total = 0;
  for (int i = 0; i < n; i++) total += x[i];
  return total;
}

/* On a host a call returns when all is done; elsewhere moe_dispatch_wait knows. */
static void add_seconds(moe_dispatcher *d, double start) {
  if (moe_device_is_host(d->dev)) d->seconds += moe_clock_s() - start;
}

static moe_status gather(moe_dispatcher *d, moe_tensor x, moe_tensor out) {
  double start = moe_clock_s();
  MOE_TRY(moe_comm_all_gather_to(d->mesh->experts, x, out));
  add_seconds(d, start);
  d->bytes += (double)((d->mesh->ep - 1) * moe_tensor_bytes(x));
  return MOE_OK;
}

/* Where token t's part from rank r lies among the parts: row r * tokens + t. */
static moe_status place_parts(moe_dispatcher *d, int64_t tokens) {
  int64_t ep = d->mesh->ep;
  if (d->part_tokens == tokens) return MOE_OK;
  int32_t *slot = malloc((size_t)(tokens * ep) * sizeof *slot);
  if (!slot)
    return moe_fail(MOE_NO_MEMORY, "out of memory: places of %lld rows", (long long)(tokens * ep));
  for (int64_t i = 0; i < tokens * ep; i++) slot[i] = (int32_t)(i % ep * tokens + i / ep);
  moe_status status =
      moe_device_upload(d->dev, d->part_slot.data, slot, tokens * ep * (int64_t)sizeof *slot);
  if (status == MOE_OK) status = moe_device_sync(d->dev);
  free(slot);
  d->part_tokens = tokens;
  return status;
}

/* out [t, width] = the sum over ranks of chunk `rank` of their x [ep t, width]. */
static moe_status scatter_sum(moe_dispatcher *d, moe_tensor x, moe_tensor out) {
  int64_t rows = x.shape[0], tokens = out.shape[0];
  moe_tensor parts = moe_tensor_2d(d->parts.data, x.dtype, rows, x.shape[1]);
  MOE_TRY(place_parts(d, tokens));
  double start = moe_clock_s();
  MOE_TRY(moe_comm_exchange_chunks(d->mesh->experts, x, parts));
  add_seconds(d, start);
  d->bytes += (double)((d->mesh->ep - 1) * moe_tensor_bytes(out));
  return moe_combine_rows(d->dev, parts, moe_tensor_rows(d->part_slot, 0, tokens), 0, 0, out);
}

/* Sent rows to the experts' ranks. */
static moe_status send_rows(moe_dispatcher *d, const moe_route *r, moe_tensor from, moe_tensor to) {
  double start = moe_clock_s();
  int me = moe_comm_rank(d->mesh->experts);
  MOE_TRY(moe_comm_all_to_all(d->mesh->experts, from, r->send_rows, r->send_at, to, r->recv_rows,
                              r->recv_at));
  add_seconds(d, start);
  d->bytes += (double)((from.shape[0] - r->send_rows[me]) * width_bytes(from));
  return MOE_OK;
}

/* Received rows back to where they came from. */
static moe_status send_rows_back(moe_dispatcher *d, const moe_route *r, moe_tensor from,
                                 moe_tensor to) {
  double start = moe_clock_s();
  int me = moe_comm_rank(d->mesh->experts);
  MOE_TRY(moe_comm_all_to_all(d->mesh->experts, from, r->recv_rows, r->recv_at, to, r->send_rows,
                              r->send_at));
  add_seconds(d, start);
  d->bytes += (double)((from.shape[0] - r->recv_rows[me]) * width_bytes(from));
  return MOE_OK;
}

void moe_dispatch_cost(moe_dispatcher *d, double *seconds, double *bytes) {
  for (int64_t i = 0; i < d->wait_count; i++)
    d->seconds += moe_device_between(d->dev, &d->waits[i][0], &d->waits[i][1]);
  d->wait_count = 0;
  *seconds = d->seconds;
  *bytes = d->bytes;
  d->seconds = d->bytes = 0.0;
}

/* ---- the two directions -------------------------------------------------------------------- */

static int64_t rows_sent(const moe_dispatcher *d, const moe_route *r) {
  return sum(r->send_rows, d->mesh->ep);
}

static moe_status copy_unless_same(moe_device *dev, moe_tensor dst, moe_tensor src) {
  return dst.data == src.data ? MOE_OK : moe_copy(dev, dst, src);
}

/* rows [R, D] = x [t, D] of each row's token. */
static moe_status carry_out(moe_dispatcher *d, const moe_route *r, moe_tensor x, moe_tensor rows) {
  if (d->exchange == MOE_DISPATCH_NONE) return copy_unless_same(d->dev, rows, x);
  if (d->exchange == MOE_DISPATCH_ALLGATHER) return gather(d, x, rows);
  int64_t sent = rows_sent(d, r);
  moe_tensor buffer = moe_tensor_rows(d->rows, 0, sent);
  MOE_TRY(moe_gather_rows(d->dev, x, moe_tensor_rows(r->sent_token, 0, sent), 1, buffer));
  return send_rows(d, r, buffer, rows);
}

/* out [t, D] = sum over the token's rows, in f32 and in a fixed order. */
static moe_status carry_back(moe_dispatcher *d, const moe_route *r, moe_tensor rows,
                             moe_tensor out) {
  if (d->exchange == MOE_DISPATCH_NONE) return copy_unless_same(d->dev, out, rows);
  if (d->exchange == MOE_DISPATCH_ALLGATHER) return scatter_sum(d, rows, out);
  int64_t sent = rows_sent(d, r);
  moe_tensor buffer = moe_tensor_rows(d->rows, 0, sent);
  MOE_TRY(send_rows_back(d, r, rows, buffer));
  return moe_combine_rows(d->dev, buffer, moe_tensor_rows(r->slot, 0, r->tokens), 0, 0, out);
}

/* dgates [t, K] from row_dgates [R, K]: each gate was used on one rank only. */
static moe_status carry_gates_back(moe_dispatcher *d, const moe_route *r, moe_tensor row_dgates,
                                   moe_tensor dgates) {
  if (d->exchange == MOE_DISPATCH_NONE) return copy_unless_same(d->dev, dgates, row_dgates);
  if (d->exchange == MOE_DISPATCH_ALLGATHER)
    return moe_comm_reduce_scatter_to(d->mesh->experts, row_dgates, dgates);
  int64_t sent = rows_sent(d, r);
  moe_tensor buffer = moe_tensor_rows(d->row_gates, 0, sent);
  MOE_TRY(send_rows_back(d, r, row_dgates, buffer));
  moe_tensor values = moe_tensor_1d(buffer.data, MOE_F32, moe_tensor_count(buffer));
  return moe_combine_gates(d->dev, values, moe_tensor_rows(r->gate_slot, 0, r->tokens), 0, 0,
                           dgates);
}

/* ---- send ---------------------------------------------------------------------------------- */

static void set_rows(moe_route *r, int64_t rows) {
  r->rows = rows;
  r->experts = moe_tensor_rows(r->experts_room, 0, rows);
  r->gates = moe_tensor_rows(r->gates_room, 0, rows);
  r->x = moe_tensor_rows(r->x_room, 0, rows);
}

/* Everyone receives everything; what is not for my experts is masked. */
static moe_status send_allgather(moe_dispatcher *d, moe_tensor x, moe_tensor experts,
                                 moe_tensor gates, moe_route *r) {
  moe_range own = d->mesh->owned;
  set_rows(r, x.shape[0] * d->mesh->ep);
  if (!r->x_is_sent) MOE_TRY(carry_out(d, r, x, r->x));
  r->x_is_sent = false;
  MOE_TRY(gather(d, experts, r->experts));
  MOE_TRY(gather(d, gates, r->gates));
  return moe_localize_experts(d->dev, r->experts, r->gates, own.begin, moe_range_size(own));
}

/* Tell everyone how many rows to expect from whom. */
static moe_status exchange_counts(moe_dispatcher *d, moe_route *r) {
  int ep = d->mesh->ep, me = moe_comm_rank(d->mesh->experts);
  double start = moe_clock_s();
  MOE_TRY(moe_comm_host_all_gather(d->mesh->experts, d->plan.rows, ep * (int64_t)sizeof *d->counts,
                                   d->counts));
  add_seconds(d, start);
  int64_t at = 0;
  for (int from = 0; from < ep; from++) {
    r->send_rows[from] = d->plan.rows[from];
    r->send_at[from] = d->plan.at[from];
    r->recv_rows[from] = d->counts[from * ep + me];
    r->recv_at[from] = at;
    at += r->recv_rows[from];
  }
  if (at > moe_dispatch_max_rows(d))
    return moe_fail(MOE_INVALID, "MOE_DEDUP: only some ranks have it: set it on all or on none");
  set_rows(r, at);
  return MOE_OK;
}

static moe_status upload_i32(moe_dispatcher *d, moe_tensor to, const int32_t *from, int64_t n) {
  return n == 0 ? MOE_OK : moe_device_upload(d->dev, to.data, from, n * (int64_t)sizeof(int32_t));
}

/* The plan's lists to the device. The host's copies stay untouched until the next send has waited
 * for its experts, so these transfers need no wait of their own. */
static moe_status upload_plan(moe_dispatcher *d, moe_route *r, int64_t tokens, int64_t sent) {
  const moe_dispatch_plan *p = &d->plan;
  MOE_TRY(upload_i32(d, r->sent_token, p->token, sent));
  MOE_TRY(upload_i32(d, r->slot, p->slot, tokens * p->fan));
  MOE_TRY(upload_i32(d, r->gate_slot, p->gate_slot, tokens * p->top_k));
  MOE_TRY(upload_i32(d, d->row_experts, p->row_experts, sent * p->top_k));
  return upload_i32(d, d->gate_places, p->row_gates, sent * p->top_k);
}

static moe_status send_alltoall(moe_dispatcher *d, moe_tensor x, moe_tensor experts,
                                moe_tensor gates, moe_route *r) {
  int64_t sent = 0, tokens = x.shape[0], k = d->shape.top_k;
  MOE_TRY(moe_device_download(d->dev, d->plan.chosen, experts.data, moe_tensor_bytes(experts)));
  MOE_TRY(moe_device_sync(d->dev));
  MOE_TRY(moe_dispatch_plan_make(&d->plan, tokens, &sent));
  MOE_TRY(upload_plan(d, r, tokens, sent));
  MOE_TRY(exchange_counts(d, r));

  moe_tensor row_gates = moe_tensor_rows(d->row_gates, 0, sent);
  MOE_TRY(moe_gather_gates(d->dev, gates, moe_tensor_rows(d->gate_places, 0, sent * k),
                           moe_tensor_1d(row_gates.data, MOE_F32, sent * k)));
  MOE_TRY(send_rows(d, r, moe_tensor_rows(d->row_experts, 0, sent), r->experts));
  MOE_TRY(send_rows(d, r, row_gates, r->gates));
  return carry_out(d, r, x, r->x);
}

/* ---- the public calls ---------------------------------------------------------------------- */

/* Is t [rows, width] of this type? */
static moe_status check_2d(const char *name, moe_tensor t, moe_dtype dtype, int64_t rows,
                           int64_t width) {
  if (t.dims == 2 && t.dtype == dtype && t.shape[0] == rows && t.shape[1] == width) return MOE_OK;
  return moe_fail(MOE_INVALID, "dispatch: %s is %s [%lld, %lld]: it must be %s [%lld, %lld]", name,
                  moe_dtype_name(t.dtype), (long long)t.shape[0], (long long)t.shape[1],
                  moe_dtype_name(dtype), (long long)rows, (long long)width);
}

/* The side of the sent tokens and the side of the received rows, both act of width D. */
static moe_status check_sides(const moe_dispatcher *d, const moe_route *r, moe_tensor tokens,
                              moe_tensor rows) {
  const moe_dispatch_shape *s = &d->shape;
  MOE_TRY(check_2d("the tokens' tensor", tokens, s->dtype, r->tokens, s->hidden));
  return check_2d("the rows' tensor", rows, s->dtype, r->rows, s->hidden);
}

moe_status moe_dispatch_send_early(moe_dispatcher *d, moe_tensor x, moe_route *route) {
  const moe_dispatch_shape *s = &d->shape;
  if (d->exchange != MOE_DISPATCH_ALLGATHER) return MOE_OK;
  int64_t t = moe_min64(x.shape[0], s->tokens);
  MOE_TRY(check_2d("x", x, s->dtype, t, s->hidden));
  set_rows(route, t * d->mesh->ep);
  MOE_TRY(enter_lane(d));
  moe_status status = leave_lane(d, carry_out(d, route, x, route->x));
  route->x_is_sent = status == MOE_OK;
  return status;
}

moe_status moe_dispatch_send(moe_dispatcher *d, moe_tensor x, moe_tensor experts, moe_tensor gates,
                             moe_route *route) {
  const moe_dispatch_shape *s = &d->shape;
  int64_t t = moe_min64(x.shape[0], s->tokens);
  MOE_TRY(check_2d("x", x, s->dtype, t, s->hidden));
  MOE_TRY(check_2d("experts", experts, MOE_I32, t, s->top_k));
  MOE_TRY(check_2d("gates", gates, MOE_F32, t, s->top_k));
  route->tokens = t;
  MOE_TRY(enter_lane(d));
  if (d->exchange == MOE_DISPATCH_ALLTOALL)
    return leave_lane(d, send_alltoall(d, x, experts, gates, route));
  if (d->exchange == MOE_DISPATCH_ALLGATHER)
    return leave_lane(d, send_allgather(d, x, experts, gates, route));
  route->rows = t;
  route->x = x;
  route->experts = experts;
  route->gates = gates;
  return MOE_OK;
}

moe_status moe_dispatch_return(moe_dispatcher *d, const moe_route *route, moe_tensor rows,
                               moe_tensor out) {
  MOE_TRY(check_sides(d, route, out, rows));
  MOE_TRY(enter_lane(d));
  return leave_lane(d, carry_back(d, route, rows, out));
}

moe_status moe_dispatch_send_grad(moe_dispatcher *d, const moe_route *route, moe_tensor dout,
                                  moe_tensor rows) {
  MOE_TRY(check_sides(d, route, dout, rows));
  MOE_TRY(enter_lane(d));
  return leave_lane(d, carry_out(d, route, dout, rows));
}

moe_status moe_dispatch_return_grad(moe_dispatcher *d, const moe_route *route, moe_tensor rows,
                                    moe_tensor row_dgates, moe_tensor dx, moe_tensor dgates) {
  MOE_TRY(check_sides(d, route, dx, rows));
  MOE_TRY(check_2d("row_dgates", row_dgates, MOE_F32, route->rows, d->shape.top_k));
  MOE_TRY(check_2d("dgates", dgates, MOE_F32, route->tokens, d->shape.top_k));
  MOE_TRY(enter_lane(d));
  moe_status status = carry_gates_back(d, route, row_dgates, dgates);
  if (status == MOE_OK) status = carry_back(d, route, rows, dx);
  return leave_lane(d, status);
}
