/* Setting a dispatcher up: which exchange it will use, its buffers, and room for routes. */
#include <stdlib.h>
#include <string.h>

#include "core/base/config.h"
#include "core/base/integers.h"
#include "parallel/dispatch_state.h"

/* All-gather moves ep - 1 rows per token whatever the routing, in one call and without waiting for
 * row counts; it is taken unless all-to-all saves more than a tenth of that. On a GPU it must save
 * more: the copy engines carry an all-gather for nothing, while planning on the host leaves the GPU
 * idle (docs/performance.md: at 4 ranks, where 0.73 of the rows would travel, 50 ms of a step). */
static moe_dispatch_kind choose_exchange(const moe_device *dev, const moe_mesh *mesh,
                                         moe_dispatch_shape shape) {
  if (mesh->ep == 1) return MOE_DISPATCH_NONE;
  if (shape.exchange == MOE_EXCHANGE_ALLTOALL) return MOE_DISPATCH_ALLTOALL;
  if (shape.exchange == MOE_EXCHANGE_ALLGATHER) return MOE_DISPATCH_ALLGATHER;
  double expected = moe_dispatch_expected_rows(mesh->ep, mesh->num_experts, shape.top_k);
  double most = moe_device_is_host(dev) ? 0.9 : 0.4;
  return expected < most * (mesh->ep - 1) ? MOE_DISPATCH_ALLTOALL : MOE_DISPATCH_ALLGATHER;
}

/* A benchmark's wish: see what sending a token once per rank is worth. */
static bool wants_per_expert(moe_dispatch_kind exchange) {
  const char *wish = getenv("MOE_DEDUP");
  return exchange == MOE_DISPATCH_ALLTOALL && wish && strcmp(wish, "off") == 0;
}

/* Indices of rows and pairs are int32 on the device. */
static moe_status check_shape(const moe_dispatcher *d) {
  const moe_mesh *mesh = d->mesh;
  moe_dispatch_shape s = d->shape;
  int64_t places = s.top_k * (d->per_expert ? s.top_k : 1); /* of experts, per token */
  if (s.tokens < 1 || s.hidden < 1 || s.top_k < 1 || s.top_k > mesh->num_experts)
    return moe_fail(
        MOE_INVALID, "moe_dispatcher_create: %lld tokens of %lld, %lld of %lld experts each",
        (long long)s.tokens, (long long)s.hidden, (long long)s.top_k, (long long)mesh->num_experts);
  if (s.tokens > INT32_MAX / mesh->ep / places)
    return moe_fail(MOE_USAGE,
                    "train.micro_batch: %lld tokens * %d ranks * %lld experts per token exceed "
                    "2^31: take a smaller micro_batch, sequence_length or parallel.ep",
                    (long long)s.tokens, mesh->ep, (long long)places);
  return MOE_OK;
}

static void take_host(moe_dispatcher *d, moe_arena *arena) {
  int64_t ep = d->mesh->ep;
  moe_dispatch_plan_take(&d->plan, d->mesh->ep, d->per_expert, d->mesh->num_experts, d->shape.top_k,
                         d->shape.tokens, arena);
  d->counts = moe_arena_take(arena, ep * ep * (int64_t)sizeof *d->counts);
}

static moe_status take_alltoall(moe_dispatcher *d, moe_arena *device) {
  moe_arena host = {.measuring = true};
  take_host(d, &host);
  host.size = host.used;
  d->host = moe_device_alloc_host(d->dev, host.size);
  if (!d->host)
    return moe_fail(MOE_NO_MEMORY, "out of memory: %lld bytes of host memory to plan dispatch",
                    (long long)host.size);
  host = (moe_arena){.base = d->host, .size = host.size};
  take_host(d, &host);

  int64_t rows = d->shape.tokens * d->plan.fan, k = d->shape.top_k;
  d->rows = moe_arena_tensor_2d(device, d->shape.dtype, rows, d->shape.hidden);
  d->row_gates = moe_arena_tensor_2d(device, MOE_F32, rows, k);
  d->row_experts = moe_arena_tensor_2d(device, MOE_I32, rows, k);
  d->gate_places = moe_arena_tensor_1d(device, MOE_I32, rows * k);
  return MOE_OK;
}

