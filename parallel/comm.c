/* Groups of ranks: MPI's start and end, making groups, and the door of every data call.
 *
 * Each call is checked here once; a group of one rank is answered here too (there is nothing to
 * exchange), so a transport only ever sees real groups. */
#include "parallel/comm.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/base/log.h"
#include "core/base/place.h"
#include "kernels/ops.h"
#include "kernels/profile.h"
#include "parallel/comm_backend.h"

/* This process among those of its node, and whether mpirun started it. */
static struct {
  int local_rank, local_size;
  bool under_mpirun;
} process = {0, 1, false};

/* ---- start and end ------------------------------------------------------------------------- */

static moe_status find_place_on_node(void) {
  MPI_Comm node;
  MPI_TRY(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node));
  MPI_TRY(MPI_Comm_rank(node, &process.local_rank));
  MPI_TRY(MPI_Comm_size(node, &process.local_size));
  MPI_TRY(MPI_Comm_free(&node));
  return MOE_OK;
}

moe_status moe_comm_init(int *argc, char ***argv) {
  int provided = MPI_THREAD_SINGLE;
  process.under_mpirun = getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK");
  /* Alone, Open MPI would start a daemon for spawning more processes, which nobody will. */
  if (!process.under_mpirun) setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
  MPI_TRY(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided));
  if (provided < MPI_THREAD_FUNNELED)
    return moe_fail(MOE_FAILED, "MPI: this library supports no threads beside the one that calls "
                                "it: use an MPI built with MPI_THREAD_FUNNELED");
  MPI_TRY(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
  return find_place_on_node();
}

static bool mpi_is_running(void) {
  int started = 0, ended = 0;
  MPI_Initialized(&started);
  MPI_Finalized(&ended);
  return started && !ended;
}

void moe_comm_finalize(void) {
  if (mpi_is_running()) MPI_Finalize();
}

void moe_abort(moe_status status) {
  int code = moe_report(status);
  fflush(NULL);
  if (mpi_is_running() && process.under_mpirun) MPI_Abort(MPI_COMM_WORLD, code);
  exit(code);
}

int moe_comm_local_rank(void) {
  return process.local_rank;
}

int moe_comm_local_size(void) {
  return process.local_size;
}

/* ---- groups -------------------------------------------------------------------------------- */

static moe_status choose_backend(const moe_comm *c, const moe_comm_backend **out) {
  *out = &moe_comm_mpi_backend;
  if (c->size == 1 || !c->dev || moe_device_is_host(c->dev)) return MOE_OK;
#ifdef MOE_WITH_NCCL
  *out = &moe_comm_nccl_backend;
  return MOE_OK;
#else
  return moe_fail(MOE_USAGE,
                  "%d ranks on GPUs need NCCL, which this program was built without: install NCCL "
                  "and build again, or set run.backend = cpu",
                  c->size);
#endif
}

/* A group over `mpi`, which it owns from here on, also on failure. */
static moe_status make_group(moe_device *dev, MPI_Comm mpi, bool beside, moe_comm **out) {
  moe_status status = MOE_OK;
  moe_comm *c = calloc(1, sizeof *c);
  if (!c) {
    MPI_Comm_free(&mpi);
    return moe_fail(MOE_NO_MEMORY, "out of memory: making a group of ranks");
  }
  c->mpi = mpi;
  c->dev = dev;
  c->beside = c->by_copies = beside;
  MOE_TRY_OR(status, failed, moe_mpi_check(MPI_Comm_rank(mpi, &c->rank), "MPI_Comm_rank"));
  MOE_TRY_OR(status, failed, moe_mpi_check(MPI_Comm_size(mpi, &c->size), "MPI_Comm_size"));
  MOE_TRY_OR(status, failed, choose_backend(c, &c->backend));
  if (c->size > 1) MOE_TRY_OR(status, failed, c->backend->open(c));
  *out = c;
  return MOE_OK;
failed:
  moe_comm_destroy(c);
  return status;
}

moe_status moe_comm_world(moe_device *dev, moe_comm **out) {
  MPI_Comm mpi;
  *out = NULL;
  if (!mpi_is_running())
    return moe_fail(MOE_INVALID, "moe_comm_world: MPI is not running: call moe_comm_init first");
  moe_place_collective("making the group of all ranks");
  MPI_TRY(MPI_Comm_dup(MPI_COMM_WORLD, &mpi));
  moe_status status = make_group(dev, mpi, false, out);
  moe_place_return();
  return status;
}

moe_status moe_comm_split(moe_comm *parent, int color, int key, moe_comm **out) {
  MPI_Comm mpi;
  *out = NULL;
  if (color < 0) return moe_fail(MOE_INVALID, "moe_comm_split: color %d is negative", color);
  moe_place_collective("making groups");
  MPI_TRY(MPI_Comm_split(parent->mpi, color, key, &mpi));
  moe_status status = make_group(parent->dev, mpi, false, out);
  moe_place_return();
  return status;
}

