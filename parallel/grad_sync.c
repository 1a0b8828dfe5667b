/* Gradient reduction: each pool in one collective, or in buckets while backward goes on; then the
 * global norm from everyone's own chunks.
 *
 * After the sums, the chunk of a pool that a rank is responsible for is complete on that rank and
 * is nobody else's, so adding the chunks' squares over the world counts each parameter once. */
#include "parallel/grad_sync.h"

#include "kernels/lanes.h"
#include "kernels/ops.h"

int64_t moe_grad_bucket = 32 << 20;

int64_t moe_pool_padded(int64_t count, int size) {
  int64_t unit = (int64_t)size * MOE_POOL_ALIGN;
  return (count + unit - 1) / unit * unit;
}

moe_range moe_pool_chunk(int64_t padded, int size, int rank) {
  int64_t n = padded / size;
  moe_range r = {rank * n, (rank + 1) * n};
  return r;
}

moe_status moe_grad_sum_from(moe_device *dev, moe_grad_pool *pool, int64_t begin) {
  int64_t end = moe_tensor_count(pool->grads) - pool->summed;
  int64_t bytes = (end - begin) * moe_dtype_size(pool->grads.dtype);
  if (!pool->beside || pool->shard || bytes <= 0) return MOE_OK;
  if (bytes < moe_grad_bucket && begin > 0) return MOE_OK;
  moe_lane before = moe_device_use_lane(dev, MOE_LANE_REDUCE);
  moe_status status = moe_device_wait_lane(dev, before);
  if (status == MOE_OK)
    status = moe_comm_all_reduce(pool->beside, moe_tensor_rows(pool->grads, begin, end - begin),
                                 MOE_SUM);
  moe_device_use_lane(dev, before);
  pool->summed += end - begin;
  return status;
}

static moe_status sync_pool(moe_device *dev, moe_grad_pool *pool, moe_tensor sum_squares) {
  int size = moe_comm_size(pool->group), rank = moe_comm_rank(pool->group);
  int64_t count = moe_tensor_count(pool->grads);
  bool type = pool->grads.dtype == MOE_F32 || pool->grads.dtype == MOE_BF16;
  if (!type || pool->grads.dims != 1 || count != moe_pool_padded(count, size))
    return moe_fail(
        MOE_INVALID,
        "moe_grad_sync: a pool of %lld %s gradients is not a padded f32 or bf16 pool of %d "
        "ranks",
        (long long)count, moe_dtype_name(pool->grads.dtype), size);
  if (pool->counted && size > 1)
    return moe_fail(MOE_INVALID,
                    "moe_grad_sync: the squares of a pool that %d ranks share are not "
                    "known before its sum is",
                    size);
  if (count == 0 || pool->counted) return MOE_OK;
  moe_tensor left = moe_tensor_rows(pool->grads, 0, count - pool->summed);
  if (pool->shard)
    MOE_TRY(moe_comm_reduce_scatter(pool->group, pool->grads));
  else
    MOE_TRY(moe_comm_all_reduce(pool->group, left, MOE_SUM));
  pool->summed = 0;
  moe_range own = moe_pool_chunk(count, size, rank);
  return moe_sum_squares(dev, moe_tensor_rows(pool->grads, own.begin, moe_range_size(own)),
                         sum_squares);
}

moe_status moe_grad_sync(moe_device *dev, moe_comm *world, moe_grad_pool *pools, int n,
                         moe_tensor sum_squares) {
  bool begun = false, beside = false;
  for (int i = 0; i < n; i++) {
    begun = begun || pools[i].counted;
    beside = beside || pools[i].beside;
  }
  if (beside) MOE_TRY(moe_device_wait_lane(dev, MOE_LANE_REDUCE));
  if (!begun) MOE_TRY(moe_zero(dev, sum_squares));
  for (int i = 0; i < n; i++) MOE_TRY(sync_pool(dev, &pools[i], sum_squares));
  return moe_comm_all_reduce(world, sum_squares, MOE_SUM);
}
