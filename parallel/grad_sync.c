/* Gradient reduction: each pool in one collective, or in buckets while backward goes on; then the
 * global norm from everyone's own chunks.
 *
 * Sums beside backward are NCCL's kernels where every rank needs them. Where only a bucket's owner
 * does (zero1) copies bring it everyone's part, and a short kernel of ours adds them in the order
 * of ranks, in f32, rounded once: the bits of MPI's reduce-scatter. The kernels of backward keep
 * every multiprocessor meanwhile. What a bucket cost before it began, a wait for all ranks and one
 * for a multiprocessor, is why buckets are large.
 *
 * Groups of `beside` are used on MOE_LANE_REDUCE alone, all others on MAIN or on EXCHANGE: a lane
 * has one order, the same on all ranks, so no two of them wait for each other crosswise.
 *
 * After the sums, the chunk of a pool that a rank is responsible for is complete on that rank and
 * is nobody else's, so adding the chunks' squares over the world counts each parameter once. */
#include "parallel/grad_sync.h"

#include "core/base/integers.h"
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

int64_t moe_pool_staging(int64_t padded, int size, moe_dtype dtype) {
  int64_t most = MOE_STAGING / 2 / size / moe_dtype_size(dtype) / MOE_POOL_ALIGN * MOE_POOL_ALIGN;
  int64_t quarter = moe_round_up64((padded / size + 3) / 4, MOE_POOL_ALIGN);
  return 2 * size * moe_min64(moe_max64(most, MOE_POOL_ALIGN), quarter);
}

/* A part of the owner's chunk: every rank's to the owner, who adds them to its own, which need not
 * move. */
static moe_status sum_at_owner(moe_device *dev, moe_grad_pool *pool, moe_range bucket, int owner) {
  int64_t n = moe_range_size(bucket);
  moe_tensor part = moe_tensor_rows(pool->grads, bucket.begin, n);
  moe_tensor parts = moe_tensor_2d(pool->staging.data, part.dtype, moe_comm_size(pool->beside), n);
  if (owner != moe_comm_rank(pool->beside))
    return moe_comm_gather(pool->beside, part, parts, owner);
  MOE_TRY(moe_comm_gather(pool->beside, moe_tensor_rows(parts, owner, 1), parts, owner));
  return moe_sum_rows(dev, parts, owner, part, pool->squares);
}

/* Buckets of what is not summed yet, from the end, as long as they begin at `begin` or after. The
 * owner's next bucket arrives where this one lies, but no rank sends it before all are there, the
 * owner with its sum behind it. */
static moe_status sum_at_owners(moe_device *dev, moe_grad_pool *pool, int64_t begin) {
  int size = moe_comm_size(pool->beside), owner = size - 1;
  int64_t count = moe_tensor_count(pool->grads);
  int64_t most = moe_tensor_count(pool->staging) / size;
  while (pool->summed < count) {
    moe_range bucket = {0, count - pool->summed};
    while (moe_pool_chunk(count, size, owner).begin >= bucket.end) owner--;
    bucket.begin = moe_max64(bucket.end - most, moe_pool_chunk(count, size, owner).begin);
    if (bucket.begin < begin) break;
    MOE_TRY(sum_at_owner(dev, pool, bucket, owner));
    pool->summed += moe_range_size(bucket);
  }
  return MOE_OK;
}

static bool goes_to_owners(const moe_grad_pool *pool) {
  return moe_tensor_present(pool->staging) && moe_comm_size(pool->beside) <= MOE_OWNER_RANKS;
}

/* Whether the squares of a pool are known with its sums. */
static bool adds_squares(const moe_grad_pool *pool) {
  return goes_to_owners(pool) && moe_tensor_present(pool->squares);
}

static moe_status sum_everywhere(moe_grad_pool *pool, int64_t begin) {
  int64_t n = moe_tensor_count(pool->grads) - pool->summed - begin;
  if (n * moe_dtype_size(pool->grads.dtype) < moe_grad_bucket && begin > 0) return MOE_OK;
  pool->summed += n;
  return moe_comm_all_reduce(pool->beside, moe_tensor_rows(pool->grads, begin, n), MOE_SUM);
}

moe_status moe_grad_sum_from(moe_device *dev, moe_grad_pool *pool, int64_t begin) {
  if (!pool->beside || begin >= moe_tensor_count(pool->grads) - pool->summed) return MOE_OK;
  if (pool->shard && !goes_to_owners(pool)) return MOE_OK;
  moe_lane before = moe_device_use_lane(dev, MOE_LANE_REDUCE);
  moe_status status = moe_device_wait_lane(dev, before);
  if (status == MOE_OK)
    status = pool->shard ? sum_at_owners(dev, pool, begin) : sum_everywhere(pool, begin);
  moe_device_use_lane(dev, before);
  return status;
}

moe_status moe_grad_final(moe_device *dev, moe_grad_pool *pool, moe_tensor first) {
  int64_t bytes = (const char *)first.data - (const char *)pool->grads.data;
  return moe_grad_sum_from(dev, pool, bytes / moe_dtype_size(first.dtype));
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
  bool known = pool->summed == count && adds_squares(pool);
  if (!pool->shard)
    MOE_TRY(moe_comm_all_reduce(pool->group, left, MOE_SUM));
  else if (pool->summed < count)
    MOE_TRY(moe_comm_reduce_scatter(pool->group, pool->grads));
  pool->summed = 0;
  if (known) return MOE_OK;
  moe_range own = moe_pool_chunk(count, size, rank);
  return moe_sum_squares(dev, moe_tensor_rows(pool->grads, own.begin, moe_range_size(own)),
                         sum_squares);
}

moe_status moe_grad_sync(moe_device *dev, moe_comm *world, moe_grad_pool *pools, int n,
                         moe_tensor sum_squares) {
  bool begun = false, beside = false;
  for (int i = 0; i < n; i++) {
    begun = begun || pools[i].counted || adds_squares(&pools[i]);
    beside = beside || pools[i].beside;
    if (pools[i].shard) MOE_TRY(moe_grad_sum_from(dev, &pools[i], 0));
  }
  if (beside) MOE_TRY(moe_device_wait_lane(dev, MOE_LANE_REDUCE));
  if (!begun) MOE_TRY(moe_zero(dev, sum_squares));
  for (int i = 0; i < n; i++) MOE_TRY(sync_pool(dev, &pools[i], sum_squares));
  return moe_comm_all_reduce(world, sum_squares, MOE_SUM);
}
