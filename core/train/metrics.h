/* Metrics: what a step was, to the terminal, metrics.jsonl and TensorBoard event files.
 *
 * Rank 0 writes; other ranks pass through. Records of steps at or after the one a run resumes at
 * are removed from metrics.jsonl, so that it has every step once. */
#ifndef MOE_CORE_TRAIN_METRICS_H
#define MOE_CORE_TRAIN_METRICS_H

#include "core/base/config.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_metrics moe_metrics;

/* part of a step's time: name in metrics.jsonl's "ms_by_part" */
#define MOE_STEP_PART_MAP(X)                                                 \
  X(DATA, "data")                                                            \
  X(FORWARD, "forward")                                                      \
  X(BACKWARD, "backward")                                                    \
  X(EXCHANGE, "exchange") /* inside forward and backward; not added again */ \
  X(GRAD_SYNC, "grad_sync")                                                  \
  X(OPTIMIZER, "optimizer")
typedef enum {
#define X(name, text) MOE_PART_##name,
  MOE_STEP_PART_MAP(X)
#undef X
      MOE_STEP_PARTS
} moe_step_part;

typedef struct {
  int64_t step;   /* just done, from 1 */
  int64_t tokens; /* seen in all */
  int64_t step_tokens;
  double loss, ce, aux, z, lr, grad_norm;
  bool skipped; /* non-finite: no update was made */
  double seconds;
  double part_seconds[MOE_STEP_PARTS];
  double flops;              /* model FLOPs of the step, all ranks */
  int64_t memory_bytes;      /* of the fullest rank */
  const double *expert_load; /* [layers, experts] shares that sum to 1 per layer, or NULL */
  double dropped;            /* assignments */
} moe_step_record;

typedef struct {
  int64_t step;
  double ce, perplexity, seconds;
  int64_t tokens;
} moe_eval_record;

/* `ranks`, `peak_tflops` per rank (0: MFU is left out). first_step: 0 for a new run, else the step
 * the run resumes after. MOE_IO names the file. Local. */
moe_status moe_metrics_create(const moe_config *config, int rank, int ranks, int64_t layers,
                              int64_t experts, double peak_tflops, int64_t first_step,
                              moe_metrics **out);
void moe_metrics_destroy(moe_metrics *m);
moe_status moe_metrics_record(moe_metrics *m, const moe_step_record *r);
moe_status moe_metrics_eval(moe_metrics *m, const moe_eval_record *r);

#ifdef __cplusplus
}
#endif
#endif
