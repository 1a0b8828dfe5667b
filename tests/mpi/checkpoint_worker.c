/* Worker: checkpoints on several ranks.
 *
 *     reshard RUN        save on 1..size ranks, load on 1..size, in one job
 *     loop RUN FIRST     save FIRST, FIRST+1, ... for ever, saying "saved N" after each
 *     check RUN          find what to resume, load it on these ranks; says "found N"
 *     fail RUN           the disk is too small, then one rank cannot write; all must say so
 *     background RUN     save and train in turn, in the background, through a small ring
 *     lock RUN           take the lock, say "locked", hold it until stdin ends
 *     bench RUN MIB      rates of save, verify and load */
#include <inttypes.h>
#include <sys/resource.h>
#include <unistd.h>

#include "checkpoint/saver.h"
#include "tests/checkpoint/sample.h"
#include "tests/mpi/worker.h"

static void save(moe_comm *c, moe_device *dev, const char *run, int64_t step) {
  moe_piece pieces[SAMPLE_PIECES];
  moe_run_state state = sample_state(step);
  int64_t bytes = 0;
  sample_make(pieces, moe_comm_rank(c), moe_comm_size(c), step);
  OK(moe_checkpoint_save(c, dev, run, &state, pieces, SAMPLE_PIECES, 3, &bytes, NULL));
  REQUIRE(bytes > 0);
  sample_free(pieces, SAMPLE_PIECES);
}

/* Each rank wants two ranges of every tensor, cut anywhere and overlapping others'. */
static void load(moe_comm *c, moe_device *dev, const char *path, int64_t step, bool verify) {
  enum { WANTED = 2 * SAMPLE_PIECES };
  moe_piece pieces[WANTED];
  for (int i = 0; i < WANTED; i++) {
    int role = i / 2 / SAMPLE_TENSORS, t = i / 2 % SAMPLE_TENSORS;
    int64_t total = sample_total(t);
    uint64_t key = sample_key(moe_comm_rank(c), moe_comm_size(c), i);
    int64_t begin = (int64_t)(key % (uint64_t)total);
    int64_t count = (int64_t)((key >> 32) % (uint64_t)(total - begin + 1));
    bool whole = (key >> 20) % 4 == 0;
    pieces[i] = sample_piece(role, t, whole ? 0 : begin, whole ? total : count);
  }
  OK(moe_checkpoint_load(c, dev, path, pieces, WANTED, verify));
  for (int i = 0; i < WANTED; i++)
    REQUIRE(sample_is_right(&pieces[i], i / 2 % SAMPLE_TENSORS, step));
  sample_free(pieces, WANTED);
}

static int64_t step_of(moe_comm *c, const char *path) {
  moe_run_state state;
  OK(moe_checkpoint_read_state(c, path, &state));
  int64_t step = state.step;
  moe_run_state expected = sample_state(step);
  REQUIRE(state.tokens == expected.tokens && state.samples == expected.samples);
  REQUIRE(state.seed == expected.seed && state.data_fingerprint == expected.data_fingerprint);
  moe_run_state_clear(&state);
  return step;
}

static void reshard(worker *w, const char *run) {
  char path[MOE_PATH];
  for (int writers = 1; writers <= w->size; writers++) {
    moe_comm *c;
    OK(moe_comm_split(w->world, w->rank < writers, w->rank, &c));
    if (w->rank < writers) save(c, w->dev, run, writers);
    moe_comm_destroy(c);
    OK(moe_comm_barrier(w->world));
    for (int readers = 1; readers <= w->size; readers++) {
      OK(moe_comm_split(w->world, w->rank < readers, w->rank, &c));
      if (w->rank < readers) {
        OK(moe_checkpoint_find(c, run, "auto", path));
        REQUIRE(step_of(c, path) == writers);
        load(c, w->dev, path, writers, readers % 2);
      }
      moe_comm_destroy(c);
      OK(moe_comm_barrier(w->world));
    }
  }
}

static void save_for_ever(worker *w, const char *run, int64_t step) {
  printf("rank %d is process %d\n", w->rank, (int)getpid());
  fflush(stdout);
  OK(moe_comm_barrier(w->world));
  for (;; step++) {
    save(w->world, w->dev, run, step);
    if (w->rank == 0) printf("saved %" PRId64 "\n", step);
    fflush(stdout);
  }
}

static void check(worker *w, const char *run) {
  char path[MOE_PATH];
  OK(moe_checkpoint_find(w->world, run, "auto", path));
  REQUIRE(path[0]);
  int64_t step = step_of(w->world, path);
  load(w->world, w->dev, path, step, true);
  if (w->rank == 0) printf("found %" PRId64 "\n", step);
}

/* The disk has no room for all ranks' parts together: nobody begins. */
static void refuse(worker *w, const char *run) {
  moe_run_state state = sample_state(2);
  moe_piece piece = {.name = "large", .dtype = MOE_F32, .dims = 1, .shape = {INT64_MAX / 8}};
  piece.count = INT64_MAX / 16 / w->size;
  piece.begin = piece.count * w->rank;
  REQUIRE(moe_checkpoint_save(w->world, w->dev, run, &state, &piece, 1, 2, NULL, NULL) == MOE_IO);
  REQUIRE(strstr(moe_error_message(), "a checkpoint needs 2"));
}

/* The last rank hits a file size limit: everyone gets its error, and the older checkpoint stands.
 */
