/* Worker: dispatch with real exchanges against each token's own arithmetic.
 *
 *     mpi_dispatch EP       16 experts over groups of EP ranks
 *
 * Expert e is y = f(e) x + o(e), so that a wrong expert, gate, token or rank changes the answer,
 * and everything is a small integer, so that equality is asked for in bf16 too. Batches are
 * functions of (routing, layer, rank): every rank knows what all others send. */
#include "parallel/dispatch.h"
#include "core/base/config.h"
#include "tests/mpi/worker.h"

enum { E = 16, K = 4, D = 6, LAYERS = 3 };

/* How a batch's tokens choose. */
typedef enum {
  RANDOM,
  ONE_EXPERT,    /* all tokens to expert 5 alone */
  ONE_RANK,      /* all tokens to experts 0..3 */
  NONE_TO_FIRST, /* nobody to the lower half */
  SOME_DROPPED,  /* single assignments and whole tokens */
  ALL_DROPPED,
  ODD_RANKS_ONLY, /* even ranks' tokens are all dropped */
  ROUTINGS
} routing;

typedef struct {
  int64_t tokens;
  moe_tensor x, experts, gates, dout;
} batch;

static double factor(int64_t e) {
  return (double)(e % 3 + 1);
}

static double offset(int64_t e) {
  return (double)(e % 2);
}

/* ---- batches ------------------------------------------------------------------------------- */

static uint32_t next(uint32_t *state) {
  *state = *state * 1664525u + 1013904223u;
  return *state >> 16;
}

static void choose(routing kind, int rank, uint32_t *state, int32_t chosen[K]) {
  int32_t all[E];
  int low = kind == NONE_TO_FIRST ? E / 2 : 0;
  for (int e = 0; e < E; e++) all[e] = e;
  for (int k = 0; k < K; k++) { /* K different ones of [low, E) */
    int at = low + k, pick = at + (int)(next(state) % (uint32_t)(E - at));
    chosen[k] = all[pick];
    all[pick] = all[at];
  }
  bool dropped = kind == ALL_DROPPED || (kind == ODD_RANKS_ONLY && rank % 2 == 0) ||
                 (kind == SOME_DROPPED && next(state) % 4 == 0);
  for (int k = 0; k < K; k++) {
    if (kind == ONE_EXPERT) chosen[k] = k == 2 ? 5 : -1;
    if (kind == ONE_RANK) chosen[k] = K - 1 - k;
    if (dropped || (kind == SOME_DROPPED && next(state) % 3 == 0)) chosen[k] = -1;
  }
}

static batch make_batch(routing kind, int layer, int rank, int64_t tokens, moe_dtype dtype) {
  uint32_t state = (uint32_t)(kind * 1000 + layer * 100 + rank + 1) * 2654435761u;
  batch b = {tokens, worker_tensor(dtype, tokens, D), worker_tensor(MOE_I32, tokens, K),
             worker_tensor(MOE_F32, tokens, K), worker_tensor(dtype, tokens, D)};
  for (int64_t t = 0; t < tokens; t++) {
    int32_t *chosen = (int32_t *)b.experts.data + t * K;
    choose(kind, rank, &state, chosen);
    for (int k = 0; k < K; k++)
      set(b.gates, t * K + k, chosen[k] < 0 ? 0.0 : 1.0 + next(&state) % 2);
  }
  for (int64_t i = 0; i < tokens * D; i++) {
    set(b.x, i, (double)(next(&state) % 5) - 2.0);
    set(b.dout, i, (double)(next(&state) % 3) - 1.0);
  }
  return b;
}

static void free_batch(batch *b) {
  free(b->x.data);
  free(b->experts.data);
  free(b->gates.data);
  free(b->dout.data);
}

/* ---- one rank's job ------------------------------------------------------------------------ */

typedef struct {
  const worker *w;
  moe_mesh mesh;
  moe_memory memory;
  moe_dispatcher *dispatcher;
  moe_dtype dtype;
  int64_t most; /* tokens */
  bool uneven;  /* ranks have fewer tokens, each another number */
  moe_route route[LAYERS];
  moe_tensor rows, drows, row_dgates; /* [R, ...] work */
} job;

static int64_t tokens_of(const job *j, int rank) {
  return j->uneven && j->most > rank ? j->most - rank : j->most;
}

