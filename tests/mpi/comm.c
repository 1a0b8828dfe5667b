/* Worker: every collective against what its ranks could have said themselves.
 *
 *     mpi_comm [LIMIT]      LIMIT: bytes of one MPI call, to cut small data into many pieces
 *
 * Values are small integers, so every sum is exact and equality is asked for. */
#include "parallel/comm_backend.h"
#include "tests/mpi/worker.h"

/* A number of rank r, different from its neighbours, small enough for any type. */
static double value(int r, int64_t i) {
  return (double)((r * 7 + i * 3) % 11) - 4.0;
}

static void fill(moe_tensor x, int rank) {
  for (int64_t i = 0; i < moe_tensor_count(x); i++) set(x, i, value(rank, i));
}

static double reduced(int size, int64_t i, moe_reduce_op op) {
  double y = value(0, i);
  for (int r = 1; r < size; r++) {
    double v = value(r, i);
    y = op == MOE_SUM ? y + v : op == MOE_MAX ? (v > y ? v : y) : (v < y ? v : y);
  }
  return y;
}

static void check_all_reduce(moe_comm *c, moe_dtype dtype, int64_t n, moe_reduce_op op) {
  moe_tensor x = worker_tensor(dtype, 1, n);
  fill(x, moe_comm_rank(c));
  OK(moe_comm_all_reduce(c, x, op));
  for (int64_t i = 0; i < n; i++) REQUIRE(get(x, i) == reduced(moe_comm_size(c), i, op));
  free(x.data);
}

/* Values whose sum depends on the order of addition must still be the same bits everywhere. */
static void check_same_bits(moe_comm *c, int64_t n) {
  moe_tensor x = worker_tensor(MOE_F32, 1, n), first = worker_tensor(MOE_F32, 1, n);
  for (int64_t i = 0; i < n; i++)
    set(x, i, (value(moe_comm_rank(c), i) + 0.1) * (i % 5 == 0 ? 1e7 : 1e-3));
  OK(moe_comm_all_reduce(c, x, MOE_SUM));
  memcpy(first.data, x.data, (size_t)moe_tensor_bytes(x));
  OK(moe_comm_broadcast(c, first, 0));
  REQUIRE(memcmp(first.data, x.data, (size_t)moe_tensor_bytes(x)) == 0);
  free(x.data);
  free(first.data);
}

/* One large value and many of half its last place: adding in the half type would lose them all. */
static void check_rounds_once(moe_comm *c, moe_dtype dtype, double large) {
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  moe_tensor x = worker_tensor(dtype, size, 3), y = worker_tensor(dtype, 1, 3);
  moe_tensor expected = worker_tensor(dtype, 1, 1);
  set(expected, 0, large + (size - 1));
  for (int64_t i = 0; i < 3 * size; i++) set(x, i, rank == 0 ? large : 1.0);
  OK(moe_comm_reduce_scatter_to(c, x, y));
  OK(moe_comm_all_reduce(c, x, MOE_SUM));
  for (int64_t i = 0; i < 3 * size; i++) REQUIRE(get(x, i) == get(expected, 0));
  for (int64_t i = 0; i < 3; i++) REQUIRE(get(y, i) == get(expected, 0));
  free(x.data);
  free(y.data);
  free(expected.data);
}

static void check_reduce_scatter(moe_comm *c, moe_dtype dtype, int64_t n) {
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  moe_tensor x = worker_tensor(dtype, size, n), out = worker_tensor(dtype, 1, n);
  fill(x, rank);
  OK(moe_comm_reduce_scatter_to(c, x, out));
  for (int64_t i = 0; i < size * n; i++) REQUIRE(get(x, i) == value(rank, i));
  OK(moe_comm_reduce_scatter(c, x));
  for (int64_t i = 0; i < n; i++) {
    double sum = reduced(size, rank * n + i, MOE_SUM);
    REQUIRE(get(out, i) == sum);
    REQUIRE(get(x, rank * n + i) == sum);
  }
  free(x.data);
  free(out.data);
}

static void check_all_gather(moe_comm *c, moe_dtype dtype, int64_t n) {
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  moe_tensor x = worker_tensor(dtype, 1, n), out = worker_tensor(dtype, size, n);
  moe_tensor in_place = worker_tensor(dtype, size, n);
  fill(x, rank);
  memcpy((char *)in_place.data + rank * moe_tensor_bytes(x), x.data, (size_t)moe_tensor_bytes(x));
  OK(moe_comm_all_gather_to(c, x, out));
  OK(moe_comm_all_gather(c, in_place));
  for (int r = 0; r < size; r++)
    for (int64_t i = 0; i < n; i++) {
      REQUIRE(get(out, r * n + i) == value(r, i));
      REQUIRE(get(in_place, r * n + i) == value(r, i));
    }
  free(x.data);
  free(out.data);
  free(in_place.data);
}

