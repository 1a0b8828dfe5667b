/* What programs share: start, one report of an error, end; and being asked to stop. */
#ifndef MOE_LAUNCH_PROGRAM_H
#define MOE_LAUNCH_PROGRAM_H

#include <signal.h>

#include "parallel/comm.h"

/* Start MPI, run `body` with a host-only world, print the error it returns once (its status is the
 * same on every rank), end MPI. Returns the exit code. Collective. */
int moe_program_run(const char *name, int argc, char **argv,
                    moe_status (*body)(int argc, char **argv, moe_comm *world));

/* INT and TERM set moe_stop_asked, for whoever works to look at; reads they interrupt return. */
extern volatile sig_atomic_t moe_stop_asked;
void moe_program_catch_stop(void);

#endif
