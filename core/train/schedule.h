/* Learning rate by step: linear warm-up, then cosine, linear, constant or warm-up/stable/decay. */
#ifndef MOE_CORE_TRAIN_SCHEDULE_H
#define MOE_CORE_TRAIN_SCHEDULE_H

#include "core/base/config.h"

typedef struct {
  int kind; /* MOE_SCHEDULE_* */
  double peak, floor;
  int64_t warmup, total, decay; /* steps */
} moe_schedule;

moe_schedule moe_schedule_of(const moe_config *c);
/* step = 1..total. While step <= warmup: peak * step / warmup. Afterwards, with
 * progress p = (step - warmup) / (total - warmup): cosine floor + (peak - floor)(1 + cos(pi p))/2,
 * linear peak + (floor - peak) p, constant peak, wsd peak until the last `decay` steps, then linear
 * to floor. Steps past total keep the final value. Local. */
double moe_schedule_lr(const moe_schedule *s, int64_t step);

#endif
