/* Values of command-line options: read whole, checked, refused with the option's name. */
#ifndef MOE_LAUNCH_OPTIONS_H
#define MOE_LAUNCH_OPTIONS_H

#include <stdint.h>

#include "core/base/status.h"

/* All local; MOE_USAGE. */
moe_status moe_option_int(const char *name, const char *text, int64_t low, int64_t high,
                          int64_t *out);
moe_status moe_option_real(const char *name, const char *text, double low, double high,
                           double *out);
/* The place of `text` in a list of choices that ends in NULL. */
moe_status moe_option_choice(const char *name, const char *text, const char *const *choices,
                             int *out);

#endif
