/* Saves in the background, and the ring of host memory they are written from. */
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "checkpoint/saver.h"
#include "checkpoint/snapshot.h"
#include "tests/checkpoint/fixture.h"

TestSuite(saver, .init = open_world, .fini = close_world);

enum { MIB = 1 << 20 };

/* ---- the snapshot's ring ---- */

enum { BYTES = 5 * MIB + 12 };

typedef struct {
  moe_snapshot *snapshot;
  moe_piece *pieces;
  int n;
  int64_t step, limit; /* elements asked for at a time; bytes after which to leave */
  char *out;
} taker;

static void *take_all(void *context) {
  taker *t = context;
  int64_t done = 0;
  for (int i = 0; i < t->n; i++) {
    const moe_piece *p = &t->pieces[i];
    for (int64_t at = 0; at < p->count && done < t->limit; at += t->step) {
      int64_t n = p->count - at < t->step ? p->count - at : t->step;
      EXPECT_OK(p->fetch(p->context, p, at, n, t->out + done));
      done += n * moe_dtype_size(p->dtype);
    }
  }
  moe_snapshot_leave(t->snapshot);
  return NULL;
}

/* Pieces of BYTES bytes in all, cut unevenly, one of them empty. */
static int cut_pieces(char *data, moe_piece *pieces) {
  static const int64_t cuts[] = {0, 4, 4, 3 * MIB + 8, 3 * MIB + 12, BYTES};
  int n = 0;
  for (; n < 5; n++) {
    pieces[n] = (moe_piece){.dtype = MOE_F32, .dims = 1, .data = data + cuts[n]};
    pieces[n].count = (cuts[n + 1] - cuts[n]) / 4;
  }
  return n;
}

static void through_a_ring(int64_t ring, int64_t step, int64_t limit) {
  moe_piece pieces[5], from[5];
  pthread_t thread;
  char *data = malloc(BYTES), *out = calloc(1, BYTES);
  for (int i = 0; i < BYTES; i++) data[i] = (char)(sample_mix((uint64_t)i) >> 13);
  taker t = {
      .pieces = from, .n = cut_pieces(data, pieces), .step = step, .limit = limit, .out = out};
  EXPECT_OK(moe_snapshot_create(dev, ring, &t.snapshot));
  cr_expect(moe_snapshot_bytes(t.snapshot) >= ring);
  for (int round = 0; round < 2; round++) { /* a ring serves many saves */
    moe_snapshot_begin(t.snapshot, pieces, t.n, from);
    pthread_create(&thread, NULL, take_all, &t);
    EXPECT_OK(moe_snapshot_fill(t.snapshot));
    bool whole = limit >= BYTES;
    if (whole && ring >= BYTES) memset(data, round, BYTES); /* training goes on at once */
    pthread_join(thread, NULL);
    for (int i = 0; whole && round == 0 && i < BYTES; i++)
      cr_assert(out[i] == (char)(sample_mix((uint64_t)i) >> 13), "byte %d", i);
    for (int i = 0; whole && i < BYTES; i++) data[i] = (char)(sample_mix((uint64_t)i) >> 13);
  }
  moe_snapshot_destroy(t.snapshot);
  free(data);
  free(out);
}

Test(saver, a_ring_of_any_size_passes_every_byte_on) {
  through_a_ring(BYTES, 1000, BYTES);
  through_a_ring(2 * BYTES, 1 << 20, BYTES);
  through_a_ring(MIB, 1000, BYTES);
  through_a_ring(MIB, 300001, BYTES); /* asked for more at once than the ring holds */
  through_a_ring(3 * MIB, 77777, BYTES);
}

Test(saver, filling_ends_when_the_writer_gives_up, .timeout = 20) {
  through_a_ring(MIB, 1000, 100);
  through_a_ring(MIB, 1000, 2 * MIB);
}

/* ---- saves ---- */

static moe_saver *saver;

static void make_saver(int64_t memory, moe_keep keep) {
  EXPECT_OK(moe_saver_create(world, dev, run, keep, memory, &saver));
}

/* Begin to save the sample of a step, and spoil it as training would. */
static moe_status begin(int64_t step) {
  moe_piece pieces[SAMPLE_PIECES];
  moe_run_state state = sample_state(step);
  sample_make(pieces, 0, 1, step);
  state.config = strdup("");
  moe_status status = moe_saver_begin(saver, &state, pieces, SAMPLE_PIECES);
  for (int i = 0; i < SAMPLE_PIECES; i++)
    memset(pieces[i].data, 0xee, (size_t)(pieces[i].count * moe_dtype_size(pieces[i].dtype)));
  sample_free(pieces, SAMPLE_PIECES);
  free(state.config);
  return status;
}

static moe_saved finish(void) {
  moe_saved saved;
  EXPECT_OK(moe_saver_poll(saver, true, &saved));
  cr_expect(!moe_saver_busy(saver));
  return saved;
}

Test(saver, what_changes_after_begin_is_not_in_the_checkpoint) {
  static const int64_t memory[] = {MIB, 0}; /* in the background and in the foreground */
  for (int i = 0; i < 2; i++) {
    make_saver(memory[i], (moe_keep){.newest = 2});
    EXPECT_OK(begin(1 + i));
    cr_expect(moe_saver_busy(saver));
    moe_saved saved = finish();
    cr_expect(saved.news && saved.status == MOE_OK && saved.step == 1 + i, "%s", saved.message);
    cr_expect(saved.bytes > 100000 && saved.seconds >= 0.0 && saved.held_s <= saved.seconds + 0.01);
    cr_expect(saved.write_s > 0.0 && saved.verify_s > 0.0 &&
              saved.write_s + saved.verify_s <= saved.seconds);
    EXPECT_OK(load_sample(1 + i, in_step(1 + i, "")));
    cr_expect(!finish().news, "news comes once");
    moe_saver_destroy(saver);
  }
  cr_expect(resumed_step() == 2);
}

