/* The frame of a program. */
#include "launch/program.h"

#include "core/base/log.h"
#include "core/base/startup.h"

volatile sig_atomic_t moe_stop_asked;

static void on_signal(int number) {
  (void)number;
  moe_stop_asked = 1;
}

void moe_program_catch_stop(void) {
  struct sigaction action = {.sa_handler = on_signal}; /* no SA_RESTART: reads must wake up */
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
}

int moe_program_run(const char *name, int argc, char **argv,
                    moe_status (*body)(int argc, char **argv, moe_comm *world)) {
  moe_comm *world = NULL;
  moe_cpu_choose_blas(argv);
  moe_startup_begin();
  moe_log_init(name, -1);
  moe_status status = moe_comm_init(&argc, &argv);
  if (status == MOE_OK) status = moe_comm_world(NULL, &world);
  if (status != MOE_OK) return moe_report(status);
  int rank = moe_comm_rank(world);
  moe_log_init(name, rank);
  moe_startup_done("MPI");
  status = body(argc, argv, world);
  if (status != MOE_OK && rank == 0) moe_report(status);
  moe_comm_destroy(world);
  moe_comm_finalize();
  return moe_status_exit_code(status);
}
