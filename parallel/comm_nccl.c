/* The NCCL transport: collectives on device memory, queued on the device's stream.
 *
 * A group's NCCL communicator is made over its MPI one: rank 0 draws the id and broadcasts it.
 * Calls do not wait; a transport error that NCCL notices later is reported by the next call, or by
 * the watchdog's thread when there is none because the caller waits for the device.
 *
 * Memory that moe_comm_share announced is a symmetric window. Between windows NCCL 2.28 and later
 * lets the copy engines carry all-gathers, gathers and equal all-to-alls (CTA policy "zero"), so
 * that the persistent expert kernels beside them keep every multiprocessor. */
#ifdef MOE_WITH_NCCL
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <stdlib.h>

#include "kernels/cuda/cuda.h"
#include "parallel/comm_backend.h"
#include "parallel/guard.h"

static moe_status nccl_check(ncclResult_t result, const char *call) {
  if (result == ncclSuccess || result == ncclInProgress) return MOE_OK;
  return moe_fail(MOE_FAILED, "%s failed: %s: NCCL_DEBUG=INFO in the environment tells more", call,
                  ncclGetErrorString(result));
}
#define NCCL_TRY(call) MOE_TRY(nccl_check((call), #call))

#define BY_COPY_ENGINES (NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0))

typedef struct {
  ncclComm_t comm;
#if BY_COPY_ENGINES
  struct {
    void *data;
    ncclWindow_t window; /* NULL: free */
  } shared[MOE_COMM_SHARED];
#endif
} nccl_state;

static ncclComm_t comm_of(const moe_comm *c) {
  return ((const nccl_state *)c->state)->comm;
}

static cudaStream_t stream_of(const moe_comm *c) {
  return moe_cuda_stream(c->dev);
}

/* Errors of calls already queued. */
static moe_status check_async(const moe_comm *c) {
  ncclResult_t result = ncclSuccess;
  NCCL_TRY(ncclCommGetAsyncError(comm_of(c), &result));
  return nccl_check(result, "an earlier collective");
}

static moe_status check_guarded(void *comm) {
  return check_async(comm);
}

/* Copy engines reach the GPUs of one node, and copies beside arithmetic need lanes. */
static moe_status find_by_copies(moe_comm *c) {
  MPI_Comm node;
  int size = 0;
  MPI_TRY(MPI_Comm_split_type(c->mpi, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node));
  int code = MPI_Comm_size(node, &size);
  MPI_Comm_free(&node);
  MPI_TRY(code);
  int64_t all = BY_COPY_ENGINES && size == c->size && moe_cuda_has_lanes(c->dev);
  MOE_TRY(moe_comm_host_all_reduce_i64(c, &all, 1, MOE_MIN));
  c->by_copies = all == 1;
  return MOE_OK;
}

static moe_status nccl_open(moe_comm *c) {
  ncclUniqueId id;
  moe_status status = MOE_OK;
  setenv("NCCL_NVLS_ENABLE", "0", 0);    /* NVLink multicast: forbidden on some hosts */
  setenv("NCCL_GRAPH_REGISTER", "0", 0); /* recording needs no other rank, and changes no sum */
  if (c->beside) MOE_TRY(find_by_copies(c));
  if (c->rank == 0) status = nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId");
  MOE_TRY(moe_agree(c, status));
  MOE_TRY(moe_comm_host_broadcast(c, &id, (int64_t)sizeof id, 0));
  if (cudaSetDevice(moe_cuda_ordinal(c->dev)) != cudaSuccess)
    return moe_fail(MOE_FAILED, "cuda: cannot select GPU %d", moe_cuda_ordinal(c->dev));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
#if BY_COPY_ENGINES
  config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
#endif
  if (c->beside && moe_cuda_has_lanes(c->dev)) config.maxCTAs = MOE_COMM_BESIDE;
  nccl_state *state = calloc(1, sizeof *state);
  if (!state) return moe_fail(MOE_NO_MEMORY, "out of memory: making a group of ranks");
  c->state = state;
  NCCL_TRY(ncclCommInitRankConfig(&state->comm, c->size, id, c->rank, &config));
  return moe_guard_add(check_guarded, c);
}

/* ---- memory that travels ------------------------------------------------------------------- */

