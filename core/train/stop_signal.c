/* A flag that signals raise, and a clock.
 *
 * Signals may arrive on any thread and before anything is set up, so the handler only counts. */
#include "core/train/stop_signal.h"

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "core/base/log.h"

static const int numbers[] = {SIGTERM, SIGINT, SIGUSR2};
enum { NUMBERS = sizeof numbers / sizeof *numbers, ENDING_S = 1 };

static struct {
  bool listening;
  double since; /* moe_clock_s */
} stop;
static atomic_int requests, interrupts, last_number;

static void on_signal(int number) {
  atomic_fetch_add(&requests, 1);
  atomic_store(&last_number, number);
  if (number != SIGINT || atomic_fetch_add(&interrupts, 1) == 0) return;
  signal(SIGINT, SIG_DFL);
  raise(SIGINT);
}

void moe_stop_listen(void) {
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  if (stop.listening) return;
  stop.listening = true;
  stop.since = moe_clock_s();
  for (int i = 0; i < NUMBERS; i++) sigaction(numbers[i], &action, NULL);
}

void moe_stop_unlisten(void) {
  for (int i = 0; i < NUMBERS; i++) signal(numbers[i], SIG_DFL);
  stop.listening = false;
  if (moe_stop_requested()) raise(atomic_load(&last_number));
}

bool moe_stop_requested(void) {
  return atomic_load(&requests) > 0;
}

/* ---- wall clock ------------------------------------------------------------------------------ */

static double elapsed_s(void) {
  return moe_clock_s() - stop.since;
}

static double longer(double a, double b) {
  return a > b ? a : b;
}

moe_wall_clock moe_wall_clock_start(double limit_s, double expected_save_s) {
  moe_wall_clock w = {.limit_s = limit_s, .save_s = expected_save_s, .last_s = elapsed_s()};
  return w;
}

void moe_wall_clock_saved(moe_wall_clock *w, double seconds) {
  w->save_s = longer(w->save_s, seconds);
}

bool moe_wall_clock_is_up(moe_wall_clock *w) {
  double now = elapsed_s();
  w->stretch_s = longer(w->stretch_s, now - w->last_s);
  w->last_s = now;
  return w->limit_s > 0.0 && now + 2.0 * (w->stretch_s + w->save_s) + ENDING_S > w->limit_s;
}
