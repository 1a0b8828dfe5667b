/* Saves in the background: one thread per phase of a save.
 *
 * A phase's work gets a thread of its own, which ends with it: starting one costs less than a
 * hundredth of a millisecond, and there is nothing to signal between threads but "done". */
#include "checkpoint/saver.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "checkpoint/snapshot.h"
#include "core/base/log.h"
#include "core/base/place.h"

enum { NICE = 10 };

struct moe_saver {
  moe_comm *world;
  moe_device *dev;
  const char *run_dir;
  moe_keep keep;
  moe_snapshot *snapshot; /* NULL: in the foreground */
  bool busy;
  moe_save save;
  double held_s;
  char told[sizeof((moe_save *)NULL)->message]; /* what moe_saved.message points to */
  /* the thread that does the work of the save's phase */
  bool threaded;
  pthread_t thread;
  atomic_bool done;
  moe_status result;
  char message[sizeof((moe_save *)NULL)->message];
};

moe_status moe_saver_create(moe_comm *world, moe_device *dev, const char *run_dir, moe_keep keep,
                            int64_t memory, moe_saver **out) {
  moe_saver *s = calloc(1, sizeof *s);
  moe_status status = s ? MOE_OK : moe_fail(MOE_NO_MEMORY, "no memory for a saver");
  if (s) {
    s->world = world;
    s->dev = dev;
    s->run_dir = run_dir;
    s->keep = keep;
  }
  if (s && memory > 0) status = moe_snapshot_create(dev, memory, &s->snapshot);
  status = moe_agree(world, status);
  *out = s;
  if (status == MOE_OK) return MOE_OK;
  moe_saver_destroy(s);
  *out = NULL;
  return status;
}

bool moe_saver_busy(const moe_saver *s) {
  return s->busy;
}

/* ---- the thread */

static void *work(void *context) {
  moe_saver *s = context;
  /* The processors are training's; the thread gets what it leaves. Linux keeps this per thread. */
  setpriority(PRIO_PROCESS, (id_t)gettid(), getpriority(PRIO_PROCESS, 0) + NICE);
  s->result = moe_save_work(&s->save);
  if (s->result != MOE_OK) snprintf(s->message, sizeof s->message, "%s", moe_error_message());
  if (s->save.phase == MOE_SAVE_WRITE) moe_snapshot_leave(s->snapshot);
  atomic_store(&s->done, true);
  return NULL;
}

/* Signals are for the main thread: none may interrupt a write. */
static void start_work(moe_saver *s) {
  sigset_t all, before;
  sigfillset(&all);
  atomic_store(&s->done, false);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int failed = pthread_create(&s->thread, NULL, work, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  s->threaded = failed == 0;
  if (!failed) return;
  s->result = MOE_FAILED;
  snprintf(s->message, sizeof s->message, "cannot start a thread: %s", strerror(failed));
  if (s->save.phase == MOE_SAVE_WRITE) moe_snapshot_leave(s->snapshot);
  atomic_store(&s->done, true);
}

/* Waits. What the work came to, with its message as this thread's. */
static moe_status collect_work(moe_saver *s) {
  moe_place_wait("for the disk");
  if (s->threaded) pthread_join(s->thread, NULL);
  moe_place_return();
  s->threaded = false;
  return s->result == MOE_OK ? MOE_OK : moe_fail(s->result, "%s", s->message);
}

void moe_saver_destroy(moe_saver *s) {
  if (!s) return;
  if (s->threaded) pthread_join(s->thread, NULL);
  moe_save_close(&s->save);
  moe_snapshot_destroy(s->snapshot);
  free(s);
}

/* ---- begin */

static moe_status begin_copy(moe_saver *s, const moe_run_state *state, const moe_piece *pieces,
                             int n) {
  moe_piece *list = malloc(((size_t)n + 1) * sizeof *list);
  moe_status status = list ? MOE_OK : moe_fail(MOE_NO_MEMORY, "no memory to list %d pieces", n);
  MOE_TRY_OR(status, done, moe_agree(s->world, status));
  moe_snapshot_begin(s->snapshot, pieces, n, list);
  MOE_TRY_OR(status, done,
             moe_save_open(s->world, NULL, s->run_dir, state, list, n, s->keep, &s->save));
  start_work(s);
  /* When a copy fails the writer hears of it, and so do all ranks at the end of its phase. */
  moe_place_wait("for a copy to host memory");
  if (moe_snapshot_fill(s->snapshot) != MOE_OK) moe_error_clear();
  moe_place_return();
done:
  free(list);
  return status;
}

moe_status moe_saver_begin(moe_saver *s, const moe_run_state *state, const moe_piece *pieces,
                           int n) {
  double start = moe_clock_s();
  if (s->busy) return moe_fail(MOE_INVALID, "a save is still going on");
  if (s->snapshot)
    MOE_TRY(begin_copy(s, state, pieces, n));
  else
    MOE_TRY(moe_save_open(s->world, s->dev, s->run_dir, state, pieces, n, s->keep, &s->save));
  s->busy = true;
  while (!s->snapshot && s->save.phase != MOE_SAVE_DONE)
    MOE_TRY(moe_save_advance(&s->save, moe_save_work(&s->save)));
  s->held_s = moe_clock_s() - start;
  return MOE_OK;
}

/* ---- poll */

static void tell(moe_saver *s, moe_saved *out) {
  memcpy(s->told, s->save.message, sizeof s->told);
  *out = (moe_saved){.news = true,
                     .status = s->save.outcome,
                     .message = s->told,
                     .step = s->save.state.step,
                     .bytes = s->save.bytes,
                     .seconds = s->save.seconds,
                     .write_s = s->save.write_s,
                     .verify_s = s->save.verify_s,
                     .held_s = s->held_s};
}

/* Has every rank ended the work of this phase? */
static moe_status all_done(moe_saver *s, bool *out) {
  int64_t done = atomic_load(&s->done);
  MOE_TRY(moe_comm_host_all_reduce_i64(s->world, &done, 1, MOE_MIN));
  *out = done;
  return MOE_OK;
}

static moe_status next_phase(moe_saver *s, moe_saved *out) {
  MOE_TRY(moe_save_advance(&s->save, collect_work(s)));
  if (s->save.phase == MOE_SAVE_TIDY) tell(s, out);
  if (s->save.phase != MOE_SAVE_DONE) start_work(s);
  return MOE_OK;
}

moe_status moe_saver_poll(moe_saver *s, bool wait, moe_saved *out) {
  *out = (moe_saved){.news = false};
  if (!s->busy) return MOE_OK;
  if (!s->snapshot) tell(s, out); /* began and ended in moe_saver_begin */
  bool on = wait;
  while (s->save.phase != MOE_SAVE_DONE) {
    if (!wait) MOE_TRY(all_done(s, &on));
    if (!on) return MOE_OK;
    MOE_TRY(next_phase(s, out));
    if (!wait) break;
  }
  if (s->save.phase != MOE_SAVE_DONE) return MOE_OK;
  moe_save_close(&s->save);
  s->busy = false;
  return MOE_OK;
}
