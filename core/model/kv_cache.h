/* The key/value cache: what attention needs of every token so far, for each layer and sequence.
 *
 * With G key/value heads of d elements a token costs 2 L G d elements (6.9b in bf16: 7.5 KiB). A
 * slot holds one sequence; slots are reused, and a cache never moves or grows. */
#ifndef MOE_CORE_MODEL_KV_CACHE_H
#define MOE_CORE_MODEL_KV_CACHE_H

#include "core/base/arena.h"
#include "core/model/params.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_tensor keys, values; /* [L, slots, room, G d] act */
} moe_kv_cache;

/* Bytes of a cache; a double, because a request may exceed 64 bits. */
double moe_kv_cache_bytes(const moe_dims *dims, int64_t slots, int64_t room, moe_dtype dtype);
/* Local. Room for `room` tokens in each of `slots` sequences. */
moe_kv_cache moe_kv_cache_create(moe_arena *arena, const moe_dims *dims, int64_t slots,
                                 int64_t room, moe_dtype dtype);
/* A layer's part for slots [first, first + count): [count, room, G d]. */
moe_tensor moe_kv_cache_slots(moe_tensor keys_or_values, int64_t layer, int64_t first,
                              int64_t count);

#ifdef __cplusplus
}
#endif
#endif
