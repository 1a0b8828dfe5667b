/* Worker: a job under the watchdog, in which one rank does something.
 *
 *     mpi_watchdog WHAT RANK LIMIT_S
 *
 *     work     all ranks show signs of life for three limits, and no two are a limit apart
 *     save     RANK saves for three limits while the others wait for it in a step
 *     stop     RANK is stopped (SIGSTOP)
 *     loop     RANK computes for ever, holding stdio's lock on stderr
 *     suspend  every rank is stopped for two limits and goes on
 *     guard    RANK's transport fails */
#include <signal.h>
#include <unistd.h>

#include "parallel/guard.h"
#include "parallel/watchdog.h"
#include "tests/mpi/worker.h"

static void sleep_s(double seconds) {
  double end = moe_clock_s() + seconds;
  while (moe_clock_s() < end) usleep(10000);
}

static void compute_for_ever(void) {
  for (volatile long i = 0;; i++) {
  }
}

/* Stop; a child of ours lets us go on after `seconds`. */
static void be_suspended(double seconds) {
  if (fork() == 0) {
    sleep_s(seconds);
    kill(getppid(), SIGCONT);
    _exit(0);
  }
  raise(SIGSTOP);
}

static moe_status torn(void *about) {
  return moe_fail(MOE_FAILED, "the cable of rank %d is torn", *(int *)about);
}

static void misbehave(worker *w, const char *what, double limit) {
  if (strcmp(what, "save") == 0) {
    moe_place_enter(MOE_PHASE_SAVE, 7);
    sleep_s(3.0 * limit);
  }
  if (strcmp(what, "stop") == 0) raise(SIGSTOP);
  if (strcmp(what, "loop") == 0) {
    flockfile(stderr);
    compute_for_ever();
  }
  if (strcmp(what, "guard") == 0) {
    OK(moe_guard_add(torn, &w->rank));
    compute_for_ever();
  }
}

int main(int argc, char **argv) {
  worker w = worker_open(&argc, &argv);
  REQUIRE(argc == 4);
  const char *what = argv[1];
  double limit = atof(argv[3]);
  double limits[MOE_PHASES] = {[MOE_PHASE_START] = 60.0, [MOE_PHASE_SAVE] = 60.0};
  limits[MOE_PHASE_STEP] = limit;
  moe_watchdog *dog;
  OK(moe_watchdog_create(w.world, limits, &dog));
  REQUIRE(dog != NULL);
  OK(moe_comm_barrier(w.world));

  moe_place_enter(MOE_PHASE_STEP, 7);
  OK(moe_comm_barrier(w.world));
  moe_device_label(w.dev, "experts forward", 3);
  for (int i = 0; strcmp(what, "work") == 0 && i < 6; i++) {
    sleep_s(0.5 * limit);
    if (i % 2)
      OK(moe_comm_barrier(w.world));
    else
      moe_device_label(w.dev, "head", -1);
  }
  if (strcmp(what, "suspend") == 0) be_suspended(2.0 * limit + 1.0);
  if (w.rank == atoi(argv[2])) misbehave(&w, what, limit);
  OK(moe_comm_barrier(w.world));
  moe_watchdog_destroy(dog);
  worker_close(&w);
  return 0;
}