static void set_up(job *j, int exchange) {
  moe_dispatch_shape shape = {j->most, D, K, j->dtype, exchange};
  moe_arena *stash = &j->memory.arena[MOE_MEM_STASH];
  OK(moe_dispatcher_create(j->w->dev, &j->mesh, shape, &j->memory, &j->dispatcher));
  for (int l = 0; l < LAYERS; l++) OK(moe_route_create(j->dispatcher, stash, &j->route[l]));
  int64_t most = moe_dispatch_max_rows(j->dispatcher);
  j->rows = moe_arena_tensor_2d(stash, j->dtype, most, D);
  j->drows = moe_arena_tensor_2d(stash, j->dtype, most, D);
  j->row_dgates = moe_arena_tensor_2d(stash, MOE_F32, most, K);
}

static void tear_down(job *j) {
  for (int l = 0; l < LAYERS; l++) moe_route_destroy(&j->route[l]);
  moe_dispatcher_destroy(j->dispatcher);
}

/* Measure, then the same code over real memory, as the trainer does. */
static void open_job(job *j, int exchange) {
  int64_t planned[MOE_MEM_PURPOSES];
  moe_memory_measure(&j->memory);
  set_up(j, exchange);
  tear_down(j);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) planned[i] = j->memory.arena[i].used;
  OK(moe_memory_commit(&j->memory, moe_device_alloc, j->w->dev));
  set_up(j, exchange);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) {
    moe_arena *a = &j->memory.arena[i];
    REQUIRE(a->used == planned[i]);
    if (a->size > 0) memset(a->base, 0x7f, (size_t)a->size); /* nothing may rely on zeros */
  }
}

static void close_job(job *j) {
  tear_down(j);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++)
    if (j->memory.arena[i].size > 0) moe_device_free(j->w->dev, j->memory.arena[i].base);
}

/* ---- what the experts' rank does ----------------------------------------------------------- */

/* rows[r] = sum of its experts' gated outputs. */
static void run_experts(const job *j, const moe_route *r, moe_tensor rows) {
  for (int64_t i = 0; i < r->rows * D; i++) {
    double y = 0.0;
    for (int64_t k = 0; k < K; k++) {
      int64_t e = (int64_t)get(r->experts, i / D * K + k);
      if (e < 0) continue;
      e += j->mesh.owned.begin;
      y += get(r->gates, i / D * K + k) * (factor(e) * get(r->x, i) + offset(e));
    }
    set(rows, i, y);
  }
}

/* drows becomes the rows' dx; row_dgates[r, k] = the output's gradient along expert k's output. */
static void run_experts_backward(const job *j, const moe_route *r, moe_tensor drows,
                                 moe_tensor row_dgates) {
  for (int64_t row = 0; row < r->rows; row++) {
    double dx_factor = 0.0;
    for (int64_t k = 0; k < K; k++) {
      int64_t e = (int64_t)get(r->experts, row * K + k);
      double dgate = 0.0;
      if (e >= 0) {
        e += j->mesh.owned.begin;
        dx_factor += get(r->gates, row * K + k) * factor(e);
        for (int64_t i = row * D; i < (row + 1) * D; i++)
          dgate += get(drows, i) * (factor(e) * get(r->x, i) + offset(e));
      }
      set(row_dgates, row * K + k, dgate);
    }
    for (int64_t i = row * D; i < (row + 1) * D; i++) set(drows, i, dx_factor * get(drows, i));
  }
}

/* ---- checks -------------------------------------------------------------------------------- */

/* Is received row `row` token t of batch b, with my experts alone? Counts them. */
static int64_t check_row(const job *j, const moe_route *r, int64_t row, const batch *b, int64_t t) {
  int64_t mine = 0, begin = j->mesh.owned.begin;
  for (int64_t i = 0; i < D; i++) REQUIRE(get(r->x, row * D + i) == get(b->x, t * D + i));
  for (int64_t k = 0; k < K; k++) {
    int64_t e = (int64_t)get(b->experts, t * K + k);
    bool here = e >= begin && e < j->mesh.owned.end;
    REQUIRE(get(r->experts, row * K + k) == (here ? (double)(e - begin) : -1.0));
    REQUIRE(get(r->gates, row * K + k) == (here ? get(b->gates, t * K + k) : 0.0));
    mine += here;
  }
  return mine;
}

static bool visits(const batch *b, int64_t t, moe_range experts) {
  for (int64_t k = 0; k < K; k++) {
    int64_t e = (int64_t)get(b->experts, t * K + k);
    if (e >= experts.begin && e < experts.end) return true;
  }
  return false;
}

