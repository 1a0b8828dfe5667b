/* Who owns which expert: contiguous ranges whose lengths differ by at most one. Local. */
#ifndef MOE_PARALLEL_SHARD_H
#define MOE_PARALLEL_SHARD_H

#include <stdint.h>

typedef struct {
  int64_t begin, end; /* [begin, end) */
} moe_range;

/* Part `rank` of `n` things over `parts` owners: [floor(rank n / parts), floor((rank+1) n /
 * parts)). */
static inline moe_range moe_shard_range(int64_t n, int parts, int rank) {
  moe_range r = {rank * n / parts, (rank + 1) * n / parts};
  return r;
}
/* The owner of thing i in that division. */
static inline int moe_shard_owner(int64_t n, int parts, int64_t i) {
  return (int)(((i + 1) * parts - 1) / n);
}
static inline int64_t moe_range_size(moe_range r) {
  return r.end - r.begin;
}
/* What both have; its end may lie before its begin when that is nothing. */
static inline moe_range moe_range_intersect(moe_range a, moe_range b) {
  moe_range r = {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
  return r;
}

#endif
