/* The private side of comm: what a transport has to provide. Private to parallel/.
 *
 * comm.c checks every call once at the door, answers groups of one rank itself, and hands the rest
 * to the group's transport: MPI for host memory (comm_mpi.c), NCCL for device memory. A group
 * always has its MPI communicator too: host values and agreement (comm_host.c) use it, and NCCL
 * is bootstrapped over it. */
#ifndef MOE_PARALLEL_COMM_BACKEND_H
#define MOE_PARALLEL_COMM_BACKEND_H

#include <mpi.h>

#include "parallel/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One slot per data call. Shapes, types and ranges were checked; the group has at least two ranks
 * and the tensors at least one element. Contracts are in comm.h. */
typedef struct {
  const char *name;
  /* Fill c->state of a group whose other members are set (collective over it); release it. close
   * accepts what a failed open left. */
  moe_status (*open)(moe_comm *c);
  void (*close)(moe_comm *c);
  moe_status (*all_reduce)(moe_comm *c, moe_tensor x, moe_reduce_op op);
  /* out may be chunk `rank` of x itself. */
  moe_status (*reduce_scatter)(moe_comm *c, moe_tensor x, moe_tensor out);
  /* x may be chunk `rank` of out itself. */
  moe_status (*all_gather)(moe_comm *c, moe_tensor x, moe_tensor out);
  /* At root x may be chunk `rank` of out itself. */
  moe_status (*gather)(moe_comm *c, moe_tensor x, moe_tensor out, int root);
  moe_status (*all_to_all)(moe_comm *c, moe_tensor send, const int64_t *send_rows,
                           const int64_t *send_at, moe_tensor recv, const int64_t *recv_rows,
                           const int64_t *recv_at);
  moe_status (*exchange_chunks)(moe_comm *c, moe_tensor x, moe_tensor out);
  moe_status (*broadcast)(moe_comm *c, moe_tensor x, int root);
  /* NULL: the device's own memory will do */
  void *(*alloc)(moe_comm *c, int64_t bytes);
  moe_status (*share)(moe_comm *c, void *data, int64_t bytes);
  void (*free)(moe_comm *c, void *data);
} moe_comm_backend;

struct moe_comm {
  const moe_comm_backend *backend;
  moe_device *dev; /* whose memory the tensors are in; borrowed */
  MPI_Comm mpi;
  int rank, size;
  bool beside;    /* moe_comm_beside */
  bool by_copies; /* moe_comm_by_copies; for open to clear */
  void *state;    /* the transport's own; NULL for a group of one */
};

extern const moe_comm_backend moe_comm_mpi_backend;
#ifdef MOE_WITH_NCCL
extern const moe_comm_backend moe_comm_nccl_backend;
#endif

/* The most bytes one MPI call carries: MPI counts are int, and transports are happier with less.
 * A variable so that tests can lower it (before they make a comm). */
extern int64_t moe_mpi_limit;

static inline bool moe_is_half(moe_dtype t) {
  return t == MOE_BF16 || t == MOE_F16;
}

MPI_Op moe_mpi_op(moe_reduce_op op);
/* MOE_FAILED with MPI's own text unless `code` is MPI_SUCCESS. `call` is the call's source text. */
moe_status moe_mpi_check(int code, const char *call);
#define MPI_TRY(call) MOE_TRY(moe_mpi_check((call), #call))

/* Every rank's `bytes` bytes at x to their place in out [size, bytes]; x MPI_IN_PLACE: mine are
 * there already. Collective; host memory, any size. */
moe_status moe_mpi_all_gather(moe_comm *c, const void *x, int64_t bytes, void *out);
moe_status moe_mpi_broadcast(moe_comm *c, void *x, int64_t bytes, int root);

#ifdef __cplusplus
}
#endif
#endif