static void check_gather(moe_comm *c, moe_dtype dtype, int64_t n) {
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  moe_tensor x = worker_tensor(dtype, 1, n), out = worker_tensor(dtype, size, n);
  fill(x, rank);
  for (int root = 0; root < size; root++) {
    for (int64_t i = 0; i < size * n; i++) set(out, i, 77.0);
    OK(moe_comm_gather(c, x, out, root));
    for (int64_t i = 0; i < size * n; i++)
      REQUIRE(get(out, i) == (rank == root ? value((int)(i / n), i % n) : 77.0));
  }
  for (int64_t i = 0; i < n; i++) set(out, rank * n + i, value(rank, i));
  OK(moe_comm_gather(c, rank == 0 ? moe_tensor_rows(out, 0, 1) : x, out, 0));
  for (int64_t i = 0; rank == 0 && i < size * n; i++)
    REQUIRE(get(out, i) == value((int)(i / n), i % n));
  REQUIRE(moe_comm_gather(c, x, out, size) == MOE_INVALID);
  REQUIRE(size == 1 || moe_comm_gather(c, x, x, 0) == MOE_INVALID);
  free(x.data);
  free(out.data);
}

/* Rows from `from` to `to`: none for some pairs. */
static int64_t rows_between(int from, int to) {
  return (from * 2 + to) % 4;
}

/* Uneven counts, gaps in the send buffer, the ranks in reverse order in the receive buffer. */
static void check_all_to_all(moe_comm *c, moe_dtype dtype, int64_t width) {
  enum { MOST = 64 };
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  int64_t send_rows[MOST], send_at[MOST], recv_rows[MOST], recv_at[MOST], sent = 0, got = 0;
  REQUIRE(size <= MOST);
  for (int r = 0; r < size; r++) {
    send_rows[r] = rows_between(rank, r);
    send_at[r] = sent + 1;
    sent += send_rows[r] + 1;
  }
  for (int r = size - 1; r >= 0; r--) {
    recv_rows[r] = rows_between(r, rank);
    recv_at[r] = got;
    got += recv_rows[r];
  }
  moe_tensor send = worker_tensor(dtype, sent, width), recv = worker_tensor(dtype, got + 1, width);
  for (int64_t i = 0; i < sent * width; i++) set(send, i, -100.0);
  for (int64_t i = 0; i < width; i++) set(recv, got * width + i, 77.0);
  for (int r = 0; r < size; r++)
    for (int64_t i = 0; i < send_rows[r] * width; i++)
      set(send, send_at[r] * width + i, value(rank + 3 * r, i));
  OK(moe_comm_all_to_all(c, send, send_rows, send_at, recv, recv_rows, recv_at));
  for (int r = 0; r < size; r++)
    for (int64_t i = 0; i < recv_rows[r] * width; i++)
      REQUIRE(get(recv, recv_at[r] * width + i) == value(r + 3 * rank, i));
  for (int64_t i = 0; i < width; i++) REQUIRE(get(recv, got * width + i) == 77.0);

  recv_rows[0] = got + 2; /* outside: refused on every rank before anything moves */
  REQUIRE(moe_comm_all_to_all(c, send, send_rows, send_at, recv, recv_rows, recv_at) ==
          MOE_INVALID);
  free(send.data);
  free(recv.data);
}

static void check_broadcast(moe_comm *c, moe_dtype dtype, int64_t n) {
  moe_tensor x = worker_tensor(dtype, 1, n);
  for (int root = 0; root < moe_comm_size(c); root++) {
    fill(x, moe_comm_rank(c));
    OK(moe_comm_broadcast(c, x, root));
    for (int64_t i = 0; i < n; i++) REQUIRE(get(x, i) == value(root, i));
  }
  REQUIRE(moe_comm_broadcast(c, x, moe_comm_size(c)) == MOE_INVALID);
  free(x.data);
}

static void check_host(moe_comm *c) {
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  int64_t whole[2] = {(int64_t)1 << 40, rank};
  double real[2] = {0.5, (double)-rank};
  OK(moe_comm_host_all_reduce_i64(c, whole, 2, MOE_SUM));
  OK(moe_comm_host_all_reduce_f64(c, real, 2, MOE_MIN));
  REQUIRE(whole[0] == (int64_t)size << 40 && whole[1] == (int64_t)size * (size - 1) / 2);
  REQUIRE(real[0] == 0.5 && real[1] == 1.0 - size);

  char mine[100], *all = calloc((size_t)size, sizeof mine);
  memset(mine, 'a' + rank, sizeof mine);
  REQUIRE(all);
  OK(moe_comm_host_all_gather(c, mine, sizeof mine, all));
  for (int i = 0; i < size * (int)sizeof mine; i++) REQUIRE(all[i] == 'a' + i / 100);
  OK(moe_comm_host_broadcast(c, mine, sizeof mine, size - 1));
  REQUIRE(mine[0] == 'a' + size - 1 && mine[99] == mine[0]);
  free(all);
}

