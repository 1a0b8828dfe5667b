/* Worker: gradient sums and the global norm.
 *
 *     mpi_grad_sync EP      groups of EP ranks; pools of dense and of experts' parameters
 *
 * Gradients are small integers that differ by rank; the answer is made from all ranks' gradients.
 */
#include <math.h>

#include "parallel/grad_sync.h"
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
  OK(moe_mesh_create_beside(&mesh));
  check_buckets(&w, &mesh, 1, false);
  check_buckets(&w, &mesh, 800, false);
  check_buckets(&w, &mesh, 1 << 20, false);
  check_buckets(&w, &mesh, 1, true);
  check_non_finite(&w, &mesh);
  check_counted(&w, &mesh);
  check_refusal(&w);
  moe_mesh_destroy(&mesh);
  worker_close(&w);
  return 0;
}
