/* Worker: gradient sums, the global norm, and updated weights on their way to all replicas.
 *
 *     mpi_grad_sync EP      groups of EP ranks; pools of dense and of experts' parameters
 *
 * Gradients are small integers that differ by rank; the answer is made from all ranks' gradients.
 */
#include <math.h>

#include "parallel/pool_gather.h"
#include "tests/mpi/worker.h"

enum { DENSE = 1000, EXPERT = 130 };

static double gradient(int rank, int64_t i) {
  return (double)((rank * 5 + i) % 7) - 3.0;
}

/* Element i of a pool summed over ranks first, first + step, ... */
static double summed(int first, int step, int count, int64_t i) {
  double sum = 0.0;
  for (int r = 0; r < count; r++) sum += gradient(first + r * step, i);
  return sum;
}

static moe_grad_pool make_pool(const worker *w, moe_dtype type, moe_comm *group, int64_t count,
                               bool shard) {
  int64_t padded = moe_pool_padded(count, moe_comm_size(group));
  moe_tensor x = worker_tensor(type, 1, padded);
  for (int64_t i = 0; i < count; i++) set(x, i, gradient(w->rank, i));
  return (moe_grad_pool){
      .grads = moe_tensor_1d(x.data, type, padded), .group = group, .shard = shard};
}

/* The pool is summed over the group where this rank will look. */
static void check_pool(const moe_grad_pool *p, int64_t count, int first, int step) {
  int size = moe_comm_size(p->group);
  int64_t padded = moe_tensor_count(p->grads);
  moe_range own = moe_pool_chunk(padded, size, moe_comm_rank(p->group));
  for (int64_t i = p->shard ? own.begin : 0; i < (p->shard ? own.end : padded); i++)
    REQUIRE(get(p->grads, i) == (i < count ? summed(first, step, size, i) : 0.0));
}

/* Each dense parameter once, each place's experts once in each of two pools. */
static double expected_squares(const worker *w, int ep) {
  double sum = 0.0;
  for (int64_t i = 0; i < DENSE; i++) {
    double g = summed(0, 1, w->size, i);
    sum += g * g;
  }
  for (int place = 0; place < ep; place++)
    for (int64_t i = 0; i < EXPERT; i++) {
      double g = summed(place, ep, w->size / ep, i);
      sum += 2.0 * g * g;
    }
  return sum;
}

static void check_sync(const worker *w, const moe_mesh *m, bool shard) {
  double squares = 123.0; /* must not be added to */
  moe_tensor sum = moe_tensor_1d(&squares, MOE_F64, 1);
  moe_grad_pool pools[] = {make_pool(w, MOE_F32, w->world, DENSE, shard),
                           make_pool(w, MOE_F32, m->replicas, EXPERT, shard),
                           make_pool(w, MOE_BF16, m->replicas, EXPERT, shard),
                           make_pool(w, MOE_F32, w->world, 0, shard)};
  enum { POOLS = sizeof pools / sizeof *pools };
  OK(moe_grad_sync(w->dev, w->world, pools, POOLS, sum));
  check_pool(&pools[0], DENSE, 0, 1);
  for (int i = 1; i <= 2; i++) check_pool(&pools[i], EXPERT, w->rank % m->ep, m->ep);
  REQUIRE(squares == expected_squares(w, m->ep));
  for (int i = 0; i < POOLS; i++) free(pools[i].grads.data);
}

/* Buckets that backward fills from the end, each summed once; twice, as step follows step. */
static void check_buckets(const worker *w, moe_mesh *m, int64_t bucket, bool shard) {
  double squares[2];
  moe_grad_pool pools[] = {make_pool(w, MOE_F32, w->world, DENSE, shard),
                           make_pool(w, MOE_BF16, m->replicas, EXPERT, shard)};
  pools[0].beside = m->world_beside, pools[1].beside = m->replicas_beside;
  moe_grad_bucket = bucket;
  for (int step = 0; step < 2; step++) {
    for (int64_t i = 0; i < DENSE; i++) set(pools[0].grads, i, gradient(w->rank, i));
    for (int64_t i = 0; i < EXPERT; i++) set(pools[1].grads, i, gradient(w->rank, i));
    for (int64_t begin = DENSE; begin >= 100; begin -= 100) /* what is left is for the end */
      OK(moe_grad_sum_from(w->dev, &pools[0], begin));
    for (int64_t begin = EXPERT; begin >= 0; begin -= 13)
      OK(moe_grad_sum_from(w->dev, &pools[1], begin));
    int64_t begun = shard ? 0 : moe_tensor_count(pools[1].grads);
    REQUIRE(pools[1].summed == begun);
    OK(moe_grad_sync(w->dev, w->world, pools, 2, moe_tensor_1d(&squares[step], MOE_F64, 1)));
    check_pool(&pools[0], DENSE, 0, 1);
    check_pool(&pools[1], EXPERT, w->rank % m->ep, m->ep);
    REQUIRE(pools[0].summed == 0 && pools[1].summed == 0);
  }
  REQUIRE(squares[0] == squares[1] && squares[0] > 0.0);
  for (int i = 0; i < 2; i++) free(pools[i].grads.data);
}