static void fail(worker *w, const char *run) {
  moe_piece pieces[SAMPLE_PIECES];
  moe_run_state state = sample_state(2);
  save(w->world, w->dev, run, 1);
  refuse(w, run);
  if (w->rank == w->size - 1)
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){.rlim_cur = 8192, .rlim_max = RLIM_INFINITY});
  sample_make(pieces, w->rank, w->size, 2);
  moe_status status =
      moe_checkpoint_save(w->world, w->dev, run, &state, pieces, SAMPLE_PIECES, 2, NULL, NULL);
  char blame[32] = "";
  if (w->size > 1) snprintf(blame, sizeof blame, "rank %d", w->size - 1);
  REQUIRE(status == MOE_IO && strstr(moe_error_message(), blame));
  REQUIRE(strstr(moe_error_message(), "shard-"));
  sample_free(pieces, SAMPLE_PIECES);
  check(w, run);
}

/* Ranks that write different amounts, of which the last hits a file size limit in one save: all get
 * the same news at the same poll. Values change as soon as a save has begun. */
static void background(worker *w, const char *run) {
  moe_saver *saver;
  char path[MOE_PATH];
  OK(moe_saver_create(w->world, w->dev, run, (moe_keep){.newest = 2}, 1 << 20, &saver));
  for (int64_t step = 1; step <= 6; step++) {
    moe_piece pieces[SAMPLE_PIECES];
    moe_run_state state = sample_state(step);
    moe_saved saved = {.news = false};
    bool fails = step == 4;
    struct rlimit limit = {.rlim_cur = fails && w->rank == w->size - 1 ? 8192 : RLIM_INFINITY,
                           .rlim_max = RLIM_INFINITY};
    setrlimit(RLIMIT_FSIZE, &limit);
    sample_make(pieces, w->rank, w->size, step);
    OK(moe_saver_begin(saver, &state, pieces, SAMPLE_PIECES));
    for (int i = 0; i < SAMPLE_PIECES; i++) sample_fill(&pieces[i], i % SAMPLE_TENSORS, step + 1);
    for (int polls = 0; !saved.news; polls++) {
      usleep((useconds_t)(500 * w->rank));
      OK(moe_saver_poll(saver, step % 2 == 0 && polls > 1, &saved));
      int64_t news = saved.news, least = news;
      OK(moe_comm_host_all_reduce_i64(w->world, &least, 1, MOE_MIN));
      REQUIRE(least == news);
    }
    REQUIRE(saved.step == step && (saved.status == MOE_OK) == !fails);
    while (moe_saver_busy(saver)) OK(moe_saver_poll(saver, true, &saved));
    sample_free(pieces, SAMPLE_PIECES);
    OK(moe_checkpoint_find(w->world, run, "auto", path));
    REQUIRE(step_of(w->world, path) == (fails ? step - 1 : step));
    load(w->world, w->dev, path, fails ? step - 1 : step, true);
  }
  moe_saver_destroy(saver);
}

static void hold_lock(worker *w, const char *run) {
  moe_run_lock *lock;
  OK(moe_run_lock_take(w->world, run, &lock));
  if (w->rank == 0) printf("locked\n");
  fflush(stdout);
  while (w->rank == 0 && getchar() != EOF) {
  }
  OK(moe_comm_barrier(w->world));
  moe_run_lock_release(lock);
}

/* `mib` MiB in all, as f32 matrices of 4 MiB. */
static void bench(worker *w, const char *run, int64_t mib) {
  int n = (int)(mib / 4 / w->size);
  char path[MOE_PATH];
  moe_run_state state = sample_state(1);
  moe_piece *pieces = calloc((size_t)n, sizeof *pieces);
  for (int i = 0; i < n; i++) {
    moe_piece *p = &pieces[i];
    *p = (moe_piece){.dtype = MOE_F32, .dims = 2, .shape = {1024, 1024}, .count = 1 << 20};
    snprintf(p->name, sizeof p->name, "matrix.%d.%d", w->rank, i);
    p->data = malloc(4 << 20);
    for (int64_t k = 0; k < p->count; k++) ((uint32_t *)p->data)[k] = (uint32_t)(k * 2654435761u);
  }
  for (int round = 0; round < 3; round++, state.step++) {
    int64_t bytes;
    double seconds, start;
    OK(moe_checkpoint_save(w->world, w->dev, run, &state, pieces, n, 2, &bytes, &seconds));
    start = moe_clock_s();
    OK(moe_checkpoint_find(w->world, run, "auto", path));
    double find_s = moe_clock_s() - start;
    start = moe_clock_s();
    OK(moe_checkpoint_load(w->world, w->dev, path, pieces, n, true));
    double load_s = moe_clock_s() - start;
    if (w->rank == 0)
      printf("%.0f MB: save %.2f GB/s, find %.2f GB/s, load %.2f GB/s\n", 1e-6 * (double)bytes,
             1e-9 * (double)bytes / seconds, 1e-9 * (double)bytes / find_s,
             1e-9 * (double)bytes / load_s);
  }
  sample_free(pieces, n);
  free(pieces);
}

int main(int argc, char **argv) {
  worker w = worker_open(&argc, &argv);
  const char *what = argc > 2 ? argv[1] : "";
  if (!strcmp(what, "reshard"))
    reshard(&w, argv[2]);
  else if (!strcmp(what, "loop"))
    save_for_ever(&w, argv[2], argc > 3 ? atoll(argv[3]) : 1);
  else if (!strcmp(what, "check"))
    check(&w, argv[2]);
  else if (!strcmp(what, "fail"))
    fail(&w, argv[2]);
  else if (!strcmp(what, "background"))
    background(&w, argv[2]);
  else if (!strcmp(what, "lock"))
    hold_lock(&w, argv[2]);
  else if (!strcmp(what, "bench"))
    bench(&w, argv[2], argc > 3 ? atoll(argv[3]) : 1024);
  else
    moe_abort(
        moe_fail(MOE_USAGE, "reshard|loop|check|fail|background|lock|bench RUN: see the source"));
  worker_close(&w);
  return 0;
}
