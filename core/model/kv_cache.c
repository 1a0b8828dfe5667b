/* Shapes of the key/value cache. Its contents are moe_attention_cached's business. */
#include "core/model/kv_cache.h"

double moe_kv_cache_bytes(const moe_dims *d, int64_t slots, int64_t room, moe_dtype dtype) {
  return 2.0 * (double)d->layers * (double)slots * (double)room *
         (double)(d->kv_heads * d->head_dim * moe_dtype_size(dtype));
}

static moe_tensor create(moe_arena *arena, const moe_dims *d, int64_t slots, int64_t room,
                         moe_dtype dtype) {
  int64_t width = d->kv_heads * d->head_dim;
  moe_tensor t = {.dtype = dtype, .dims = 4, .shape = {d->layers, slots, room, width}};
  t.data = moe_arena_take(arena, moe_tensor_bytes(t));
  return t;
}

moe_kv_cache moe_kv_cache_create(moe_arena *arena, const moe_dims *dims, int64_t slots,
                                 int64_t room, moe_dtype dtype) {
  moe_kv_cache c = {.keys = create(arena, dims, slots, room, dtype),
                    .values = create(arena, dims, slots, room, dtype)};
  return c;
}

moe_tensor moe_kv_cache_slots(moe_tensor t, int64_t layer, int64_t first, int64_t count) {
  int64_t sequence = t.shape[2] * t.shape[3];
  int64_t at = (layer * t.shape[1] + first) * sequence * moe_dtype_size(t.dtype);
  return moe_tensor_3d((char *)t.data + at, t.dtype, count, t.shape[2], t.shape[3]);
}
