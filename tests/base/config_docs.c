/* Print docs/config.md from the configuration table. */
#include <stdio.h>

#include "core/base/config.h"

int main(void) {
  moe_config_print_markdown(stdout);
  return fflush(stdout) == 0 && !ferror(stdout) ? 0 : 1;
}
