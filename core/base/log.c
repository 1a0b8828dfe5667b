/* Messages for people. Each is one fputs of one line, so lines of several ranks do not mix. */
#include "core/base/log.h"

#include <math.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE_SIZE = 8192 };

static const char *program_name = "moe";
static int program_rank = -1;

void moe_log_init(const char *program, int rank) {
  program_name = program;
  program_rank = rank;
}

const char *moe_log_program(void) {
  return program_name;
}

enum { LINE_ROOM = LINE_SIZE + 256 };

__attribute__((format(printf, 3, 0))) static void compose(char line[LINE_ROOM], const char *kind,
                                                          const char *format, va_list args) {
  char text[LINE_SIZE];
  vsnprintf(text, sizeof text, format, args);
  char who[32] = "";
  if (program_rank > 0) snprintf(who, sizeof who, " (rank %d)", program_rank);
  snprintf(line, LINE_ROOM, "%.128s%s: %s%s\n", program_name, who, kind, text);
}

__attribute__((format(printf, 2, 0))) static void say(const char *kind, const char *format,
                                                      va_list args) {
  char line[LINE_ROOM];
  compose(line, kind, format, args);
  fputs(line, stderr);
}

void moe_info(const char *format, ...) {
  if (program_rank > 0) return;
  va_list args;
  va_start(args, format);
  say("", format, args);
  va_end(args);
}

void moe_warn(const char *format, ...) {
  va_list args;
  va_start(args, format);
  say("warning: ", format, args);
  va_end(args);
}

void moe_error(const char *format, ...) {
  va_list args;
  va_start(args, format);
  say("", format, args);
  va_end(args);
}

void moe_error_now(const char *format, ...) {
  char line[LINE_ROOM];
  struct pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT};
  va_list args;
  va_start(args, format);
  compose(line, "", format, args);
  va_end(args);
  if (poll(&out, 1, 1000) <= 0) return;
  ssize_t written = write(STDERR_FILENO, line, strlen(line));
  (void)written; /* there is nobody left to tell */
}

int moe_report(moe_status status) {
  if (status != MOE_OK) {
    const char *message = moe_error_message();
    moe_error("%s", *message ? message : moe_status_name(status));
    if (getenv("MOE_TRACE") != NULL) fputs(moe_error_trail(), stderr);
  }
  return moe_status_exit_code(status);
}

/* Three significant digits and the largest unit that keeps the number at or above 1. */
static const char *scaled(char text[MOE_TEXT], double value, double step, const char *const *units,
                          int count) {
  int unit = 0;
  while (unit + 1 < count && fabs(value) >= step * 0.9995) {
    value /= step;
    unit++;
  }
  double size = fabs(value);
  int decimals = size < 9.995 ? 2 : size < 99.95 ? 1 : 0;
  if (unit == 0 && value == floor(value)) decimals = 0;
  const char *space = units[unit][0] ? " " : "";
  if (size < 1e6)
    snprintf(text, MOE_TEXT, "%.*f%s%s", decimals, value, space, units[unit]);
  else
    snprintf(text, MOE_TEXT, "%.3g%s%s", value, space, units[unit]);
  return text;
}

const char *moe_text_bytes(char text[MOE_TEXT], double bytes) {
  static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  return scaled(text, bytes, 1024.0, units, 6);
}

const char *moe_text_count(char text[MOE_TEXT], double count) {
  static const char *const units[] = {"", "K", "M", "B", "T"};
  return scaled(text, count, 1000.0, units, 5);
}

const char *moe_text_seconds(char text[MOE_TEXT], double seconds) {
  if (!(seconds >= 0.0 && seconds < 1e15)) {
    snprintf(text, MOE_TEXT, "unknown");
    return text;
  }
  /* Below a minute the fraction matters; above, whole units do. */
  if (seconds < 1e-3)
    snprintf(text, MOE_TEXT, "%.1f us", seconds * 1e6);
  else if (seconds < 0.9995)
    snprintf(text, MOE_TEXT, "%.1f ms", seconds * 1e3);
  else if (seconds < 59.95)
    snprintf(text, MOE_TEXT, "%.1f s", seconds);
  else {
    long long whole = llround(seconds);
    long long days = whole / 86400, hours = whole / 3600, minutes = whole / 60;
    if (whole < 3600)
      snprintf(text, MOE_TEXT, "%lldm %02llds", minutes, whole % 60);
    else if (whole < 86400)
      snprintf(text, MOE_TEXT, "%lldh %02lldm", hours, minutes % 60);
    else
      snprintf(text, MOE_TEXT, "%lldd %02lldh", days, hours % 24);
  }
  return text;
}

double moe_clock_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
