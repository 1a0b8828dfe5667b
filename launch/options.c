/* Reading option values. */
#include "launch/options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

moe_status moe_option_int(const char *name, const char *text, int64_t low, int64_t high,
                          int64_t *out) {
  char *end;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (end == text || *end || errno || value < low || value > high)
    return moe_fail(MOE_USAGE, "not a number from %" PRId64 " to %" PRId64 ": --%s %s: see --help",
                    low, high, name, text);
  *out = value;
  return MOE_OK;
}

moe_status moe_option_real(const char *name, const char *text, double low, double high,
                           double *out) {
  char *end;
  double value = strtod(text, &end);
  if (end == text || *end || !(value >= low && value <= high))
    return moe_fail(MOE_USAGE, "not a number from %g to %g: --%s %s: see --help", low, high, name,
                    text);
  *out = value;
  return MOE_OK;
}

moe_status moe_option_choice(const char *name, const char *text, const char *const *choices,
                             int *out) {
  for (int i = 0; choices[i]; i++) {
    if (strcmp(choices[i], text) != 0) continue;
    *out = i;
    return MOE_OK;
  }
  return moe_fail(MOE_USAGE, "unknown choice: --%s %s: see --help", name, text);
}
