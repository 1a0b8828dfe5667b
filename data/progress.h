/* Progress of work over bytes: one line on stderr, rewritten on a terminal, else now and then. */
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
} moe_progress;

void moe_progress_start(moe_progress *p, const char *label);
/* done of total bytes (total < 0: not known), what else is to be said ("" for nothing). Cheap: it
 * draws at most every half second, off a terminal every ten. */
void moe_progress_show(moe_progress *p, int64_t done, int64_t total, const char *more);
/* Clear the line; seconds since the start. */
double moe_progress_end(moe_progress *p);

#ifdef __cplusplus
}
#endif
#endif