moe_status moe_comm_beside(moe_comm *c, moe_comm **out) {
  MPI_Comm mpi;
  *out = NULL;
  moe_place_collective("making groups");
  MPI_TRY(MPI_Comm_dup(c->mpi, &mpi));
  moe_status status = make_group(c->dev, mpi, true, out);
  moe_place_return();
  return status;
}

void moe_comm_destroy(moe_comm *c) {
  if (!c) return;
  if (c->size > 1 && c->backend) c->backend->close(c);
  if (mpi_is_running()) MPI_Comm_free(&c->mpi);
  free(c);
}

int moe_comm_rank(const moe_comm *c) {
  return c->rank;
}

int moe_comm_size(const moe_comm *c) {
  return c->size;
}

bool moe_comm_by_copies(const moe_comm *c) {
  return c->by_copies;
}

static moe_status check_device(const moe_comm *c) {
  return c->dev ? MOE_OK : moe_fail(MOE_INVALID, "comm: tensors in a group without a device");
}

/* Call the transport; a profile shows what it took, waiting for other ranks included. */
#define TRANSPORT(c, call, args)               \
  MOE_TRY(check_device(c));                    \
  moe_profile_begin((c)->dev, #call, 0.0);     \
  moe_place_collective(#call);                 \
  moe_status status = (c)->backend->call args; \
  moe_place_return();                          \
  moe_profile_end((c)->dev);                   \
  return status

/* ---- memory that travels ------------------------------------------------------------------- */

static bool own_memory(const moe_comm *c) {
  return c->size > 1 && c->backend->alloc;
}

void *moe_comm_alloc(moe_comm *c, int64_t bytes) {
  return own_memory(c) ? c->backend->alloc(c, bytes) : moe_device_alloc(c->dev, bytes);
}

moe_status moe_comm_share(moe_comm *c, void *data, int64_t bytes) {
  return own_memory(c) ? c->backend->share(c, data, bytes) : MOE_OK;
}

void moe_comm_free(moe_comm *c, void *data) {
  if (!data) return;
  if (own_memory(c))
    c->backend->free(c, data);
  else
    moe_device_free(c->dev, data);
}

/* ---- data calls ---------------------------------------------------------------------------- */

static moe_tensor flat(moe_tensor t) {
  return moe_tensor_1d(t.data, t.dtype, moe_tensor_count(t));
}

/* Chunk `rank` of a tensor of size equal chunks. */
static moe_tensor own_chunk(const moe_comm *c, moe_tensor x) {
  int64_t n = moe_tensor_count(x) / c->size;
  return moe_tensor_rows(flat(x), c->rank * n, n);
}

/* dst = src, any type: moe_copy between equal types moves bits, so i32 and f64 go as f32. */
static moe_status copy_bits(const moe_comm *c, moe_tensor dst, moe_tensor src) {
  if (dst.data == src.data || moe_tensor_count(src) == 0) return MOE_OK;
  MOE_TRY(check_device(c));
  moe_dtype as = moe_is_half(src.dtype) ? src.dtype : MOE_F32;
  int64_t n = moe_tensor_bytes(src) / moe_dtype_size(as);
  return moe_copy(c->dev, moe_tensor_1d(dst.data, as, n), moe_tensor_1d(src.data, as, n));
}

moe_status moe_comm_all_reduce(moe_comm *c, moe_tensor x, moe_reduce_op op) {
  if (moe_is_half(x.dtype) && op != MOE_SUM)
    return moe_fail(MOE_INVALID, "moe_comm_all_reduce: only sums of %s are possible",
                    moe_dtype_name(x.dtype));
  if (c->size == 1 || moe_tensor_count(x) == 0) return MOE_OK;
  TRANSPORT(c, all_reduce, (c, x, op));
}

/* whole = size chunks of part's count and type? */
static moe_status check_chunks(const moe_comm *c, const char *call, moe_tensor whole,
                               moe_tensor part) {
  if (whole.dtype != part.dtype || moe_tensor_count(whole) != c->size * moe_tensor_count(part))
    return moe_fail(MOE_INVALID, "%s: %lld elements of %s are not %d chunks of %lld elements of %s",
                    call, (long long)moe_tensor_count(whole), moe_dtype_name(whole.dtype), c->size,
                    (long long)moe_tensor_count(part), moe_dtype_name(part.dtype));
  return MOE_OK;
}

moe_status moe_comm_reduce_scatter(moe_comm *c, moe_tensor x) {
  return moe_comm_reduce_scatter_to(c, x, own_chunk(c, x));
}

moe_status moe_comm_reduce_scatter_to(moe_comm *c, moe_tensor x, moe_tensor out) {
  MOE_TRY(check_chunks(c, "moe_comm_reduce_scatter", x, out));
  if (c->size == 1) return copy_bits(c, out, x);
  if (moe_tensor_count(x) == 0) return MOE_OK;
  TRANSPORT(c, reduce_scatter, (c, x, out));
}

moe_status moe_comm_all_gather(moe_comm *c, moe_tensor x) {
  return moe_comm_all_gather_to(c, own_chunk(c, x), x);
}

moe_status moe_comm_all_gather_to(moe_comm *c, moe_tensor x, moe_tensor out) {
  MOE_TRY(check_chunks(c, "moe_comm_all_gather", out, x));
  if (c->size == 1) return copy_bits(c, out, x);
  if (moe_tensor_count(x) == 0) return MOE_OK;
  TRANSPORT(c, all_gather, (c, x, out));
}

static moe_status check_root(const moe_comm *c, const char *call, int root) {
  if (root >= 0 && root < c->size) return MOE_OK;
  return moe_fail(MOE_INVALID, "%s: root %d of %d ranks", call, root, c->size);
}

moe_status moe_comm_gather(moe_comm *c, moe_tensor x, moe_tensor out, int root) {
  MOE_TRY(check_root(c, "moe_comm_gather", root));
  MOE_TRY(check_chunks(c, "moe_comm_gather", out, x));
  if (c->size == 1) return copy_bits(c, out, x);
  if (moe_tensor_count(x) == 0) return MOE_OK;
  TRANSPORT(c, gather, (c, x, out, root));
}

static int64_t row_width(moe_tensor t) {
  int64_t n = 1;
  for (int i = 1; i < t.dims; i++) n *= t.shape[i];
  return n;
}

/* Do all ranges lie inside the tensor's rows? Sizes of single messages must fit MPI's int. */
static moe_status check_ranges(const moe_comm *c, const char *which, moe_tensor t,
                               const int64_t *rows, const int64_t *at) {
  for (int r = 0; r < c->size; r++)
    if (rows[r] < 0 || at[r] < 0 || rows[r] > t.shape[0] || at[r] > t.shape[0] - rows[r])
      return moe_fail(MOE_INVALID,
                      "moe_comm_all_to_all: %s rows [%lld, +%lld) of rank %d lie outside %lld rows",
                      which, (long long)at[r], (long long)rows[r], r, (long long)t.shape[0]);
  if (t.shape[0] > INT32_MAX)
    return moe_fail(MOE_INVALID, "moe_comm_all_to_all: %lld %s rows are more than 2^31 - 1",
                    (long long)t.shape[0], which);
  return MOE_OK;
}

moe_status moe_comm_all_to_all(moe_comm *c, moe_tensor send, const int64_t *send_rows,
                               const int64_t *send_at, moe_tensor recv, const int64_t *recv_rows,
                               const int64_t *recv_at) {
  if (send.dtype != recv.dtype || row_width(send) != row_width(recv))
    return moe_fail(MOE_INVALID, "moe_comm_all_to_all: rows of %lld %s cannot become %lld %s",
                    (long long)row_width(send), moe_dtype_name(send.dtype),
                    (long long)row_width(recv), moe_dtype_name(recv.dtype));
  MOE_TRY(check_ranges(c, "sent", send, send_rows, send_at));
  MOE_TRY(check_ranges(c, "received", recv, recv_rows, recv_at));
  if (send_rows[c->rank] != recv_rows[c->rank])
    return moe_fail(MOE_INVALID, "moe_comm_all_to_all: %lld rows to myself, %lld expected",
                    (long long)send_rows[c->rank], (long long)recv_rows[c->rank]);
  if (c->size == 1)
    return copy_bits(c, moe_tensor_rows(recv, recv_at[0], recv_rows[0]),
                     moe_tensor_rows(send, send_at[0], send_rows[0]));
  TRANSPORT(c, all_to_all, (c, send, send_rows, send_at, recv, recv_rows, recv_at));
}

moe_status moe_comm_exchange_chunks(moe_comm *c, moe_tensor x, moe_tensor out) {
  if (x.dtype != out.dtype || moe_tensor_count(x) != moe_tensor_count(out) ||
      moe_tensor_count(x) % c->size != 0)
    return moe_fail(MOE_INVALID,
                    "moe_comm_exchange_chunks: %lld %s cannot become %lld %s in %d "
                    "equal chunks",
                    (long long)moe_tensor_count(x), moe_dtype_name(x.dtype),
                    (long long)moe_tensor_count(out), moe_dtype_name(out.dtype), c->size);
  if (c->size == 1) return copy_bits(c, out, x);
  if (moe_tensor_count(x) == 0) return MOE_OK;
  TRANSPORT(c, exchange_chunks, (c, x, out));
}

moe_status moe_comm_broadcast(moe_comm *c, moe_tensor x, int root) {
  MOE_TRY(check_root(c, "moe_comm_broadcast", root));
  if (c->size == 1 || moe_tensor_count(x) == 0) return MOE_OK;
  TRANSPORT(c, broadcast, (c, x, root));
}
