/* Progress lines. Fields are in order of importance, so a narrow terminal loses the last ones.
 *
 * A live line leaves the cursor at its start: whatever is printed next takes its place. */
#include "core/train/terminal.h"

#include "core/base/log.h"

#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LINE = 256, UNLIMITED = LINE - 1 };

/* The descriptor a user sees our stdout through. Open MPI gives each rank a pseudo-terminal
 * whether or not its own output is one, so under it the launcher's stdout counts. The caller
 * closes it; -1 when it cannot be found. */
static int open_real_stdout(int fd) {
  if (getenv("OMPI_COMM_WORLD_RANK") == NULL) return dup(fd);
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)getppid(), fd);
  char target[32] = "";
  if (readlink(path, target, sizeof target - 1) < 0) return -1;
  if (strncmp(target, "/dev/", 5) != 0) return -1; /* never open a pipe: it would block */
  return open(path, O_RDONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
}

moe_terminal moe_terminal_of(FILE *out, int64_t first, int64_t total, int64_t interval) {
  moe_terminal t = {
      .out = out, .width = UNLIMITED, .first = first, .total = total, .interval = interval};
  int fd = open_real_stdout(fileno(out));
  if (fd < 0) return t;
  t.live = isatty(fd);
  struct winsize size;
  if (t.live && ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 40 && size.ws_col < LINE)
    t.width = size.ws_col - 1; /* the last column would wrap */
  close(fd);
  return t;
}

/* Adds a field, two spaces before it, if the line has room: a field is whole or absent. */
__attribute__((format(printf, 3, 4))) static void field(const moe_terminal *t, char line[LINE],
                                                        const char *format, ...) {
  char text[LINE];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  size_t used = strlen(line), needed = strlen(text) + (used > 0 ? 2 : 0);
  if (used + needed > (size_t)t->width) return;
  snprintf(line + used, LINE - used, "%s%s", used > 0 ? "  " : "", text);
}

/* "4.21 k", always 7 wide. */
static void rate_text(char text[MOE_TEXT], double value) {
  static const char *const prefix[] = {" ", "k", "M", "G", "T"};
  int p = 0;
  while (value >= 999.5 && p < 4) {
    value /= 1000.0;
    p++;
  }
  int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  snprintf(text, MOE_TEXT, "%5.*f %s", decimals, value, prefix[p]);
}

/* Wall time since the last record, so that evaluations and saves are in the estimate: the mean of
 * the first 20 steps, then a moving average over about as many. */
static double seconds_left(moe_terminal *t, const moe_step_record *r) {
  double now_s = moe_clock_s();
  double seconds = t->last_record_s > 0.0 ? now_s - t->last_record_s : r->seconds;
  t->last_record_s = now_s;
  t->timed++;
  t->step_seconds += (seconds - t->step_seconds) / (double)(t->timed < 20 ? t->timed : 20);
  return t->step_seconds * (double)(t->total - r->step);
}

static int digits(int64_t n) {
  int count = 1;
  while (n >= 10) {
    n /= 10;
    count++;
  }
  return count;
}

void moe_terminal_step(moe_terminal *t, const moe_step_record *r, const moe_step_rates *rates) {
  char line[LINE] = "", text[MOE_TEXT];
  double percent = t->total > 0 ? 100.0 * (double)r->step / (double)t->total : 100.0;
  field(t, line, "step %*lld/%lld", digits(t->total), (long long)r->step, (long long)t->total);
  field(t, line, "%5.1f %%", percent);
  double left_s = seconds_left(t, r);
  field(t, line, "eta %7s", left_s < 1.0 ? "< 1 s" : moe_text_seconds(text, left_s));
  field(t, line, "loss %7.4f", r->loss);
  rate_text(text, rates->tokens_per_s);
  field(t, line, "%s tok/s", text);
  field(t, line, "lr %8.2e", r->lr);
  field(t, line, "|g| %6.3f", r->grad_norm);
  if (r->skipped) field(t, line, "SKIPPED: not finite");
  if (r->dropped > 0.0) field(t, line, "dropped %.0f", r->dropped);
  if (isfinite(rates->mfu)) field(t, line, "%4.1f %% MFU", 100.0 * rates->mfu);
  field(t, line, "%#6.3g TFLOP/s", rates->tflops);
  if (isfinite(rates->load_cv)) field(t, line, "load CV %.2f", rates->load_cv);
  field(t, line, "ce %7.4f", r->ce);

  bool keep =
      r->step % t->interval == 0 || r->step == t->first + 1 || r->step == t->total || r->skipped;
  if (t->live)
    fprintf(t->out, "\r%s\033[K%s", line, keep ? "\n" : "\r");
  else if (keep)
    fprintf(t->out, "%s\n", line);
  fflush(t->out);
  t->overwritable = t->live && !keep;
}

void moe_terminal_eval(moe_terminal *t, const moe_eval_record *r) {
  char line[LINE] = "", text[MOE_TEXT];
  field(t, line, "eval %*lld", digits(t->total), (long long)r->step);
  field(t, line, "validation ce %7.4f", r->ce);
  field(t, line, "perplexity %.2f", r->perplexity);
  field(t, line, "%s tokens", moe_text_count(text, (double)r->tokens));
  field(t, line, "%s", moe_text_seconds(text, r->seconds));
  fprintf(t->out, "%s%s%s\n", t->live ? "\r" : "", line, t->live ? "\033[K" : "");
  fflush(t->out);
  t->overwritable = false;
}

void moe_terminal_end(moe_terminal *t) {
  if (!t->overwritable) return;
  fputc('\n', t->out);
  fflush(t->out);
  t->overwritable = false;
}