/* Rows in order of source rank, then of token; by all-to-all only the ones that have to come. */
static void check_received(const job *j, const moe_route *r, routing kind, int layer) {
  bool all = strcmp(moe_dispatch_exchange_name(j->dispatcher), "all-to-all") != 0;
  int64_t row = 0, first = j->w->rank / j->mesh.ep * j->mesh.ep;
  REQUIRE(r->rows <= moe_dispatch_max_rows(j->dispatcher));
  for (int from = (int)first; from < first + j->mesh.ep; from++) {
    batch b = make_batch(kind, layer, from, tokens_of(j, from), j->dtype);
    for (int64_t t = 0; t < b.tokens; t++)
      if (all || visits(&b, t, j->mesh.owned)) {
        REQUIRE(row < r->rows);
        REQUIRE(check_row(j, r, row++, &b, t) > 0 || all || j->mesh.ep == 1);
      }
    free_batch(&b);
  }
  REQUIRE(row == r->rows);
}

/* Bytes that left this rank for these rows of (x, experts, gates). */
static void check_cost(const job *j, const batch *b) {
  double seconds, bytes, row = (double)(D * moe_dtype_size(j->dtype) + K * 8), rows = 0.0;
  const char *name = moe_dispatch_exchange_name(j->dispatcher);
  int place = j->w->rank % j->mesh.ep;
  for (int p = 0; p < j->mesh.ep; p++)
    for (int64_t t = 0; p != place && t < b->tokens; t++)
      rows += strcmp(name, "all-gather") == 0 || visits(b, t, moe_shard_range(E, j->mesh.ep, p));
  moe_dispatch_cost(j->dispatcher, &seconds, &bytes);
  REQUIRE(bytes == rows * row);
  REQUIRE(j->mesh.ep == 1 ? seconds == 0.0 : seconds > 0.0 && seconds < 60.0);
  moe_dispatch_cost(j->dispatcher, &seconds, &bytes);
  REQUIRE(bytes == 0.0 && seconds == 0.0);
}

static moe_tensor poisoned(moe_dtype dtype, int64_t rows, int64_t width) {
  moe_tensor t = worker_tensor(dtype, rows, width);
  memset(t.data, 0xff, (size_t)moe_tensor_bytes(t));
  return t;
}

static void forward(job *j, routing kind, int layer, const batch *b) {
  moe_route *r = &j->route[layer];
  double seconds, bytes;
  moe_dispatch_cost(j->dispatcher, &seconds, &bytes);
  if (layer % 2 == 1) OK(moe_dispatch_send_early(j->dispatcher, b->x, r));
  OK(moe_dispatch_send(j->dispatcher, b->x, b->experts, b->gates, r));
  OK(moe_dispatch_wait(j->dispatcher));
  check_received(j, r, kind, layer);
  check_cost(j, b);

  moe_tensor rows = moe_tensor_rows(j->rows, 0, r->rows), out = poisoned(j->dtype, b->tokens, D);
  run_experts(j, r, rows);
  OK(moe_dispatch_return(j->dispatcher, r, rows, out));
  OK(moe_dispatch_wait(j->dispatcher));
  for (int64_t i = 0; i < b->tokens * D; i++) {
    double y = 0.0;
    for (int64_t k = 0; k < K; k++) {
      int64_t e = (int64_t)get(b->experts, i / D * K + k);
      if (e >= 0) y += get(b->gates, i / D * K + k) * (factor(e) * get(b->x, i) + offset(e));
    }
    REQUIRE(get(out, i) == y);
  }
  free(out.data);
}

static void backward(job *j, int layer, const batch *b) {
  moe_route *r = &j->route[layer];
  moe_tensor drows = moe_tensor_rows(j->drows, 0, r->rows);
  moe_tensor row_dgates = moe_tensor_rows(j->row_dgates, 0, r->rows);
  moe_tensor dx = poisoned(j->dtype, b->tokens, D), dgates = poisoned(MOE_F32, b->tokens, K);
  OK(moe_dispatch_send_grad(j->dispatcher, r, b->dout, drows));
  OK(moe_dispatch_wait(j->dispatcher));
  run_experts_backward(j, r, drows, row_dgates);
  OK(moe_dispatch_return_grad(j->dispatcher, r, drows, row_dgates, dx, dgates));
  OK(moe_dispatch_wait(j->dispatcher));
  for (int64_t t = 0; t < b->tokens; t++) {
    double dx_factor = 0.0;
    for (int64_t k = 0; k < K; k++) {
      int64_t e = (int64_t)get(b->experts, t * K + k);
      double dgate = 0.0;
      for (int64_t i = t * D; e >= 0 && i < (t + 1) * D; i++)
        dgate += get(b->dout, i) * (factor(e) * get(b->x, i) + offset(e));
      if (e >= 0) dx_factor += get(b->gates, t * K + k) * factor(e);
      REQUIRE(get(dgates, t * K + k) == dgate);
    }
    for (int64_t i = t * D; i < (t + 1) * D; i++)
      REQUIRE(get(dx, i) == dx_factor * get(b->dout, i));
  }
  free(dx.data);
  free(dgates.data);
}