static void take_allgather(moe_dispatcher *d, moe_arena *device) {
  int64_t ep = d->mesh->ep, t = d->shape.tokens;
  d->parts = moe_arena_tensor_2d(device, d->shape.dtype, ep * t, d->shape.hidden);
  d->part_slot = moe_arena_tensor_2d(device, MOE_I32, t, ep);
}

moe_status moe_dispatcher_create(moe_device *dev, const moe_mesh *mesh, moe_dispatch_shape shape,
                                 moe_memory *memory, moe_dispatcher **out) {
  *out = NULL;
  moe_dispatcher *d = calloc(1, sizeof *d);
  if (!d) return moe_fail(MOE_NO_MEMORY, "out of memory: making a dispatcher");
  d->dev = dev;
  d->mesh = mesh;
  d->shape = shape;
  d->exchange = choose_exchange(dev, mesh, shape);
  d->per_expert = wants_per_expert(d->exchange);
  moe_arena *arena = &memory->arena[MOE_MEM_EXCHANGE];
  moe_status status = check_shape(d);
  if (status == MOE_OK && d->exchange == MOE_DISPATCH_ALLGATHER) take_allgather(d, arena);
  if (status == MOE_OK && d->exchange == MOE_DISPATCH_ALLTOALL) status = take_alltoall(d, arena);
  if (status == MOE_OK)
    *out = d;
  else
    moe_dispatcher_destroy(d);
  return status;
}

void moe_dispatcher_destroy(moe_dispatcher *d) {
  if (!d) return;
  if (d->host) moe_device_free_host(d->dev, d->host);
  for (int64_t i = 0; i < d->wait_room; i++) {
    moe_device_forget(d->dev, &d->waits[i][0]);
    moe_device_forget(d->dev, &d->waits[i][1]);
  }
  free(d->waits);
  free(d);
}

moe_status moe_route_create(moe_dispatcher *d, moe_arena *arena, moe_route *out) {
  int64_t t = d->shape.tokens, k = d->shape.top_k, most = moe_dispatch_max_rows(d);
  *out = (moe_route){.rows = 0};
  if (d->exchange == MOE_DISPATCH_NONE) return MOE_OK;
  out->experts_room = moe_arena_tensor_2d(arena, MOE_I32, most, k);
  out->gates_room = moe_arena_tensor_2d(arena, MOE_F32, most, k);
  out->x_room = moe_arena_tensor_2d(arena, d->shape.dtype, most, d->shape.hidden);
  if (d->exchange == MOE_DISPATCH_ALLGATHER) return MOE_OK;

  int64_t ep = d->mesh->ep;
  out->sent_token = moe_arena_tensor_1d(arena, MOE_I32, t * d->plan.fan);
  out->slot = moe_arena_tensor_2d(arena, MOE_I32, t, d->plan.fan);
  out->gate_slot = moe_arena_tensor_2d(arena, MOE_I32, t, k);
  out->send_rows = calloc(4 * (size_t)ep, sizeof *out->send_rows);
  if (!out->send_rows) return moe_fail(MOE_NO_MEMORY, "out of memory: making a route");
  out->send_at = out->send_rows + ep;
  out->recv_rows = out->send_rows + 2 * ep;
  out->recv_at = out->send_rows + 3 * ep;
  return MOE_OK;
}

void moe_route_destroy(moe_route *r) {
  if (!r) return;
  free(r->send_rows);
  *r = (moe_route){.rows = 0};
}

int64_t moe_dispatch_max_rows(const moe_dispatcher *d) {
  int64_t most = d->shape.tokens * d->mesh->ep, owned = moe_range_size(d->mesh->owned);
  return d->per_expert ? most * moe_min64(owned, d->shape.top_k) : most;
}

const char *moe_dispatch_exchange_name(const moe_dispatcher *d) {
  static const char *const names[] = {"none", "all-to-all", "all-gather"};
  return d->per_expert ? "all-to-all per expert" : names[d->exchange];
}