static void *nccl_alloc(moe_comm *c, int64_t bytes) {
  void *data = NULL;
  cudaStream_t stream = stream_of(c);
  if (cudaSetDevice(moe_cuda_ordinal(c->dev)) != cudaSuccess) return NULL;
  if (ncclMemAlloc(&data, (size_t)(bytes > 0 ? bytes : 1)) != ncclSuccess) return NULL;
  if (cudaMemsetAsync(data, 0, (size_t)bytes, stream) == cudaSuccess &&
      cudaStreamSynchronize(stream) == cudaSuccess)
    return data;
  ncclMemFree(data);
  return NULL;
}

/* Collective. The window over data; NULL: all. */
static void withdraw(nccl_state *s, const void *data) {
#if BY_COPY_ENGINES
  for (int i = 0; i < MOE_COMM_SHARED; i++) {
    if (!s->shared[i].window || (data && s->shared[i].data != data)) continue;
    ncclCommWindowDeregister(s->comm, s->shared[i].window);
    s->shared[i].window = NULL;
  }
#else
  (void)s, (void)data;
#endif
}

static void nccl_free(moe_comm *c, void *data) {
  withdraw(c->state, data);
  ncclMemFree(data);
}

static void nccl_close(moe_comm *c) {
  nccl_state *s = c->state;
  if (!s) return;
  moe_guard_remove(c);
  withdraw(s, NULL);
  if (s->comm) ncclCommDestroy(s->comm);
  free(s);
  c->state = NULL;
}

static moe_status nccl_share(moe_comm *c, void *data, int64_t bytes) {
#if BY_COPY_ENGINES
  nccl_state *s = c->state;
  int64_t range[2] = {bytes, -bytes}; /* windows must be of one size: smallest and largest */
  MOE_TRY(moe_comm_host_all_reduce_i64(c, range, 2, MOE_MIN));
  if (range[0] != -range[1]) return MOE_OK;
  int i = 0;
  while (i < MOE_COMM_SHARED && s->shared[i].window) i++;
  if (i == MOE_COMM_SHARED)
    return moe_fail(MOE_INVALID, "moe_comm_share: a group shares at most %d pieces of memory",
                    MOE_COMM_SHARED);
  s->shared[i].data = data;
  NCCL_TRY(ncclCommWindowRegister(s->comm, data, (size_t)bytes, &s->shared[i].window,
                                  NCCL_WIN_COLL_SYMMETRIC));
#else
  (void)c, (void)data, (void)bytes;
#endif
  return MOE_OK;
}

static ncclDataType_t type_of(moe_dtype t) {
  switch (t) {
  case MOE_BF16:
    return ncclBfloat16;
  case MOE_F16:
    return ncclFloat16;
  case MOE_I32:
    return ncclInt32;
  case MOE_F64:
    return ncclFloat64;
  default:
    return ncclFloat32;
  }
}

static ncclRedOp_t op_of(moe_reduce_op op) {
  return op == MOE_MAX ? ncclMax : op == MOE_MIN ? ncclMin : ncclSum;
}

static moe_status nccl_all_reduce(moe_comm *c, moe_tensor x, moe_reduce_op op) {
  MOE_TRY(check_async(c));
  NCCL_TRY(ncclAllReduce(x.data, x.data, (size_t)moe_tensor_count(x), type_of(x.dtype), op_of(op),
                         comm_of(c), stream_of(c)));
  return MOE_OK;
}

static moe_status nccl_reduce_scatter(moe_comm *c, moe_tensor x, moe_tensor out) {
  MOE_TRY(check_async(c));
  NCCL_TRY(ncclReduceScatter(x.data, out.data, (size_t)moe_tensor_count(out), type_of(x.dtype),
                             ncclSum, comm_of(c), stream_of(c)));
  return MOE_OK;
}

static moe_status nccl_all_gather(moe_comm *c, moe_tensor x, moe_tensor out) {
  MOE_TRY(check_async(c));
  NCCL_TRY(ncclAllGather(x.data, out.data, (size_t)moe_tensor_count(x), type_of(x.dtype),
                         comm_of(c), stream_of(c)));
  return MOE_OK;
}

