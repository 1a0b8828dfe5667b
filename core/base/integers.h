/* Sizes: the smaller, the larger, the next multiple. */
#ifndef MOE_CORE_BASE_INTEGERS_H
#define MOE_CORE_BASE_INTEGERS_H

#include <stdint.h>

static inline int64_t moe_min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static inline int64_t moe_max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* n >= 0 */
static inline int64_t moe_round_up64(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

#endif
