/* Which tokenizer belongs to a checkpoint. */
#include "checkpoint/run_tokenizer.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/stored_config.h"

static bool is_file(const char *name) {
  return access(name, R_OK) == 0;
}

/* data.tokenizer of a configuration; "" when it is not set. */
static moe_status from_config(const char *step_folder, const char *config, char name[MOE_PATH]) {
  name[0] = 0;
  if (!config || !config[0]) return MOE_OK;
  moe_config *c;
  MOE_TRY(moe_stored_config(config, step_folder, &c));
  snprintf(name, MOE_PATH, "%s", c->data.tokenizer);
  free(c);
  return MOE_OK;
}

moe_status moe_run_tokenizer(const char *step_folder, const char *config, const char *chosen,
                             char name[MOE_PATH]) {
  const char *from = "--tokenizer";
  name[0] = 0;
  if (chosen && strcmp(chosen, "none") == 0) return MOE_OK;
  if (chosen) {
    if (snprintf(name, MOE_PATH, "%s", chosen) >= MOE_PATH)
      return moe_fail(MOE_USAGE, "--tokenizer %.60s...: the path is too long", chosen);
  } else {
    int length = snprintf(name, MOE_PATH, "%s/../../tokenizer.model", step_folder);
    if (length < MOE_PATH && is_file(name)) return MOE_OK;
    MOE_TRY(from_config(step_folder, config, name));
    from = "data.tokenizer";
  }
  if (!name[0] || strcmp(name, "bytes") == 0 || is_file(name)) return MOE_OK;
  return moe_fail(MOE_USAGE,
                  "%s: cannot read the tokenizer that %s names: %s: name its place with "
                  "--tokenizer, or do without: --tokenizer none",
                  name, from, strerror(errno));
}
