/* What the worker programs share: a rank of a small job, on the CPU but where it is said, and
 * checks that end the whole job with a message naming the line. The last line of a good job is "N
 * checks passed", from rank 0; the test that started it asks for that line. */
#ifndef MOE_TESTS_MPI_WORKER_H
#define MOE_TESTS_MPI_WORKER_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "parallel/comm.h"

typedef struct {
  moe_device *dev;
  moe_comm *world;
  int rank, size;
} worker;

static long worker_checks;

/* Hold, or end the job. */
#define REQUIRE(condition)                                                                    \
  do {                                                                                        \
    worker_checks++;                                                                          \
    if (!(condition))                                                                         \
      moe_abort(moe_fail(MOE_FAILED, "%s:%d: not true: %s", __FILE__, __LINE__, #condition)); \
  } while (0)

/* Succeed, or end the job with the call's own message. */
#define OK(call)                                   \
  do {                                             \
    moe_status worker_status_ = (call);            \
    worker_checks++;                               \
    if (worker_status_) moe_abort(worker_status_); \
  } while (0)

static inline worker worker_open_on(moe_device_kind kind, int *argc, char ***argv) {
  worker w = {0};
  moe_device_options options = {.kind = kind, .threads = 1};
  moe_log_init("worker", 0);
  OK(moe_comm_init(argc, argv));
  options.local_rank = moe_comm_local_rank();
  OK(moe_device_open(&options, &w.dev));
  OK(moe_comm_world(w.dev, &w.world));
  w.rank = moe_comm_rank(w.world);
  w.size = moe_comm_size(w.world);
  moe_log_init("worker", w.rank);
  return w;
}

static inline worker worker_open(int *argc, char ***argv) {
  return worker_open_on(MOE_DEVICE_CPU, argc, argv);
}

static inline void worker_close(worker *w) {
  OK(moe_comm_barrier(w->world));
  if (w->rank == 0) printf("%ld checks passed\n", worker_checks);
  moe_comm_destroy(w->world);
  moe_device_close(w->dev);
  moe_comm_finalize();
}

/* n elements of a type, and reading and writing them as double (exact for the small integers used
 * here). */
static inline moe_tensor worker_tensor(moe_dtype dtype, int64_t rows, int64_t width) {
  void *data = calloc((size_t)(rows * width) + 1, (size_t)moe_dtype_size(dtype));
  if (!data) moe_abort(moe_fail(MOE_NO_MEMORY, "worker: out of memory"));
  return moe_tensor_2d(data, dtype, rows, width);
}

static inline double get(moe_tensor t, int64_t i) {
  switch (t.dtype) {
  case MOE_F32:
    return (double)((float *)t.data)[i];
  case MOE_F64:
    return ((double *)t.data)[i];
  case MOE_I32:
    return ((int32_t *)t.data)[i];
  case MOE_BF16:
    return (double)moe_bf16_to_f32(((uint16_t *)t.data)[i]);
  case MOE_F16:
    return (double)moe_f16_to_f32(((uint16_t *)t.data)[i]);
  case MOE_LOW16:
    break;
  }
  return 0.0;
}

static inline void set(moe_tensor t, int64_t i, double value) {
  switch (t.dtype) {
  case MOE_F32:
    ((float *)t.data)[i] = (float)value;
    break;
  case MOE_F64:
    ((double *)t.data)[i] = value;
    break;
  case MOE_I32:
    ((int32_t *)t.data)[i] = (int32_t)value;
    break;
  case MOE_BF16:
    ((uint16_t *)t.data)[i] = moe_f32_to_bf16((float)value);
    break;
  case MOE_F16:
    ((uint16_t *)t.data)[i] = moe_f32_to_f16((float)value);
    break;
  case MOE_LOW16:
    break;
  }
}

#endif
