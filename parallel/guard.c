/* A list of guarded transports. */
#include "parallel/guard.h"

#include <pthread.h>
#include <stdlib.h>

enum { PATIENCE = 3 };

typedef struct guard {
  moe_status (*check)(void *about);
  void *about;
  int failures;
  struct guard *next;
} guard;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static guard *guards;

moe_status moe_guard_add(moe_status (*check)(void *about), void *about) {
  guard *g = calloc(1, sizeof *g);
  if (!g) return moe_fail(MOE_NO_MEMORY, "out of memory: guarding a transport");
  g->check = check;
  g->about = about;
  pthread_mutex_lock(&lock);
  g->next = guards;
  guards = g;
  pthread_mutex_unlock(&lock);
  return MOE_OK;
}

void moe_guard_remove(void *about) {
  pthread_mutex_lock(&lock);
  guard **at = &guards;
  while (*at && (*at)->about != about) at = &(*at)->next;
  guard *found = *at;
  if (found) *at = found->next;
  pthread_mutex_unlock(&lock);
  free(found);
}

moe_status moe_guard_look(void) {
  moe_status failed = MOE_OK;
  if (pthread_mutex_trylock(&lock) != 0) return MOE_OK;
  for (guard *g = guards; g && failed == MOE_OK; g = g->next) {
    moe_status status = g->check(g->about);
    g->failures = status == MOE_OK ? 0 : g->failures + 1;
    if (g->failures >= PATIENCE) failed = status;
  }
  pthread_mutex_unlock(&lock);
  return failed;
}
