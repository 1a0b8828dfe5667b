/* From a checkpoint to a generator. */
#include "core/train/inference.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/stored_config.h"
#include "core/base/log.h"
#include "core/base/process_memory.h"
#include "core/train/engine.h"
#include "core/train/memory_plan.h"

/* ---- finding --------------------------------------------------------------------------------- */

static moe_status read_config(moe_inference *f) {
  static const char *const machine[] = {"run.backend=auto",        "run.threads=0",
                                        "run.memory_gib=0",        "run.debug=false",
                                        "run.deterministic=false", "parallel.ep=0"};
  moe_config *stored;
  MOE_TRY(moe_stored_config(f->state.config, f->path, &stored));
  f->config = *stored;
  free(stored);
  for (size_t i = 0; i < sizeof machine / sizeof machine[0]; i++)
    MOE_TRY(moe_config_set(&f->config, machine[i]));
  return moe_config_resolve(&f->config, 0);
}

/* The bias has to have a value for each expert of each layer. */
static moe_status check_bias(const moe_inference *f) {
  int64_t n = f->config.model.num_layers * f->config.model.num_experts;
  if (f->state.router_bias_count == 0 || f->state.router_bias_count == n) return MOE_OK;
  return moe_fail(MOE_DAMAGED,
                  "%s: router bias of %" PRId64 " values, not %" PRId64 ": use another checkpoint",
                  f->path, f->state.router_bias_count, n);
}

moe_status moe_inference_find(moe_comm *world, const char *place, moe_inference *out) {
  memset(out, 0, sizeof *out);
  out->host = world;
  out->place = place;
  MOE_TRY(moe_checkpoint_choose(world, place, false, out->path));
  MOE_TRY(moe_checkpoint_read_state(world, out->path, &out->state));
  moe_status status = read_config(out);
  if (status == MOE_OK) status = check_bias(out);
  return moe_agree(world, status);
}

/* ---- planning -------------------------------------------------------------------------------- */

static moe_status check_ranks(const moe_inference *f) {
  int ranks = moe_comm_size(f->world);
  if (ranks <= f->config.model.num_experts) return MOE_OK;
  return moe_fail(MOE_USAGE,
                  "%d ranks, but each layer has %" PRId64 " experts to share out: mpirun -np: use "
                  "at most as many ranks as experts",
                  ranks, f->config.model.num_experts);
}

static moe_status set_up(moe_inference *f, const moe_inference_options *o) {
  moe_generator_options options = {.config = &f->config,
                                   .dev = f->dev,
                                   .mesh = &f->mesh,
                                   .batch = o->batch,
                                   .room = o->room,
                                   .chunk = f->chunk,
                                   .sample = o->sample,
                                   .router_bias = f->state.router_bias_count > 0,
                                   .eager = o->eager};
  return moe_generator_create(&options, &f->memory, &f->generator);
}

int64_t moe_inference_planned_bytes(const moe_inference *f) {
  moe_memory_plan p = moe_memory_plan_of(&f->memory, f->program_bytes);
  return moe_memory_plan_total(&p);
}

int64_t moe_inference_held_bytes(const moe_inference *f) {
  if (moe_device_is_host(f->dev)) return moe_process_peak();
  return f->free_bytes - moe_device_free_bytes(f->dev);
}

static moe_status check_budget(const moe_inference *f) {
  double gib = f->config.run.memory_gib;
  int64_t budget = (int64_t)(gib * 1073741824.0);
  if (gib <= 0.0) {
    budget = moe_device_free_bytes(f->dev);
    int64_t host = moe_host_available() / moe_comm_local_size();
    if (moe_device_is_host(f->dev) && host < budget) budget = host;
  }
  moe_memory_plan p = moe_memory_plan_of(&f->memory, f->program_bytes);
  return moe_memory_plan_check(&p, budget,
                               "lower --batch, --context or --chunk, or use more ranks, which "
                               "share the experts");
}

static moe_status plan(moe_inference *f, const moe_inference_options *o) {
  moe_memory_measure(&f->memory);
  moe_status status = set_up(f, o);
  moe_generator_destroy(f->generator);
  f->generator = NULL;
  if (status == MOE_OK) status = check_budget(f);
  return moe_agree(f->world, status);
}

/* ---- loading --------------------------------------------------------------------------------- */

/* All of this rank's parameters, each slice's hash checked. */
static moe_status load_weights(moe_inference *f) {
  const moe_params *params = moe_generator_params(f->generator);
  const moe_tensor *pools = moe_generator_pools(f->generator);
  moe_piece *pieces = calloc((size_t)params->count, sizeof *pieces);
  moe_status status =
      pieces ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: list of %d pieces", params->count);
  for (int i = 0; i < params->count && pieces; i++) {
    const moe_param *p = &params->list[i];
    moe_tensor values = moe_tensor_rows(pools[p->row->pool], p->offset, p->count);
    pieces[i] = (moe_piece){.role = MOE_ROLE_PARAM,
                            .dtype = values.dtype,
                            .dims = p->dims,
                            .shape = {p->shape[0], p->shape[1]},
                            .count = p->count,
                            .data = values.data};
    snprintf(pieces[i].name, sizeof pieces[i].name, "%s", p->name);
  }
  status = moe_agree(f->world, status);
  if (status == MOE_OK)
    status = moe_checkpoint_load(f->world, f->dev, f->path, pieces, params->count, true);
  free(pieces);
  return status;
}

