/* Threads that last as long as the work. */
#include "checkpoint/crew.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
  moe_status (*work)(void *context, int worker, int64_t i);
  void *context;
  int64_t n;
  atomic_llong next;
  atomic_int workers;
  atomic_bool failed;
  pthread_mutex_t lock;
  /* the lowest job at fault, under the lock */
  int64_t fault;
  moe_status status;
  char message[1024];
} crew;

static void report(crew *c, int64_t i, moe_status status) {
  pthread_mutex_lock(&c->lock);
  if (i < c->fault) {
    c->fault = i;
    c->status = status;
    snprintf(c->message, sizeof c->message, "%s", moe_error_message());
  }
  pthread_mutex_unlock(&c->lock);
  atomic_store(&c->failed, true);
}

static void *take_jobs(void *context) {
  crew *c = context;
  int worker = atomic_fetch_add(&c->workers, 1);
  while (!atomic_load(&c->failed)) {
    int64_t i = atomic_fetch_add(&c->next, 1);
    if (i >= c->n) break;
    moe_status status = c->work(c->context, worker, i);
    if (status != MOE_OK) report(c, i, status);
  }
  return NULL;
}

int moe_crew_cores(void) {
  cpu_set_t set;
  int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : MOE_CREW;
  return cores < MOE_CREW ? MOE_CREW : cores > MOE_CREW_MOST ? MOE_CREW_MOST : cores;
}

moe_status moe_crew_work(int threads, int64_t n,
                         moe_status (*work)(void *context, int worker, int64_t i), void *context) {
  pthread_t helper[MOE_CREW_MOST];
  sigset_t all, before;
  int helpers = 0;
  crew c = {.work = work, .context = context, .n = n, .fault = n, .status = MOE_OK};
  pthread_mutex_init(&c.lock, NULL);
  sigfillset(&all); /* signals are for the thread that asks */
  pthread_sigmask(SIG_SETMASK, &all, &before);
  if (threads > MOE_CREW_MOST) threads = MOE_CREW_MOST;
  while (helpers + 1 < threads && helpers + 1 < n &&
         pthread_create(&helper[helpers], NULL, take_jobs, &c) == 0)
    helpers++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  take_jobs(&c);
  while (helpers > 0) pthread_join(helper[--helpers], NULL);
  pthread_mutex_destroy(&c.lock);
  return c.status == MOE_OK ? MOE_OK : moe_fail(c.status, "%s", c.message);
}