/* A pool whose buckets are summed by their owners: two slots of `piece` elements a rank. The sums,
 * of numbers that round, have the bits of a reduce-scatter; twice, as step follows step. Their
 * squares come with them, or are read at the end. */
static void check_owners(const worker *w, const moe_mesh *m, moe_dtype type, int64_t piece,
                         int64_t stride, bool counts) {
  moe_grad_pool pool = make_pool(w, type, m->replicas, EXPERT, true);
  moe_tensor whole = worker_tensor(type, 1, moe_tensor_count(pool.grads));
  int size = moe_comm_size(pool.group);
  int64_t count = moe_tensor_count(pool.grads), begin;
  moe_range own = moe_pool_chunk(count, size, moe_comm_rank(pool.group));
  moe_tensor staging = worker_tensor(type, 1, 2 * size * piece);
  pool.staging = moe_tensor_1d(staging.data, type, 2 * size * piece);
  pool.beside = m->replicas_beside;
  for (int step = 0; step < 2; step++) {
    double squares = 0.0, reference = 0.0;
    moe_tensor sums = moe_tensor_1d(&squares, MOE_F64, 1);
    pool.squares = counts ? sums : moe_tensor_none();
    for (int64_t i = 0; i < count; i++)
      set(pool.grads, i, i < EXPERT ? gradient(w->rank, i) * (1.1 + step) : 0.0);
    memcpy(whole.data, pool.grads.data, (size_t)moe_tensor_bytes(whole));
    OK(moe_comm_reduce_scatter(m->replicas, whole));
    for (begin = count - stride; begin > stride; begin -= stride) {
      OK(moe_grad_sum_from(w->dev, &pool, begin));
      REQUIRE(pool.summed <= count - begin && pool.summed > count - begin - 2 * size * piece);
    }
    OK(moe_grad_sync(w->dev, w->world, &pool, 1, sums));
    REQUIRE(pool.summed == 0);
    for (int64_t i = own.begin; i < own.end; i++) {
      REQUIRE(get(pool.grads, i) == get(whole, i));
      reference += get(whole, i) * get(whole, i);
    }
    OK(moe_comm_host_all_reduce_f64(w->world, &reference, 1, MOE_SUM));
    REQUIRE(fabs(squares - reference) <= 1e-12 * reference && reference > 0.0);
  }
  free(staging.data);
  free(whole.data);
  free(pool.grads.data);
}

/* Every rank "updates" its chunk piece by piece; everyone gets all of it, and only it. */
static void check_pool_gather(const worker *w, const moe_mesh *m, moe_dtype type, int64_t piece) {
  moe_grad_pool pool = make_pool(w, MOE_F32, m->replicas, EXPERT, true);
  int size = moe_comm_size(pool.group);
  int64_t count = moe_tensor_count(pool.grads), updated = 0;
  moe_tensor staging = worker_tensor(MOE_F32, 1, 2 * size * piece);
  moe_tensor weights = worker_tensor(type, 1, count + 1);
  moe_range part;
  pool.staging = moe_tensor_1d(staging.data, MOE_F32, 2 * size * piece);
  pool.beside = m->replicas_beside;
  for (int64_t i = 0; i <= count; i++) set(weights, i, -9.0);
  moe_pool_gather g = moe_pool_gather_of(w->dev, &pool, moe_tensor_1d(weights.data, type, count));
  while (moe_pool_gather_next(&g, &part)) {
    REQUIRE(moe_range_size(part) <= g.piece || part.end == g.own.end);
    for (int64_t i = part.begin; i < part.end; i++) set(weights, i, gradient(0, i));
    updated += moe_range_size(part);
    OK(moe_pool_gather_send(&g, part));
  }
  OK(moe_pool_gather_end(&g));
  REQUIRE(updated == count / size);
  bool mine = moe_comm_rank(pool.group) == 0; /* no more than that element's part is waited for */
  OK(moe_pool_gather_need(&g, (moe_range){0, 1}));
  REQUIRE(g.awaited == (mine ? 0 : 1));
  OK(moe_pool_gather_need(&g, g.own));
  REQUIRE(g.awaited == (mine ? 0 : 1));
  OK(moe_pool_gather_need(&g, (moe_range){0, count}));
  REQUIRE(g.awaited == (size == 1 ? 0 : MOE_GATHER_MARKS));
  REQUIRE(moe_pool_gather_next(&g, &part) && part.begin == g.own.begin); /* the next step's */
  moe_pool_gather_release(&g);
  for (int64_t i = 0; i < count; i++) REQUIRE(get(weights, i) == gradient(0, i));
  REQUIRE(get(weights, count) == -9.0);
  free(staging.data);
  free(weights.data);
  free(pool.grads.data);
}