/* Layers forward, each with another routing, then backward in reverse order: what a layer keeps
 * must survive the others. */
static void run_step(job *j, int first_routing) {
  batch b[LAYERS];
  for (int l = 0; l < LAYERS; l++) {
    routing kind = (routing)((first_routing + l) % ROUTINGS);
    b[l] = make_batch(kind, l, j->w->rank, tokens_of(j, j->w->rank), j->dtype);
    forward(j, kind, l, &b[l]);
  }
  for (int l = LAYERS - 1; l >= 0; l--) {
    backward(j, l, &b[l]);
    free_batch(&b[l]);
  }
}

static void run_job(const worker *w, int ep, int exchange, moe_dtype dtype, int64_t tokens,
                    bool uneven) {
  job j = {.w = w, .dtype = dtype, .most = tokens, .uneven = uneven};
  OK(moe_mesh_create(w->world, ep, E, &j.mesh));
  open_job(&j, exchange);
  for (int first = 0; first < ROUTINGS; first++) run_step(&j, first);
  close_job(&j);
  moe_mesh_destroy(&j.mesh);
}

/* Wrong shapes and experts that are not there are refused before anything is sent. */
static void check_refusals(const worker *w, int ep) {
  job j = {.w = w, .dtype = MOE_F32, .most = 8};
  OK(moe_mesh_create(w->world, ep, E, &j.mesh));
  open_job(&j, MOE_EXCHANGE_ALLTOALL);
  batch b = make_batch(RANDOM, 0, w->rank, 8, MOE_F32), more = make_batch(RANDOM, 0, 0, 9, MOE_F32);
  moe_route *r = &j.route[0];
  REQUIRE(moe_dispatch_send(j.dispatcher, more.x, more.experts, more.gates, r) == MOE_INVALID);
  REQUIRE(moe_dispatch_send(j.dispatcher, b.x, b.gates, b.gates, r) == MOE_INVALID);
  set(b.experts, 5, E);
  if (ep > 1) {
    REQUIRE(moe_dispatch_send(j.dispatcher, b.x, b.experts, b.gates, r) == MOE_INVALID);
    REQUIRE(strstr(moe_error_message(), "token 1 goes to expert 16 of 16"));
  }
  free_batch(&b);
  free_batch(&more);
  close_job(&j);
  moe_mesh_destroy(&j.mesh);
}

static void check_auto(const worker *w, int ep) {
  const char *expected = ep == 1 ? "none" : ep == 2 ? "all-gather" : "all-to-all";
  job j = {.w = w, .dtype = MOE_F32, .most = 8};
  OK(moe_mesh_create(w->world, ep, E, &j.mesh));
  open_job(&j, MOE_EXCHANGE_AUTO);
  REQUIRE(strcmp(moe_dispatch_exchange_name(j.dispatcher), expected) == 0);
  close_job(&j);
  moe_mesh_destroy(&j.mesh);
}

int main(int argc, char **argv) {
  worker w = worker_open(&argc, &argv);
  int ep = argc > 1 ? atoi(argv[1]) : w.size;
  for (int exchange = MOE_EXCHANGE_ALLTOALL; exchange <= MOE_EXCHANGE_ALLGATHER; exchange++) {
    run_job(&w, ep, exchange, MOE_F32, 13, false);
    run_job(&w, ep, exchange, MOE_BF16, 13, false);
    run_job(&w, ep, exchange, MOE_F32, 1, false);
  }
  run_job(&w, ep, MOE_EXCHANGE_ALLTOALL, MOE_F32, 11, true);
  check_refusals(&w, ep);
  check_auto(&w, ep);
  worker_close(&w);
  return 0;
}