/* Rank r brings 37 r bytes of its own letter; rank 0 brings nothing. */
static void check_gather_bytes(moe_comm *c, int root) {
  int size = moe_comm_size(c), rank = moe_comm_rank(c);
  int64_t *lengths = calloc((size_t)size, sizeof *lengths);
  char *mine = malloc((size_t)(37 * rank + 1)), *at;
  void *all = NULL;
  REQUIRE(lengths && mine);
  memset(mine, 'a' + rank, (size_t)(37 * rank + 1));
  OK(moe_comm_host_gather_bytes(c, mine, 37 * rank, root, &all, lengths));
  REQUIRE((all != NULL) == (rank == root));
  at = all;
  for (int r = 0; rank == root && r < size; r++) {
    REQUIRE(lengths[r] == 37 * r);
    for (int i = 0; i < 37 * r; i++) REQUIRE(*at++ == 'a' + r);
  }
  free(all);
  free(mine);
  free(lengths);
}

static void check_group(moe_comm *c) {
  static const moe_dtype all[] = {MOE_F32, MOE_F64, MOE_I32, MOE_BF16, MOE_F16};
  for (int i = 0; i < 5; i++) {
    check_all_reduce(c, all[i], 1001, MOE_SUM);
    check_all_reduce(c, all[i], 0, MOE_SUM);
    check_reduce_scatter(c, all[i], 130);
    check_all_gather(c, all[i], 97);
    check_gather(c, all[i], 89);
    check_all_to_all(c, all[i], 5);
    check_broadcast(c, all[i], 321);
  }
  for (int i = 0; i < 3; i++) {
    check_all_reduce(c, all[i], 65, MOE_MAX);
    check_all_reduce(c, all[i], 65, MOE_MIN);
  }
  check_same_bits(c, 5000);
  check_rounds_once(c, MOE_BF16, 256.0);
  check_rounds_once(c, MOE_F16, 2048.0);
  check_host(c);
  check_gather_bytes(c, 0);
  check_gather_bytes(c, moe_comm_size(c) - 1);
}

/* Odd and even ranks, each group in reverse order. */
static void check_split(const worker *w) {
  moe_comm *half;
  OK(moe_comm_split(w->world, w->rank % 2, -w->rank, &half));
  int size = (w->size + (w->rank % 2 == 0)) / 2;
  REQUIRE(moe_comm_size(half) == size);
  REQUIRE(moe_comm_rank(half) == size - 1 - w->rank / 2);
  check_group(half);
  moe_comm_destroy(half);
}

/* Before a device is open ranks can agree, but not exchange tensors. */
static void check_without_device(const worker *w) {
  float values[8] = {0};
  moe_tensor x = moe_tensor_1d(values, MOE_F32, 1), y = moe_tensor_1d(values + 1, MOE_F32, 1);
  moe_comm *c;
  OK(moe_comm_world(NULL, &c));
  OK(moe_agree(c, MOE_OK));
  REQUIRE(w->size == 1 || moe_comm_all_reduce(c, x, MOE_SUM) == MOE_INVALID);
  REQUIRE(w->size > 1 || moe_comm_all_gather_to(c, x, y) == MOE_INVALID);
  moe_comm_destroy(c);
}

static void check_refusals(const worker *w) {
  moe_tensor x = worker_tensor(MOE_BF16, 1, 3 * w->size), y = worker_tensor(MOE_F32, 1, 3);
  REQUIRE(moe_comm_all_reduce(w->world, x, MOE_MAX) == MOE_INVALID);
  REQUIRE(moe_comm_all_gather_to(w->world, y, x) == MOE_INVALID);
  moe_tensor odd = moe_tensor_1d(x.data, MOE_BF16, w->size + 1);
  REQUIRE(w->size == 1 || moe_comm_reduce_scatter(w->world, odd) == MOE_INVALID);
  free(x.data);
  free(y.data);
}

int main(int argc, char **argv) {
  if (argc > 1) moe_mpi_limit = atoll(argv[1]);
  worker w = worker_open(&argc, &argv);
  REQUIRE(moe_comm_local_size() == w.size && moe_comm_local_rank() == w.rank);
  check_without_device(&w);
  check_refusals(&w);
  check_group(w.world);
  check_split(&w);
  worker_close(&w);
  return 0;
}
