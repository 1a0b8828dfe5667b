/* Progress: one line on stderr, rewritten on a terminal, else now and then. */
#ifndef MOE_DATA_PROGRESS_H
#define MOE_DATA_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char *label;
  double started_s, shown_s;
  bool terminal, drawn;
  int64_t done; /* by moe_progress_add */
  bool busy;    /* some thread draws */
} moe_progress;

void moe_progress_start(moe_progress *p, const char *label);
/* done of total bytes (total < 0: not known), what else is to be said ("" for nothing). Cheap: it
 * draws only when due. */
void moe_progress_show(moe_progress *p, int64_t done, int64_t total, const char *more);
/* The same, where `bytes` more are done; any threads. */
void moe_progress_add(moe_progress *p, int64_t bytes, int64_t total);
/* For work that is not over bytes: say a line of your own when one is due, which is every half
 * second, off a terminal every ten. */
bool moe_progress_due(const moe_progress *p);
void moe_progress_say(moe_progress *p, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Clear the line; seconds since the start. */
double moe_progress_end(moe_progress *p);

#ifdef __cplusplus
}
#endif
#endif
