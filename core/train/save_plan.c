/* Sizing the copy that a save is written from.
 *
 * A rank saves its chunk of each pool, so its part follows from the mesh. When memory is short the
 * copy gets what there is: the ring of checkpoint/snapshot.h then makes training wait for the disk
 * for the rest, which still is better than waiting for all of it. */
#include "core/train/save_plan.h"

#include "core/base/log.h"
#include "core/base/process_memory.h"
#include "core/train/run_state.h"

enum { LEAST = 64 << 20 }; /* a smaller ring is not worth a thread, unless it holds everything */

enum { ASYNC_AUTO, ASYNC_ON, ASYNC_OFF }; /* choices of checkpoint.async */

static int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

static int64_t part_bytes(const moe_engine *e) {
  enum { PADDING = 1 << 20 }; /* pools are padded so that ranks can divide them */
  moe_dims d = moe_dims_of(&e->config);
  const moe_mesh *m = &e->mesh;
  int64_t all = moe_dims_parameters(&d), per_expert = d.layers * 3 * d.hidden * d.ffn;
  int64_t experts = divide_up(moe_range_size(m->owned) * per_expert, m->edp);
  int64_t rest = divide_up(all - d.experts * per_expert, (int64_t)m->ep * m->edp);
  return experts * moe_run_state_parameter_bytes(&e->config, MOE_POOL_EXPERT) +
         rest * moe_run_state_parameter_bytes(&e->config, MOE_POOL_DENSE) + PADDING;
}

/* Host memory one rank may still have, some left to others. */
static int64_t room(const moe_engine *e) {
  int64_t bytes = moe_host_available() / moe_comm_local_size() / 10 * 9;
  if (!moe_device_is_host(e->dev)) return bytes;
  if (!e->model) bytes -= moe_memory_total(&e->memory); /* planned, not taken yet */
  double limit = e->config.run.memory_gib * 1073741824.0;
  int64_t rest = (int64_t)limit - moe_engine_planned_bytes(e);
  return limit > 0.0 && rest < bytes ? rest : bytes;
}

static moe_status size_memory(const moe_engine *e, moe_save_plan *plan) {
  char need[MOE_TEXT], have[MOE_TEXT];
  int64_t want = plan->part, there = room(e), async = e->config.checkpoint.async;
  double limit = e->config.checkpoint.snapshot_gib * 1073741824.0;
  if (limit > 0.0 && limit < (double)want) want = (int64_t)limit;
  if (async == ASYNC_ON && there < want)
    return moe_fail(MOE_NO_MEMORY,
                    "checkpoint.async = on needs %s of host memory per rank for a copy of what is "
                    "saved, and %s may be used: use auto, or set checkpoint.snapshot_gib",
                    moe_text_bytes(need, (double)want),
                    moe_text_bytes(have, there > 0 ? (double)there : 0.0));
  plan->memory = want < there ? want : there;
  if (plan->memory < want && plan->memory < LEAST) plan->memory = 0;
  if (async == ASYNC_OFF) plan->memory = 0;
  return MOE_OK;
}

moe_status moe_save_plan_make(moe_engine *e, moe_save_plan *out) {
  *out = (moe_save_plan){.part = part_bytes(e)};
  MOE_TRY(moe_agree(e->world, size_memory(e, out)));
  int64_t least = out->memory;
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, &least, 1, MOE_MIN));
  if (least == 0) out->memory = 0;
  return MOE_OK;
}

void moe_save_plan_print(const moe_save_plan *plan, FILE *out) {
  char memory[MOE_TEXT], rest[MOE_TEXT];
  if (plan->memory == 0) {
    fprintf(out, "saving       training waits for each save (checkpoint.async, or no memory)\n");
    return;
  }
  fprintf(out, "saving       in the background, from a copy in %s of host memory on this rank\n",
          moe_text_bytes(memory, (double)plan->memory));
  if (plan->memory < plan->part)
    fprintf(out, "             training waits for the disk while the first %s are written\n",
            moe_text_bytes(rest, (double)(plan->part - plan->memory)));
}
