/* The plan for people: what --dry-run prints. */
#include <inttypes.h>
#include <stdlib.h>

#include "core/base/log.h"
#include "core/train/engine.h"
#include "core/train/memory_plan.h"
#include "core/train/run_state.h"

static void print_sizes(const moe_engine *e, FILE *out) {
  const moe_config *c = &e->config;
  moe_dims d = moe_dims_of(c);
  char total[MOE_TEXT], active[MOE_TEXT];
  int ranks = moe_comm_size(e->world);
  int64_t step_sequences = c->train.micro_batch * ranks * e->accumulation;
  fprintf(out, "model        %s parameters, %s active in matrix products\n",
          moe_text_count(total, (double)moe_dims_parameters(&d)),
          moe_text_count(active, (double)moe_dims_active_matmul(&d)));
  fprintf(out, "FLOPs        %.4g GFLOP per token at S %" PRId64 " (6 * active + 6 L S H d)\n",
          moe_dims_flops_per_token(&d, c->data.sequence_length) * 1e-9, c->data.sequence_length);
  fprintf(out,
          "batch        %" PRId64 " sequences = %" PRId64 " tokens per step: %" PRId64
          " per rank x %d ranks x %" PRId64 " micro-batches\n",
          step_sequences, step_sequences * c->data.sequence_length, c->train.micro_batch, ranks,
          e->accumulation);
  fprintf(out, "device       %s, %s; the experts' gradients %s, moments %s\n",
          moe_device_name(e->dev), moe_dtype_name(moe_config_compute_dtype(c)),
          moe_dtype_name(moe_config_grad_dtype(c)), moe_dtype_name(moe_config_moment_dtype(c)));
}

static void print_owners(const moe_engine *e, FILE *out) {
  const moe_mesh *m = &e->mesh;
  fprintf(out,
          "mesh         %d ranks = ep %d x edp %d; attention, router, norms, embedding and head on "
          "all\n",
          m->ep * m->edp, m->ep, m->edp);
  for (int place = 0; place < m->ep; place++) {
    moe_range r = moe_shard_range(m->num_experts, m->ep, place);
    fprintf(out, "  experts %3" PRId64 " to %3" PRId64 " of every layer: rank%s", r.begin,
            r.end - 1, m->edp > 1 ? "s" : "");
    for (int replica = 0; replica < m->edp && replica < 8; replica++) {
      fprintf(out, " %d", replica * m->ep + place);
    }
    fprintf(out, m->edp > 8 ? " ...\n" : "\n");
  }
}

static void print_memory(const moe_engine *e, const moe_memory_plan *p, int fullest, FILE *out) {
  static const char *const modes[] = {"none", "swiglu", "experts", "block", "auto"};
  const moe_config *c = &e->config;
  char text[MOE_TEXT];
  fprintf(out, "memory       %s on the fullest rank (%d); recompute %s",
          moe_text_bytes(text, (double)moe_memory_plan_total(p)), fullest,
          modes[c->train.recompute]);
  if (c->train.recompute != MOE_RECOMPUTE_NONE) {
    fprintf(out, " in %" PRId64 " of %" PRId64 " layers", moe_model_recomputing(c),
            c->model.num_layers);
  }
  fprintf(out, "\n");
  moe_memory_plan_print(p, out);
}

moe_status moe_engine_print_plan(moe_engine *e, FILE *out) {
  int ranks = moe_comm_size(e->world);
  moe_memory_plan mine = moe_memory_plan_of(&e->memory, e->program_bytes);
  moe_memory_plan *all = calloc((size_t)ranks, sizeof mine);
  if (!all) return moe_fail(MOE_NO_MEMORY, "out of memory: plan of %d ranks", ranks);
  moe_status status = moe_comm_host_all_gather(e->world, &mine, (int64_t)sizeof mine, all);
  int fullest = 0;
  int64_t most = 0;
  for (int r = 0; r < ranks; r++) {
    int64_t total = moe_memory_plan_total(&all[r]);
    if (total > most) most = total, fullest = r;
  }
  if (status == MOE_OK && moe_comm_rank(e->world) == 0) {
    char text[MOE_TEXT];
    print_sizes(e, out);
    print_owners(e, out);
    print_memory(e, &all[fullest], fullest, out);
    fprintf(out, "checkpoint   %s each on disk, %" PRId64 " kept\n",
            moe_text_bytes(text, (double)moe_run_state_bytes(&e->config)),
            e->config.checkpoint.keep);
  }
  free(all);
  return status;
}
