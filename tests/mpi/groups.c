/* Worker: the mesh's arithmetic, agreement, and the end of a failed job.
 *
 *     mpi_groups mesh           on 8 ranks: all meshes of 16 experts
 *     mpi_groups ep EP EXPERTS  make one mesh; errors are agreed on and reported
 *     mpi_groups agree          every way of failing together
 *     mpi_groups abort RANK     one rank ends the job while the others wait */
#include "parallel/mesh.h"
#include "tests/mpi/worker.h"

/* ---- mesh ---------------------------------------------------------------------------------- */

/* Do the group's world ranks follow rank = replica * ep + place, in this order? */
static void check_members(const worker *w, moe_comm *group, int first, int step, int size) {
  int *members = calloc((size_t)size, sizeof *members);
  REQUIRE(members && moe_comm_size(group) == size);
  OK(moe_comm_host_all_gather(group, &w->rank, sizeof w->rank, members));
  for (int i = 0; i < size; i++) REQUIRE(members[i] == first + i * step);
  free(members);
}

static void check_mesh(const worker *w, int asked, int ep, int64_t experts) {
  moe_mesh m;
  OK(moe_mesh_create(w->world, asked, experts, &m));
  int edp = w->size / ep, place = w->rank % ep, replica = w->rank / ep;
  REQUIRE(m.ep == ep && m.edp == edp && m.world == w->world && m.num_experts == experts);
  REQUIRE(moe_comm_rank(m.experts) == place && moe_comm_rank(m.replicas) == replica);
  check_members(w, m.experts, replica * ep, 1, ep);
  check_members(w, m.replicas, place, ep, edp);
  REQUIRE(m.owned.begin == place * experts / ep && m.owned.end == (place + 1) * experts / ep);
  for (int64_t e = m.owned.begin; e < m.owned.end; e++)
    REQUIRE(moe_shard_owner(experts, ep, e) == place);
  moe_mesh_destroy(&m);
}

static void check_meshes(const worker *w) {
  for (int ep = 1; ep <= w->size; ep++)
    if (w->size % ep == 0) check_mesh(w, ep, ep, 16);
  check_mesh(w, 0, moe_mesh_default_ep(w->size, 16), 16);
  check_mesh(w, 0, moe_mesh_default_ep(w->size, 3), 3);
}

static int make_one(const worker *w, int ep, int64_t experts) {
  moe_mesh m;
  moe_status status = moe_agree(w->world, moe_mesh_create(w->world, ep, experts, &m));
  if (status == MOE_OK) {
    moe_mesh_destroy(&m);
    return 0;
  }
  int code = moe_report(status);
  return w->rank == 0 ? code : 0; /* once is enough for mpirun */
}

/* ---- agreement ----------------------------------------------------------------------------- */

static moe_status fail_as(moe_status status, const char *text) {
  return status == MOE_OK ? MOE_OK : moe_fail(status, "%s", text);
}

static void expect_agreement(const worker *w, moe_status mine, const char *text, moe_status status,
                             const char *message) {
  moe_error_clear();
  moe_status all = moe_agree(w->world, fail_as(mine, text));
  REQUIRE(all == status);
  REQUIRE(all == MOE_OK || strcmp(moe_error_message(), message) == 0);
}

static void check_agreement(const worker *w) {
  char expected[2048];
  int last = w->size - 1;
  expect_agreement(w, MOE_OK, "", MOE_OK, "");

  /* each rank in turn */
  for (int r = 0; r < w->size; r++) {
    const char *text = "shard 7 is truncated: run/x.h5: restore it";
    snprintf(expected, sizeof expected, "rank %d: %s", r, text);
    expect_agreement(w, w->rank == r ? MOE_DAMAGED : MOE_OK, text, MOE_DAMAGED, expected);
  }
  /* the worst wins whoever has it; among equals the lowest rank */
  snprintf(expected, sizeof expected, "rank %d: no room", last);
  expect_agreement(w, w->rank == last ? MOE_NO_MEMORY : MOE_STOPPED,
                   w->rank == last ? "no room" : "asked to stop", MOE_NO_MEMORY, expected);
  expect_agreement(w, w->rank == 0 ? MOE_OK : MOE_IO, "disk full", MOE_IO, "rank 1: disk full");

  /* agreeing again on what was agreed does not name a second rank */
  moe_status again = moe_agree(w->world, moe_agree(w->world, moe_fail(MOE_USAGE, "bad key")));
  REQUIRE(again == MOE_USAGE && strcmp(moe_error_message(), "rank 0: bad key") == 0);

  /* long messages are cut, not overrun */
  char *text = malloc(5000);
  REQUIRE(text);
  memset(text, 'x', 4999);
  text[4999] = '\0';
  REQUIRE(moe_agree(w->world, fail_as(w->rank == last ? MOE_IO : MOE_OK, text)) == MOE_IO);
  snprintf(expected, sizeof expected, "rank %d: xxxx", last);
  REQUIRE(strncmp(moe_error_message(), expected, strlen(expected)) == 0);
  REQUIRE(strlen(moe_error_message()) > 900 && strlen(moe_error_message()) <= 1100);
  free(text);
}

int main(int argc, char **argv) {
  worker w = worker_open(&argc, &argv);
  const char *what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "ep") == 0 && argc == 4) {
    int code = make_one(&w, atoi(argv[2]), atoll(argv[3]));
    worker_close(&w);
    return code;
  }
  if (strcmp(what, "abort") == 0 && argc == 3 && w.rank == atoi(argv[2]))
    moe_abort(moe_fail(MOE_DAMAGED, "the file is torn: data.bin: make it again"));
  if (strcmp(what, "abort") == 0) OK(moe_comm_barrier(w.world));
  if (strcmp(what, "mesh") == 0) check_meshes(&w);
  if (strcmp(what, "agree") == 0) check_agreement(&w);
  worker_close(&w);
  return 0;
}
