/* What programs that run under mpirun share: start, one report of an error, end. */
#ifndef MOE_LAUNCH_PROGRAM_H
#define MOE_LAUNCH_PROGRAM_H

#include "parallel/comm.h"

/* Start MPI, run `body` with a host-only world, print the error it returns once (its status is the
 * same on every rank), end MPI. Returns the exit code. Collective. */
int moe_program_run(const char *name, int argc, char **argv,
                    moe_status (*body)(int argc, char **argv, moe_comm *world));

#endif
