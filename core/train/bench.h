/* Measurements: ceilings of this machine, and where a training step's time goes.
 *
 * Ceilings and steps are measured in one run, so their ratio means something on a noisy machine. */
#ifndef MOE_CORE_TRAIN_BENCH_H
#define MOE_CORE_TRAIN_BENCH_H

#include "core/train/engine.h"
#include "kernels/power.h"
#include "kernels/profile.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a card draws (kernels/power.h). samples is 0 where it is not told on every rank. */
typedef struct {
  moe_power_use own, mean; /* of this rank; the mean of all ranks */
} moe_bench_power;

typedef struct {
  int64_t product;         /* n of the n x n x n product */
  double product_tflops;   /* per rank, all ranks at once: the slowest */
  double sustained_tflops; /* repeated for a second, mean of the ranks; 0 where power is not told */
  moe_bench_power power;   /* of that second */
  double copy_gbs;         /* device memory to itself, bytes read and written; the slowest rank */
} moe_ceilings;

/* Collective over `world` (a group of dev): every rank works at once, as in a step. dtype: of the
 * product. Takes memory of its own, so it comes before an engine that fills the device. */
moe_status moe_bench_ceilings(moe_device *dev, moe_comm *world, moe_dtype dtype, moe_ceilings *out);

/* Bus bandwidth of one collective at `bytes` per rank: what each link carries, GB/s (10^9), as
 * NCCL's tests count it. */
enum {
  MOE_BENCH_ALL_REDUCE,
  MOE_BENCH_ALL_GATHER,
  MOE_BENCH_REDUCE_SCATTER,
  MOE_BENCH_ALL_TO_ALL,
  MOE_BENCH_COLLECTIVES
};
const char *moe_bench_collective_name(int which);
moe_status moe_bench_collective(moe_device *dev, moe_comm *world, int which, int64_t bytes,
                                double *bus_gbs);

/* A part of the step: every operation of the step belongs to one. */
enum { MOE_BENCH_PARTS = 10, MOE_BENCH_OPS = 128 };
typedef struct {
  const char *name;
  double seconds, flops; /* per step; of rank 0 */
  double mhz;            /* the mean clock in it; 0 where it was not counted */
} moe_bench_part;

typedef struct {
  double seconds; /* median of the steps */
  double fastest, slowest;
  int64_t tokens;                       /* per step, all ranks */
  double model_tflops;                  /* per rank */
  moe_bench_power power;                /* of all steps, of which there are timed_steps */
  double exchange, exchange_least;      /* seconds arithmetic waits for exchanges (on a CPU: all
                                         * they take): mean of the ranks, and the rank that waits
                                         * least. What others wait more they wait for the slowest */
  moe_bench_part part[MOE_BENCH_PARTS]; /* the last is what no operation accounts for */
  /* every operation by name and place in the model, not scaled: sums over timed_steps steps that
   * took timed_seconds */
  moe_profile_row op[MOE_BENCH_OPS];
  int ops, timed_steps;
  double timed_seconds;
} moe_bench_step_result;

/* Collective. `steps` training steps on random tokens after `warmup`; the same number again with
 * operations timed, for the parts, which are scaled to sum to the median; with `clocks` a GPU's
 * clock is counted in them (kernels/profile.h). */
moe_status moe_bench_step(moe_engine *e, int warmup, int steps, bool clocks,
                          moe_bench_step_result *out);

#ifdef __cplusplus
}
#endif
#endif
