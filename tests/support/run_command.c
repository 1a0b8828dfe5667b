/* Running a program from a test. The child leads a process group of its own, so that a time-out can
 * end it together with everything it started. */
#include "tests/support/run_command.h"

#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void become(const char *line, int output) {
  setpgid(0, 0);
  dup2(output, STDOUT_FILENO);
  dup2(output, STDERR_FILENO);
  close(output);
  setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
  setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
  setenv("OMP_NUM_THREADS", "1", 0);
  execl("/bin/sh", "sh", "-c", line, (char *)NULL);
  _exit(127);
}

/* Read until the end or the deadline; false at the deadline. */
static bool read_all(int from, double deadline, FILE *to) {
  char piece[4096];
  for (;;) {
    double left = deadline - now_s();
    struct pollfd p = {.fd = from, .events = POLLIN};
    if (left <= 0.0) return false;
    if (poll(&p, 1, (int)(left * 1000.0) + 1) <= 0) continue;
    ssize_t n = read(from, piece, sizeof piece);
    if (n <= 0) return true;
    fwrite(piece, 1, (size_t)n, to);
  }
}

moe_command moe_command_run(double timeout_s, const char *format, ...) {
  moe_command c = {.exit_code = 127};
  char line[4096];
  int ends[2];
  size_t size = 0;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);

  FILE *text = open_memstream(&c.output, &size);
  if (!text || pipe(ends) != 0) abort();
  fflush(NULL);
  pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    become(line, ends[1]);
  }
  close(ends[1]);
  if (child > 0) {
    int status = 0;
    c.timed_out = !read_all(ends[0], now_s() + timeout_s, text);
    if (c.timed_out) kill(-child, SIGKILL);
    waitpid(child, &status, 0);
    c.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  close(ends[0]);
  fclose(text);
  return c;
}

int moe_shell(const char *format, ...) {
  char line[8192];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  int status = system(line);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

void moe_command_free(moe_command *c) {
  free(c->output);
  c->output = NULL;
}

bool moe_command_says(const moe_command *c, const char *text) {
  return strstr(c->output, text) != NULL;
}
