/* The preflight's checks. Private to core/train/preflight*.c.
 *
 * A check is collective and returns this rank's own result; the caller agrees. A rank that has
 * failed goes on to every agreement inside the check, so that no other waits for it. It may leave
 * a `detail` for its row; rank 0's is printed. */
#ifndef MOE_CORE_TRAIN_PREFLIGHT_CHECKS_H
#define MOE_CORE_TRAIN_PREFLIGHT_CHECKS_H

#include "core/base/config.h"
#include "parallel/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef char moe_host_name[64];

typedef struct {
  const moe_config *config;
  moe_comm *world;
  moe_host_name *hosts; /* of each rank */
  moe_device *dev;      /* NULL when it could not be opened */
  char detail[256];
} moe_preflight_job;

/* config.run.dir is one folder that all hosts see, and a second job on it would be refused. */
moe_status moe_preflight_run_dir(moe_preflight_job *p);
/* It has room for keep + 1 checkpoints, those that are there included. */
moe_status moe_preflight_space(moe_preflight_job *p);

#ifdef __cplusplus
}
#endif
#endif