/* Pieces of one element, odd ones, one that holds a chunk, one that holds more. */
static void check_staged(const worker *w, const moe_mesh *m) {
  const int64_t pieces[] = {1, 5, 64, 1000}, strides[] = {1, 7, 50, 1000};
  for (int p = 0; p < 4; p++) {
    for (int s = 0; s < 4; s++) {
      check_owners(w, m, MOE_F32, pieces[p], strides[s], s % 2 == 0);
      check_owners(w, m, MOE_BF16, pieces[p], strides[s], s % 2 == 1);
    }
    check_pool_gather(w, m, MOE_F32, pieces[p]);
    check_pool_gather(w, m, MOE_BF16, pieces[p]);
  }
}

/* One rank's NaN reaches everyone's norm: that is how a bad step is found. */
static void check_non_finite(const worker *w, const moe_mesh *m) {
  double squares = 0.0;
  moe_grad_pool pool = make_pool(w, MOE_F32, m->replicas, EXPERT, true);
  if (w->rank == w->size - 1) set(pool.grads, 7, (double)NAN);
  OK(moe_grad_sync(w->dev, w->world, &pool, 1, moe_tensor_1d(&squares, MOE_F64, 1)));
  REQUIRE(squares != squares);
  free(pool.grads.data);
}

/* Squares that came with the gradients count as they are; what other ranks add to has none yet. */
static void check_counted(const worker *w, const moe_mesh *m) {
  double squares = 5.0, dense = 0.0;
  moe_grad_pool pools[] = {make_pool(w, MOE_F32, m->replicas, EXPERT, false),
                           make_pool(w, MOE_F32, w->world, DENSE, false)};
  pools[0].counted = true;
  bool alone = moe_comm_size(m->replicas) == 1;
  moe_status status =
      moe_grad_sync(w->dev, w->world, pools, 2, moe_tensor_1d(&squares, MOE_F64, 1));
  REQUIRE(status == (alone ? MOE_OK : MOE_INVALID));
  for (int64_t i = 0; i < DENSE; i++) dense += summed(0, 1, w->size, i) * summed(0, 1, w->size, i);
  if (alone) REQUIRE(squares == 5.0 * w->size + dense);
  for (int i = 0; i < 2; i++) free(pools[i].grads.data);
}

static void check_refusal(const worker *w) {
  double squares = 0.0;
  moe_tensor x = worker_tensor(MOE_F32, 1, 100);
  moe_grad_pool pool = {.grads = moe_tensor_1d(x.data, MOE_F32, 100), .group = w->world};
  REQUIRE(moe_grad_sync(w->dev, w->world, &pool, 1, moe_tensor_1d(&squares, MOE_F64, 1)) ==
          MOE_INVALID);
  free(x.data);
}

int main(int argc, char **argv) {
  moe_mesh mesh;
  worker w = worker_open(&argc, &argv);
  OK(moe_mesh_create(w.world, argc > 1 ? atoi(argv[1]) : 0, 16, &mesh));
  check_sync(&w, &mesh, false);
  check_sync(&w, &mesh, true);
  OK(moe_mesh_create_beside(&mesh, false));
  check_buckets(&w, &mesh, 1, false);
  check_buckets(&w, &mesh, 800, false);
  check_buckets(&w, &mesh, 1 << 20, false);
  check_buckets(&w, &mesh, 1, true);
  check_staged(&w, &mesh);
  check_non_finite(&w, &mesh);
  check_counted(&w, &mesh);
  check_refusal(&w);
  moe_mesh_destroy(&mesh);
  worker_close(&w);
  return 0;
}
