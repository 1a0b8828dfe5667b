/* A flag that signals raise. */
#include "core/train/stop_signal.h"

#include <signal.h>
#include <stddef.h>

static volatile sig_atomic_t requested;

static void on_signal(int number) {
  if (requested && number == SIGINT) {
    signal(SIGINT, SIG_DFL);
    raise(SIGINT);
  }
  requested = 1;
}

void moe_stop_listen(void) {
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  requested = 0;
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGUSR2, &action, NULL);
}

bool moe_stop_requested(void) {
  return requested != 0;
}
