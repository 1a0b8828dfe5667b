/* Laps of one clock. */
#include "core/base/startup.h"

#include <stdio.h>
#include <string.h>

#include "core/base/log.h"

enum { PARTS = 16, LINE = 512 };

static struct {
  struct {
    const char *what;
    double seconds;
  } part[PARTS];
  int parts;
  double last;
} now;

void moe_startup_begin(void) {
  now.parts = 0;
  now.last = moe_clock_s();
}

void moe_startup_done(const char *what) {
  double before = now.last;
  int i = 0;
  now.last = moe_clock_s();
  if (before <= 0.0) return; /* nobody began */
  while (i < now.parts && strcmp(now.part[i].what, what) != 0) i++;
  if (i == PARTS) i--; /* the last one takes what finds no room */
  if (i == now.parts) {
    now.part[i].what = what;
    now.part[i].seconds = 0.0;
    now.parts++;
  }
  now.part[i].seconds += now.last - before;
}

void moe_startup_tell(void) {
  const double worth_telling = 0.05;
  char line[LINE] = "";
  double all = 0.0;
  size_t used = 0;
  for (int i = 0; i < now.parts; i++) {
    all += now.part[i].seconds;
    if (now.part[i].seconds < worth_telling || used >= sizeof line) continue;
    int wrote = snprintf(line + used, sizeof line - used, "%s %s %.1f", used ? "," : ":",
                         now.part[i].what, now.part[i].seconds);
    used += (size_t)wrote;
  }
  moe_info("ready after %.1f s%s", all, line);
  moe_startup_begin();
}