Test(saver, polling_brings_a_save_to_its_end_without_waiting, .timeout = 30) {
  make_saver(MIB, (moe_keep){.newest = 2});
  EXPECT_OK(begin(7));
  int news = 0;
  while (moe_saver_busy(saver)) {
    moe_saved saved;
    EXPECT_OK(moe_saver_poll(saver, false, &saved));
    if (saved.news) {
      cr_expect(saved.status == MOE_OK && saved.step == 7);
      EXPECT_OK(load_sample(7, in_step(7, ""))); /* it is there when it is said to be */
      news++;
    }
    usleep(100);
  }
  cr_expect(news == 1);
  moe_saver_destroy(saver);
}

Test(saver, one_save_at_a_time) {
  make_saver(MIB, (moe_keep){.newest = 2});
  EXPECT_OK(begin(1));
  cr_expect(begin(2) == MOE_INVALID);
  finish();
  EXPECT_OK(begin(2));
  finish();
  moe_saver_destroy(saver);
  cr_expect(resumed_step() == 2);
}

Test(saver, a_save_that_is_abandoned_stays_invisible) {
  make_saver(MIB, (moe_keep){.newest = 2});
  EXPECT_OK(begin(1));
  finish();
  EXPECT_OK(begin(2));
  moe_saver_destroy(saver);
  cr_expect(resumed_step() == 1);
  make_saver(MIB, (moe_keep){.newest = 2});
  EXPECT_OK(begin(3));
  finish();
  moe_saver_destroy(saver);
  cr_expect(resumed_step() == 3);
  SHELL("test -z \"$(find %s -name '.tmp-*')\"", run);
}

Test(saver, a_save_for_which_the_disk_has_no_room_does_not_begin) {
  static const int64_t memory[] = {MIB, 0};
  for (int i = 0; i < 2; i++) {
    moe_run_state state = {.step = 2};
    moe_piece piece = {.name = "large", .dtype = MOE_F32, .dims = 1, .shape = {INT64_MAX / 8}};
    piece.count = piece.shape[0];
    make_saver(memory[i], (moe_keep){.newest = 2});
    cr_expect(moe_saver_begin(saver, &state, &piece, 1) == MOE_IO);
    EXPECT_SAYS("a checkpoint needs 4");
    cr_expect(!moe_saver_busy(saver));
    SHELL("test -z \"$(ls -A %s/checkpoints)\"", run);
    moe_saver_destroy(saver);
  }
}

Test(saver, a_failure_in_the_background_is_told_and_leaves_no_rubbish) {
  static const int64_t memory[] = {MIB, 0};
  struct rlimit before, limit;
  getrlimit(RLIMIT_FSIZE, &before);
  for (int i = 0; i < 2; i++) {
    make_saver(memory[i], (moe_keep){.newest = 2});
    EXPECT_OK(begin(1));
    finish();
    limit = (struct rlimit){10000, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
    EXPECT_OK(begin(2));
    moe_saved saved = finish();
    setrlimit(RLIMIT_FSIZE, &before);
    cr_expect(saved.news && saved.status == MOE_IO && saved.step == 2);
    cr_expect(strstr(saved.message, "File too large"), "%s", saved.message);
    cr_expect(resumed_step() == 1);
    SHELL("test -z \"$(find %s -name '.tmp-*')\"", run);
    moe_saver_destroy(saver);
  }
}

Test(saver, keeps_the_newest_those_of_round_steps_and_the_young) {
  make_saver(MIB, (moe_keep){.newest = 2, .every = 4});
  for (int64_t step = 1; step <= 9; step++) {
    EXPECT_OK(begin(step));
    finish();
  }
  SHELL(
      "cd %s/checkpoints && test \"$(echo step-*)\" = 'step-00000004 step-00000008 step-00000009'",
      run);
  moe_saver_destroy(saver);
  /* Step 4 was made three hours ago, step 8 one. */
  SHELL("cd %s/checkpoints && touch -d '3 hours ago' step-00000004/manifest.json && "
        "touch -d '1 hour ago' step-00000008/manifest.json",
        run);
  make_saver(MIB, (moe_keep){.newest = 2, .hours = 2.0});
  for (int64_t step = 10; step <= 11; step++) {
    EXPECT_OK(begin(step));
    finish();
  }
  SHELL("cd %s/checkpoints && test \"$(echo step-*)\" = "
        "'step-00000008 step-00000009 step-00000010 step-00000011'",
        run);
  moe_saver_destroy(saver);
}

Test(saver, a_disk_without_room_is_refused_before_anything_is_written) {
  moe_commit c;
  EXPECT_OK(moe_commit_plan(run, 1, &c));
  cr_expect(moe_commit_make_room(&c, (int64_t)1 << 60) == MOE_IO);
  EXPECT_SAYS("free and a checkpoint needs 1");
  EXPECT_SAYS("checkpoint.keep");
  EXPECT_OK(moe_commit_make_room(&c, 1000));
}

/* Signals go to the thread that trains. */
static pthread_t signalled;
static void remember_thread(int number) {
  (void)number;
  signalled = pthread_self();
}

Test(saver, the_writing_thread_takes_no_signals, .timeout = 30) {
  signal(SIGUSR2, remember_thread);
  make_saver(MIB, (moe_keep){.newest = 2});
  for (int64_t step = 1; step <= 20; step++) {
    EXPECT_OK(begin(step));
    kill(getpid(), SIGUSR2);
    cr_expect(finish().status == MOE_OK);
    cr_expect(pthread_equal(signalled, pthread_self()));
  }
  moe_saver_destroy(saver);
}
