/* Any bytes as a configuration file: read or refused with a one-line message; and what was read
 * prints as a file that reads back to the same. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/config.h"

static void require(int truth) {
  if (!truth) abort();
}

static void require_message(moe_status status) {
  const char *message = moe_error_message();
  require(status == MOE_USAGE && *message != '\0' && strchr(message, '\n') == NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static moe_config c, back;
  moe_error_clear();
  moe_config_defaults(&c);
  moe_status status = moe_config_parse(&c, (const char *)data, (int64_t)size, "fuzz.ini");
  if (status != MOE_OK) {
    require_message(status);
    return 0;
  }

  char *text = moe_config_text(&c);
  require(text != NULL);
  moe_config_defaults(&back);
  require(moe_config_parse(&back, text, (int64_t)strlen(text), "back.ini") == MOE_OK);
  char *again = moe_config_text(&back);
  require(again != NULL && strcmp(text, again) == 0);
  free(again);
  free(text);

  status = moe_config_resolve(&c, 4);
  if (status != MOE_OK) require_message(status);
  return 0;
}