/* What two configurations, as moe_config_text wrote them, say of the model. */
static bool same_model(const char *a, const char *b) {
  const char *from = strstr(a, "[model]"), *other = strstr(b, "[model]");
  const char *end = from ? strstr(from, "\n[") : NULL;
  return end && other && strncmp(from, other, (size_t)(end - from) + 2) == 0;
}

/* There was damage, and no pass over all files before that could have told. Of a run's checkpoints,
 * an older one may do: memory is laid out for its model already. */
static moe_status load_older(moe_inference *f) {
  moe_run_state older;
  MOE_TRY(moe_checkpoint_choose(f->host, f->place, true, f->path));
  MOE_TRY(moe_checkpoint_read_state(f->host, f->path, &older));
  bool same = older.config && same_model(f->state.config, older.config) &&
              older.router_bias_count == f->state.router_bias_count;
  moe_run_state_clear(&f->state);
  f->state = older;
  if (!same)
    return moe_fail(MOE_DAMAGED,
                    "%s: its newest checkpoint is damaged, and %s has another model: "
                    "name the one to take",
                    f->place, f->path);
  return load_weights(f);
}

static moe_status load(moe_inference *f) {
  moe_status status = load_weights(f);
  if (status == MOE_DAMAGED || status == MOE_IO) status = load_older(f);
  MOE_TRY(status);
  if (f->state.router_bias_count == 0) return MOE_OK;
  return moe_agree(f->world, moe_generator_set_router_bias(f->generator, f->state.router_bias));
}

moe_status moe_inference_create(moe_inference *f, const moe_inference_options *o) {
  enum { HOST_CHUNK = 256, GPU_CHUNK = 2048 };
  MOE_TRY(moe_agree(f->host, moe_engine_open_device(&f->config, &f->dev)));
  bool host = moe_device_is_host(f->dev);
  f->chunk = o->chunk > 0 ? o->chunk : host ? HOST_CHUNK : GPU_CHUNK;
  if (o->chunk == 0 && f->chunk > o->batch * o->room) f->chunk = o->batch * o->room;
  MOE_TRY(moe_comm_world(f->dev, &f->world));
  MOE_TRY(moe_agree(f->world, check_ranks(f)));
  MOE_TRY(
      moe_mesh_create(f->world, moe_comm_size(f->world), f->config.model.num_experts, &f->mesh));
  f->program_bytes = host ? moe_process_resident() : 0;
  f->free_bytes = moe_device_free_bytes(f->dev);
  MOE_TRY(plan(f, o));
  if (o->plan_only) return MOE_OK;
  MOE_TRY(moe_agree(f->world, moe_memory_commit(&f->memory, moe_device_alloc, f->dev)));
  MOE_TRY(moe_agree(f->world, set_up(f, o)));
  return load(f);
}

moe_status moe_inference_print_plan(const moe_inference *f, FILE *out) {
  moe_memory_plan p = moe_memory_plan_of(&f->memory, f->program_bytes);
  int64_t mine = moe_memory_plan_total(&p), most = mine;
  char text[MOE_TEXT], count[MOE_TEXT];
  moe_dims d = moe_dims_of(&f->config);
  MOE_TRY(moe_comm_host_all_reduce_i64(f->world, &most, 1, MOE_MAX));
  if (moe_comm_rank(f->world) != 0) return MOE_OK;
  fprintf(out, "checkpoint   %s, step %" PRId64 "\n", f->path, f->state.step);
  fprintf(out,
          "model        %s parameters, %s active in matrix products, context %" PRId64
          ", alpha %g\n",
          moe_text_count(text, (double)moe_dims_parameters(&d)),
          moe_text_count(count, (double)moe_dims_active_matmul(&d)), f->config.model.context,
          f->config.model.rope_alpha);
  fprintf(out, "device       %s, %s, %d ranks, %" PRId64 " tokens per pass\n",
          moe_device_name(f->dev), moe_dtype_name(moe_config_compute_dtype(&f->config)),
          moe_comm_size(f->world), f->chunk);
  fprintf(out, "memory       %s on the fullest rank; on rank 0 %s:\n",
          moe_text_bytes(text, (double)most), moe_text_bytes(count, (double)mine));
  moe_memory_plan_print(&p, out);
  return MOE_OK;
}

void moe_inference_destroy(moe_inference *f) {
  moe_generator_destroy(f->generator);
  for (int i = 0; i < MOE_MEM_PURPOSES && f->dev; i++)
    if (f->memory.arena[i].base) moe_device_free(f->dev, f->memory.arena[i].base);
  moe_mesh_destroy(&f->mesh);
  moe_comm_destroy(f->world);
  moe_device_close(f->dev);
  moe_run_state_clear(&f->state);
  memset(f, 0, sizeof *f);
}
