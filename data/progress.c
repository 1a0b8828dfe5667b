/* Progress lines. */
#include "data/progress.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "core/base/log.h"

void moe_progress_start(moe_progress *p, const char *label) {
  p->label = label;
  p->started_s = p->shown_s = moe_clock_s();
  p->terminal = isatty(STDERR_FILENO) != 0;
  p->drawn = p->busy = false;
  p->done = 0;
}

bool moe_progress_due(const moe_progress *p) {
  return moe_clock_s() - p->shown_s >= (p->terminal ? 0.5 : 10.0);
}

void moe_progress_say(moe_progress *p, const char *format, ...) {
  p->shown_s = moe_clock_s();
  p->drawn = true;
  fprintf(stderr, "%s%s: %s: ", p->terminal ? "\r\033[K" : "", moe_log_program(), p->label);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputs(p->terminal ? "" : "\n", stderr);
  fflush(stderr);
}

void moe_progress_show(moe_progress *p, int64_t done, int64_t total, const char *more) {
  if (!moe_progress_due(p)) return;
  double rate = (double)done / (moe_clock_s() - p->started_s);
  char a[MOE_TEXT], b[MOE_TEXT], share[3 * MOE_TEXT] = "", eta[2 * MOE_TEXT] = "";
  if (total > 0)
    snprintf(share, sizeof share, " of %s (%.0f %%)", moe_text_bytes(b, (double)total),
             100.0 * (double)done / (double)total);
  if (total >= done && rate > 0)
    snprintf(eta, sizeof eta, ", ETA %s", moe_text_seconds(b, (double)(total - done) / rate));
  moe_progress_say(p, "%s%s, %.1f MB/s%s%s%s", moe_text_bytes(a, (double)done), share, rate / 1e6,
                   *more ? ", " : "", more, eta);
}

/* Whoever finds another one drawing leaves it to that one. */
void moe_progress_add(moe_progress *p, int64_t bytes, int64_t total) {
  int64_t done = __atomic_add_fetch(&p->done, bytes, __ATOMIC_RELAXED);
  if (__atomic_test_and_set(&p->busy, __ATOMIC_ACQUIRE)) return;
  moe_progress_show(p, done, total, "");
  __atomic_clear(&p->busy, __ATOMIC_RELEASE);
}

double moe_progress_end(moe_progress *p) {
  if (p->terminal && p->drawn) fputs("\r\033[K", stderr);
  return moe_clock_s() - p->started_s;
}
