/* The mesh: how the world is cut into expert-parallel groups and replicas. */
#include "parallel/mesh.h"

#include <stdio.h>
#include <string.h>

int moe_mesh_default_ep(int world, int64_t num_experts) {
  for (int ep = world; ep > 1; ep--)
    if (world % ep == 0 && ep <= num_experts) return ep;
  return 1;
}

/* "1, 2, 4, 8": the sizes that are possible, as many as fit. */
static const char *list_choices(int world, int64_t num_experts, char *text, size_t size) {
  size_t used = 0;
  text[0] = '\0';
  for (int ep = 1; ep <= world && ep <= num_experts; ep++) {
    if (world % ep != 0) continue;
    int n = snprintf(text + used, size - used, "%s%d", used ? ", " : "", ep);
    if (n < 0 || (size_t)n >= size - used) {
      text[used] = '\0';
      break;
    }
    used += (size_t)n;
  }
  return text;
}

static moe_status check_ep(int world, int ep, int64_t num_experts) {
  char choices[256];
  if (num_experts < 1)
    return moe_fail(MOE_INVALID, "moe_mesh_create: %lld experts", (long long)num_experts);
  if (ep < 0 || ep > num_experts)
    return moe_fail(MOE_USAGE,
                    "parallel.ep = %d, but a layer has %lld experts: choose one of %s, or 0 for "
                    "the default",
                    ep, (long long)num_experts,
                    list_choices(world, num_experts, choices, sizeof choices));
  if (ep > 0 && world % ep != 0)
    return moe_fail(MOE_USAGE,
                    "parallel.ep = %d does not divide the %d ranks: choose one of %s, or 0 for the "
                    "default",
                    ep, world, list_choices(world, num_experts, choices, sizeof choices));
  return MOE_OK;
}

moe_status moe_mesh_create(moe_comm *world, int ep, int64_t num_experts, moe_mesh *out) {
  memset(out, 0, sizeof *out);
  int size = moe_comm_size(world), rank = moe_comm_rank(world);
  MOE_TRY(check_ep(size, ep, num_experts));
  if (ep == 0) ep = moe_mesh_default_ep(size, num_experts);

  moe_status status = MOE_OK;
  int replica = rank / ep, place = rank % ep;
  out->world = world;
  out->ep = ep;
  out->edp = size / ep;
  out->num_experts = num_experts;
  out->owned = moe_shard_range(num_experts, ep, place);
  MOE_TRY_OR(status, failed, moe_comm_split(world, replica, place, &out->experts));
  MOE_TRY_OR(status, failed, moe_comm_split(world, place, replica, &out->replicas));
  return MOE_OK;
failed:
  moe_mesh_destroy(out);
  return status;
}

moe_status moe_mesh_create_beside(moe_mesh *m, bool sharded) {
  if (!sharded) MOE_TRY(moe_comm_beside(m->world, &m->world_beside));
  MOE_TRY(moe_comm_beside(m->replicas, &m->replicas_beside));
  if (!sharded || moe_comm_by_copies(m->replicas_beside)) return MOE_OK;
  moe_comm_destroy(m->replicas_beside);
  m->replicas_beside = NULL;
  return MOE_OK;
}

void moe_mesh_destroy(moe_mesh *m) {
  if (!m) return;
  moe_comm_destroy(m->world_beside);
  moe_comm_destroy(m->replicas_beside);
  moe_comm_destroy(m->experts);
  moe_comm_destroy(m->replicas);
  memset(m, 0, sizeof *m);
}
