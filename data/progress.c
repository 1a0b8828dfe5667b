/* Progress lines. */
#include "data/progress.h"

#include <stdio.h>
#include <unistd.h>

#include "core/base/log.h"

void moe_progress_start(moe_progress *p, const char *label) {
  p->label = label;
  p->started_s = p->shown_s = moe_clock_s();
  p->terminal = isatty(STDERR_FILENO) != 0;
  p->drawn = false;
}

void moe_progress_show(moe_progress *p, int64_t done, int64_t total, const char *more) {
  double now_s = moe_clock_s(), elapsed_s = now_s - p->started_s;
  if (now_s - p->shown_s < (p->terminal ? 0.5 : 10.0)) return;
  p->shown_s = now_s;
  p->drawn = true;
  double rate = (double)done / elapsed_s;
  char a[MOE_TEXT], b[MOE_TEXT], share[3 * MOE_TEXT] = "", eta[2 * MOE_TEXT] = "";
  if (total > 0)
    snprintf(share, sizeof share, " of %s (%.0f %%)", moe_text_bytes(b, (double)total),
             100.0 * (double)done / (double)total);
  if (total >= done && rate > 0)
    snprintf(eta, sizeof eta, ", ETA %s", moe_text_seconds(b, (double)(total - done) / rate));
  fprintf(stderr, "%s%s: %s: %s%s, %.1f MB/s%s%s%s", p->terminal ? "\r\033[K" : "",
          moe_log_program(), p->label, moe_text_bytes(a, (double)done), share, rate / 1e6,
          *more ? ", " : "", more, eta);
  fputs(p->terminal ? "" : "\n", stderr);
  fflush(stderr);
}

double moe_progress_end(moe_progress *p) {
  if (p->terminal && p->drawn) fputs("\r\033[K", stderr);
  return moe_clock_s() - p->started_s;
}
