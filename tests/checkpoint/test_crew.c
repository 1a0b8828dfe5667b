#include <criterion/criterion.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/crew.h"

enum { JOBS = 500 };

typedef struct {
  atomic_int done[JOBS];
  atomic_int busy[MOE_CREW_MOST]; /* calls in progress with this worker's number */
  atomic_bool wrong;
  int64_t fails_from; /* jobs from this one on fail */
  int threads;
} log_book;

static moe_status job(void *context, int worker, int64_t i) {
  log_book *b = context;
  if (worker < 0 || worker >= b->threads || i < 0 || i >= JOBS) {
    atomic_store(&b->wrong, true);
    return MOE_OK;
  }
  if (atomic_fetch_add(&b->busy[worker], 1) != 0) atomic_store(&b->wrong, true);
  atomic_fetch_add(&b->done[i], 1);
  usleep((useconds_t)(i * 37 % 200)); /* no two alike */
  atomic_fetch_sub(&b->busy[worker], 1);
  return i >= b->fails_from ? moe_fail(MOE_DAMAGED, "job %d is damaged", (int)i) : MOE_OK;
}

Test(crew, does_each_job_once_and_no_two_with_one_worker) {
  static log_book b = {.fails_from = JOBS};
  static const int threads[] = {1, MOE_CREW, MOE_CREW_MOST};
  for (int t = 0; t < 3; t++)
    for (int n = 0; n <= JOBS; n = n * 3 + 1) {
      b.threads = threads[t];
      memset(b.done, 0, sizeof b.done);
      cr_assert_eq(moe_crew_work(b.threads, n, job, &b), MOE_OK);
      for (int i = 0; i < JOBS; i++) cr_assert_eq(b.done[i], i < n, "job %d of %d", i, n);
    }
  cr_assert_not(b.wrong);
}

Test(crew, returns_the_first_failure_and_begins_no_more) {
  static log_book b = {.fails_from = 100, .threads = MOE_CREW};
  cr_assert_eq(moe_crew_work(MOE_CREW, JOBS, job, &b), MOE_DAMAGED);
  cr_assert_str_eq(moe_error_message(), "job 100 is damaged");
  int begun = 0;
  for (int i = 0; i < JOBS; i++) begun += b.done[i];
  cr_assert(begun > 100 && begun <= 100 + 2 * MOE_CREW, "%d jobs were begun", begun);
}

Test(crew, has_a_number_of_threads_that_can_be_had) {
  int cores = moe_crew_cores();
  cr_assert(cores >= MOE_CREW && cores <= MOE_CREW_MOST, "%d", cores);
}
