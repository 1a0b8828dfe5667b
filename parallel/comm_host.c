/* Host values and agreement: always over MPI, whatever the device.
 *
 * Agreement costs one small reduction while all is well; only an error makes its rank tell the
 * others what it was. */
#include <stdlib.h>
#include <string.h>

#include "core/base/place.h"
#include "parallel/comm_backend.h"

enum { GATHER_TAG = 1, MESSAGE_BYTES = 1024 };

static moe_status all_reduce(moe_comm *c, void *x, int n, MPI_Datatype type, moe_reduce_op op) {
  moe_place_collective("host all-reduce");
  int code = MPI_Allreduce(MPI_IN_PLACE, x, n, type, moe_mpi_op(op), c->mpi);
  moe_place_return();
  return moe_mpi_check(code, "MPI_Allreduce");
}

moe_status moe_comm_host_all_reduce_i64(moe_comm *c, int64_t *x, int n, moe_reduce_op op) {
  return all_reduce(c, x, n, MPI_INT64_T, op);
}

moe_status moe_comm_host_all_reduce_f64(moe_comm *c, double *x, int n, moe_reduce_op op) {
  return all_reduce(c, x, n, MPI_DOUBLE, op);
}

moe_status moe_comm_host_all_gather(moe_comm *c, const void *x, int64_t bytes, void *out) {
  moe_place_collective("host all-gather");
  moe_status status = moe_mpi_all_gather(c, x, bytes, out);
  moe_place_return();
  return status;
}

moe_status moe_comm_host_broadcast(moe_comm *c, void *x, int64_t bytes, int root) {
  moe_place_collective("host broadcast");
  moe_status status = moe_mpi_broadcast(c, x, bytes, root);
  moe_place_return();
  return status;
}

moe_status moe_comm_barrier(moe_comm *c) {
  moe_place_collective("barrier");
  int code = MPI_Barrier(c->mpi);
  moe_place_return();
  return moe_mpi_check(code, "MPI_Barrier");
}

/* ---- gather of variable lengths ------------------------------------------------------------ */

static moe_status send_bytes(moe_comm *c, const char *x, int64_t bytes, int to) {
  for (int64_t at = 0; at < bytes; at += moe_mpi_limit) {
    int64_t n = bytes - at < moe_mpi_limit ? bytes - at : moe_mpi_limit;
    MPI_TRY(MPI_Send(x + at, (int)n, MPI_BYTE, to, GATHER_TAG, c->mpi));
  }
  return MOE_OK;
}

static moe_status receive_bytes(moe_comm *c, char *x, int64_t bytes, int from) {
  for (int64_t at = 0; at < bytes; at += moe_mpi_limit) {
    int64_t n = bytes - at < moe_mpi_limit ? bytes - at : moe_mpi_limit;
    MPI_TRY(MPI_Recv(x + at, (int)n, MPI_BYTE, from, GATHER_TAG, c->mpi, MPI_STATUS_IGNORE));
  }
  return MOE_OK;
}

static moe_status collect(moe_comm *c, const void *x, const int64_t *lengths, char *all) {
  for (int r = 0; r < c->size; all += lengths[r++]) {
    if (r != c->rank)
      MOE_TRY(receive_bytes(c, all, lengths[r], r));
    else if (lengths[r] > 0)
      memcpy(all, x, (size_t)lengths[r]);
  }
  return MOE_OK;
}

static moe_status gather_bytes(moe_comm *c, const void *x, int64_t bytes, int root, void **out,
                               int64_t *lengths) {
  int64_t total = 0;
  char *all = NULL;
  MPI_TRY(MPI_Gather(&bytes, 1, MPI_INT64_T, lengths, 1, MPI_INT64_T, root, c->mpi));
  if (c->rank == root) {
    for (int r = 0; r < c->size; r++) total += lengths[r];
    all = malloc((size_t)total + 1);
  }
  /* Nobody may wait for a root that cannot receive. */
  int64_t room = all ? total : -total - 1;
  moe_status told = moe_mpi_check(MPI_Bcast(&room, 1, MPI_INT64_T, root, c->mpi), "MPI_Bcast");
  if (told != MOE_OK || room < 0) {
    free(all);
    if (told != MOE_OK) return told;
    return moe_fail(MOE_NO_MEMORY, "out of memory: rank %d gathers %lld bytes", root,
                    (long long)(-room - 1));
  }
  if (!all) return send_bytes(c, x, bytes, root); /* not the root */
  moe_status status = collect(c, x, lengths, all);
  if (status != MOE_OK) {
    free(all);
    all = NULL;
  }
  *out = all;
  return status;
}

moe_status moe_comm_host_gather_bytes(moe_comm *c, const void *x, int64_t bytes, int root,
                                      void **out, int64_t *lengths) {
  moe_place_collective("host gather");
  moe_status status = gather_bytes(c, x, bytes, root, out, lengths);
  moe_place_return();
  return status;
}

/* ---- agreement ----------------------------------------------------------------------------- */

/* The order of badness. A rank that waited for another, or was asked to stop, says less than the
 * one that failed for a reason of its own. */
static int64_t badness(moe_status status) {
  static const moe_status order[] = {MOE_OK,      MOE_STOPPED,  MOE_HUNG, MOE_FAILED,
                                     MOE_USAGE,   MOE_DIVERGED, MOE_IO,   MOE_DAMAGED,
                                     MOE_INVALID, MOE_NO_MEMORY};
  int64_t n = sizeof order / sizeof *order;
  for (int64_t i = 0; i < n; i++)
    if (order[i] == status) return i;
  return n;
}

/* Does the message already say whose it is (from an earlier agreement)? */
static bool names_a_rank(const char *message) {
  if (strncmp(message, "rank ", 5) != 0) return false;
  size_t digits = strspn(message + 5, "0123456789");
  return digits > 0 && message[5 + digits] == ':';
}

moe_status moe_agree(moe_comm *c, moe_status mine) {
  struct {
    char text[MESSAGE_BYTES];
    int status;
  } worst = {"", (int)mine};
  if (c->size == 1) return mine;

  /* One number to find the worst status and, among equals, the lowest rank. */
  int64_t key = badness(mine) * c->size + (c->size - 1 - c->rank);
  MOE_TRY(moe_comm_host_all_reduce_i64(c, &key, 1, MOE_MAX));
  if (key / c->size == badness(MOE_OK)) return MOE_OK;
  int who = c->size - 1 - (int)(key % c->size);
  if (who == c->rank) {
    const char *message = moe_error_message();
    if (!*message) message = moe_status_name(mine);
    strncpy(worst.text, message, sizeof worst.text - 1);
  }
  MOE_TRY(moe_comm_host_broadcast(c, &worst, sizeof worst, who));
  if (names_a_rank(worst.text)) return moe_fail((moe_status)worst.status, "%s", worst.text);
  return moe_fail((moe_status)worst.status, "rank %d: %s", who, worst.text);
}
