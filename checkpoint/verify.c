/* Is a checkpoint whole and undamaged?
 *
 * The manifest's own checks say that what it lists is consistent; the files' hashes, that it is
 * there; the model's parameter table, that nothing was left off the list. */
#include "checkpoint/verify.h"

#include <inttypes.h>
#include <stdlib.h>

#include "checkpoint/shard.h"
#include "checkpoint/stored_config.h"
#include "core/model/params.h"

static moe_status check_param(const moe_manifest *m, const moe_param *p, const char *where) {
  int64_t i = moe_manifest_find(m, MOE_ROLE_PARAM, p->name);
  if (i < 0) return moe_fail(MOE_DAMAGED, "%s: param %s of its model is missing", where, p->name);
  const moe_slice *s = &m->slice[i];
  if (s->dims != p->dims || s->shape[0] != p->shape[0] ||
      (p->dims == 2 && s->shape[1] != p->shape[1]))
    return moe_fail(MOE_DAMAGED, "%s: param %s has another shape than its model's", where, p->name);
  return MOE_OK;
}

static moe_status check_params(const moe_manifest *m, const moe_dims *dims, const char *where) {
  /* Every layer has a gate and every expert three tensors: refuse before making a list that is
   * longer than anything the manifest could satisfy. */
  if (dims->layers > m->slices || dims->layers * (3 * dims->experts + 1) > m->slices)
    return moe_fail(MOE_DAMAGED,
                    "%s: lists %" PRId64 " tensors, fewer than its model of %" PRId64
                    " layers of %" PRId64 " experts has",
                    where, m->slices, dims->layers, dims->experts);
  moe_params params;
  MOE_TRY(moe_params_create(dims, (moe_range){0, dims->experts}, &params));
  moe_status status = MOE_OK;
  for (int i = 0; i < params.count && status == MOE_OK; i++)
    status = check_param(m, &params.list[i], where);
  moe_params_destroy(&params);
  return status;
}

moe_status moe_checkpoint_check_model(const moe_manifest *m, const char *where) {
  const char *text = m->state.config;
  if (!text || !text[0]) return MOE_OK;
  moe_config *config;
  MOE_TRY(moe_stored_config(text, where, &config));
  moe_dims dims = moe_dims_of(config);
  free(config);
  return check_params(m, &dims, where);
}

moe_status moe_checkpoint_verify_share(const char *dir, int rank, int size) {
  moe_manifest m;
  MOE_TRY(moe_manifest_read(dir, &m));
  moe_status status = moe_checkpoint_check_model(&m, dir);
  for (int i = rank; i < m.files && status == MOE_OK; i += size)
    status = moe_shard_verify(dir, &m, i);
  moe_manifest_clear(&m);
  return status;
}

moe_status moe_checkpoint_verify(moe_comm *world, const char *dir) {
  return moe_agree(world,
                   moe_checkpoint_verify_share(dir, moe_comm_rank(world), moe_comm_size(world)));
}