static moe_status nccl_gather(moe_comm *c, moe_tensor x, moe_tensor out, int root) {
  size_t bytes = (size_t)moe_tensor_bytes(x);
  MOE_TRY(check_async(c));
#if BY_COPY_ENGINES
  NCCL_TRY(ncclGather(x.data, out.data, bytes, ncclInt8, root, comm_of(c), stream_of(c)));
  return MOE_OK;
#else
  NCCL_TRY(ncclGroupStart());
  moe_status status =
      nccl_check(ncclSend(x.data, bytes, ncclInt8, root, comm_of(c), stream_of(c)), "ncclSend");
  for (int r = 0; r < c->size && c->rank == root && status == MOE_OK; r++)
    status = nccl_check(ncclRecv((char *)out.data + (size_t)r * bytes, bytes, ncclInt8, r,
                                 comm_of(c), stream_of(c)),
                        "ncclRecv");
  moe_status ended = nccl_check(ncclGroupEnd(), "ncclGroupEnd");
  return status != MOE_OK ? status : ended;
#endif
}

static moe_status nccl_all_to_all(moe_comm *c, moe_tensor send, const int64_t *send_rows,
                                  const int64_t *send_at, moe_tensor recv, const int64_t *recv_rows,
                                  const int64_t *recv_at) {
  int64_t row = moe_dtype_size(send.dtype);
  for (int i = 1; i < send.dims; i++) row *= send.shape[i];
  MOE_TRY(check_async(c));
  NCCL_TRY(ncclGroupStart());
  moe_status status = MOE_OK;
  for (int r = 0; r < c->size && status == MOE_OK; r++) {
    const char *from = (const char *)send.data + send_at[r] * row;
    char *to = (char *)recv.data + recv_at[r] * row;
    if (send_rows[r] > 0)
      status = nccl_check(
          ncclSend(from, (size_t)(send_rows[r] * row), ncclInt8, r, comm_of(c), stream_of(c)),
          "ncclSend");
    if (recv_rows[r] > 0 && status == MOE_OK)
      status = nccl_check(
          ncclRecv(to, (size_t)(recv_rows[r] * row), ncclInt8, r, comm_of(c), stream_of(c)),
          "ncclRecv");
  }
  moe_status ended = nccl_check(ncclGroupEnd(), "ncclGroupEnd");
  return status != MOE_OK ? status : ended;
}

static moe_status nccl_exchange_chunks(moe_comm *c, moe_tensor x, moe_tensor out) {
  size_t chunk = (size_t)(moe_tensor_bytes(x) / c->size);
  MOE_TRY(check_async(c));
#if BY_COPY_ENGINES
  NCCL_TRY(ncclAlltoAll(x.data, out.data, chunk, ncclInt8, comm_of(c), stream_of(c)));
  return MOE_OK;
#else
  NCCL_TRY(ncclGroupStart());
  moe_status status = MOE_OK;
  for (int r = 0; r < c->size && status == MOE_OK; r++) {
    size_t at = (size_t)r * chunk;
    status = nccl_check(
        ncclSend((const char *)x.data + at, chunk, ncclInt8, r, comm_of(c), stream_of(c)),
        "ncclSend");
    if (status == MOE_OK)
      status =
          nccl_check(ncclRecv((char *)out.data + at, chunk, ncclInt8, r, comm_of(c), stream_of(c)),
                     "ncclRecv");
  }
  moe_status ended = nccl_check(ncclGroupEnd(), "ncclGroupEnd");
  return status != MOE_OK ? status : ended;
#endif
}

static moe_status nccl_broadcast(moe_comm *c, moe_tensor x, int root) {
  MOE_TRY(check_async(c));
  NCCL_TRY(ncclBroadcast(x.data, x.data, (size_t)moe_tensor_bytes(x), ncclInt8, root, comm_of(c),
                         stream_of(c)));
  return MOE_OK;
}

const moe_comm_backend moe_comm_nccl_backend = {
    .name = "NCCL",
    .open = nccl_open,
    .close = nccl_close,
    .all_reduce = nccl_all_reduce,
    .reduce_scatter = nccl_reduce_scatter,
    .all_gather = nccl_all_gather,
    .gather = nccl_gather,
    .all_to_all = nccl_all_to_all,
    .exchange_chunks = nccl_exchange_chunks,
    .broadcast = nccl_broadcast,
    .alloc = nccl_alloc,
    .share = nccl_share,
    .free = nccl_free,
};
#else
typedef int moe_comm_nccl_not_built;
#endif
