/* One call on two devices: the CPU backend is the oracle of every CUDA kernel.
 *
 * Tensors come in pairs with the same contents; outputs start as NaN. BOTH(call) makes the call on
 * each device, with `dev` the device and `s` the side: BOTH(moe_add(dev, y.t[s], x.t[s])). */
#ifndef MOE_TESTS_GPU_BOTH_H
#define MOE_TESTS_GPU_BOTH_H

#include "kernels/ops.h"

enum { CPU_SIDE, GPU_SIDE, SIDES };
extern moe_device *both_dev[SIDES];

/* Open both devices (tests without a GPU are skipped); release everything at the end. */
void both_open(void);
void both_close(void);

typedef struct {
  moe_tensor t[SIDES];
  const char *name;
} both;

both both_random(const char *name, moe_dtype dtype, int dims, const int64_t *shape, double std);
both both_output(const char *name, moe_dtype dtype, int dims, const int64_t *shape);
/* Whole numbers in [low, high). */
both both_ints(const char *name, int dims, const int64_t *shape, int64_t low, int64_t high);
both both_none(void);
#define SHAPE(...)                                                         \
  (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]) { \
    __VA_ARGS__                                                            \
  }

/* Make the GPU's copy of x equal to the CPU's. */
void both_align(both x);
/* |gpu - cpu| / |cpu| (2-norms) within the tolerance and no NaN; integers exactly. */
void both_close_to(both x, double tolerance, const char *file, int line);
#define AGREE(x, tolerance) both_close_to((x), (tolerance), __FILE__, __LINE__)
/* As AGREE, for the first `rows` rows. */
void both_rows_close_to(both x, int64_t rows, double tolerance, const char *file, int line);
#define ROWS_AGREE(x, rows, tolerance) \
  both_rows_close_to((x), (rows), (tolerance), __FILE__, __LINE__)
/* A hash of the GPU's bytes: equal from run to run. */
uint64_t both_hash(both x);

void both_ok(moe_status status, const char *call, const char *file, int line);
#define BOTH(call)                              \
  for (int s = CPU_SIDE; s < SIDES; s++) {      \
    moe_device *dev = both_dev[s];              \
    both_ok((call), #call, __FILE__, __LINE__); \
  }
#define ON_GPU(call)                            \
  do {                                          \
    enum { s = GPU_SIDE };                      \
    moe_device *dev = both_dev[s];              \
    both_ok((call), #call, __FILE__, __LINE__); \
  } while (0)

#endif
