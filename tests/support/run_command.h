/* Run a program from a test: its output and exit code, within a time limit. */
#ifndef MOE_TESTS_SUPPORT_RUN_COMMAND_H
#define MOE_TESTS_SUPPORT_RUN_COMMAND_H

#include <stdbool.h>

typedef struct {
  int exit_code;  /* 128 + signal when one ended it */
  bool timed_out; /* ran past the limit and was killed with all it had started */
  char *output;   /* stdout and stderr together, ended by a zero byte */
} moe_command;

/* Run a shell command line (printf-style). A failure to start it reads as exit code 127. */
moe_command moe_command_run(double timeout_s, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void moe_command_free(moe_command *c);
/* Does the output hold `text`? */
bool moe_command_says(const moe_command *c, const char *text);

/* Run a shell command line (printf-style) whose output is the test's own; returns its exit code,
 * 128 when a signal ended it. */
int moe_shell(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* "mpirun ... -np RANKS BIN/mpi_WORKER ARGUMENTS" for moe_command_run: a format that takes the
 * number of ranks. More ranks than cores is the normal case, so nobody is bound to one. */
#define MOE_MPIRUN(worker) \
  "mpirun --oversubscribe --bind-to none -np %d " MOE_BIN_DIR "/mpi_" worker

#endif
