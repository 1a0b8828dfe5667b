/* The learning rate as a pure function of the step: resuming needs no state. */
#include "core/train/schedule.h"

#include <math.h>

moe_schedule moe_schedule_of(const moe_config *c) {
  int64_t total = c->train.steps;
  return (moe_schedule){
      .kind = c->optim.schedule,
      .peak = c->optim.lr,
      .floor = c->optim.min_lr < 0.0 ? c->optim.lr / 10.0 : c->optim.min_lr,
      .warmup = c->optim.warmup_steps,
      .total = total,
      .decay = c->optim.decay_steps > 0 ? c->optim.decay_steps : (total + 9) / 10,
  };
}

/* How much of [begin, end] lies behind `step`, 0 to 1. */
static double progress(int64_t begin, int64_t end, int64_t step) {
  if (step <= begin) return 0.0;
  if (step >= end) return 1.0;
  return (double)(step - begin) / (double)(end - begin);
}

double moe_schedule_lr(const moe_schedule *s, int64_t step) {
  if (step > s->total) step = s->total;
  if (step <= s->warmup && s->warmup > 0) return s->peak * (double)step / (double)s->warmup;

  double drop = s->peak - s->floor;
  double p = progress(s->warmup, s->total, step);
  switch (s->kind) {
  case MOE_SCHEDULE_COSINE:
    return s->floor + drop * 0.5 * (1.0 + cos(acos(-1.0) * p));
  case MOE_SCHEDULE_LINEAR:
    return s->peak - drop * p;
  case MOE_SCHEDULE_WSD: {
    /* A decay longer than what is left after warm-up starts where warm-up ends. */
    int64_t begin = s->total - s->decay;
    return s->peak - drop * progress(begin > s->warmup ? begin : s->warmup, s->total, step);
  }
  default:
    return s->peak;
  }
}
