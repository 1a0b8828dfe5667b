/* Progress for people, on stdout: aligned lines and, on a terminal, one live line updated in place.
 */
#ifndef MOE_CORE_TRAIN_TERMINAL_H
#define MOE_CORE_TRAIN_TERMINAL_H

#include "core/train/metrics.h"

#include <stdio.h>

/* What follows from a record: the same numbers for the terminal, metrics.jsonl and TensorBoard. */
typedef struct {
  double tokens_per_s;
  double tflops;  /* all ranks, model FLOPs */
  double mfu;     /* 0..1; NaN when the peak is not known */
  double load_cv; /* of the least balanced layer; NaN without expert loads */
} moe_step_rates;

typedef struct {
  FILE *out;
  bool live; /* the line can be overwritten: updated every step, kept every `interval` */
  int width; /* columns a line may take */
  int64_t first, total, interval;
  int64_t timed;        /* steps in step_seconds */
  double step_seconds;  /* wall time per step, smoothed: what the ETA is made of */
  double last_record_s; /* clock at the last record, 0 before */
  bool overwritable;    /* what was printed last is a live line */
} moe_terminal;

/* first: the step the run resumes after. Finds out whether `out` ends at a terminal. Local. */
moe_terminal moe_terminal_of(FILE *out, int64_t first, int64_t total, int64_t interval);
void moe_terminal_step(moe_terminal *t, const moe_step_record *r, const moe_step_rates *rates);
void moe_terminal_eval(moe_terminal *t, const moe_eval_record *r);
/* Leaves the last live line standing. */
void moe_terminal_end(moe_terminal *t);

#endif
