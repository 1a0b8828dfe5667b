/* The configuration that a checkpoint carries. */
#include "checkpoint/stored_config.h"

#include <stdlib.h>
#include <string.h>

static moe_status explain(const moe_config *c, const char *where) {
  if (c->unknown_key)
    return moe_fail(MOE_DAMAGED,
                    "%s: was written by a newer version of moe-train: %s: use that one", where,
                    moe_error_message());
  return moe_fail(MOE_DAMAGED, "%s: its configuration is not valid: %s: use another checkpoint",
                  where, moe_error_message());
}

moe_status moe_stored_config(const char *text, const char *where, moe_config **out) {
  *out = NULL;
  if (!text || !text[0])
    return moe_fail(MOE_DAMAGED, "%s: its manifest has no configuration, so its model is not known",
                    where);
  moe_config *c = malloc(sizeof *c);
  if (!c) return moe_fail(MOE_NO_MEMORY, "%s: no memory for its configuration", where);
  moe_config_defaults(c);
  moe_status status = moe_config_parse(c, text, (int64_t)strlen(text), "stored configuration");
  if (status == MOE_OK) status = moe_config_resolve(c, 0);
  if (status == MOE_OK) {
    *out = c;
    return MOE_OK;
  }
  if (status == MOE_USAGE) status = explain(c, where);
  free(c);
  return status;
}
