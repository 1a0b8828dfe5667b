/* Error messages: one per thread, written where the fault is found and kept until the next one. */
#include "core/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#undef moe_fail /* the analyzer's view of them */
#undef moe_error_pass

enum { MESSAGE_SIZE = 4096, TRAIL_SIZE = 4096 };

static _Thread_local char message[MESSAGE_SIZE];
static _Thread_local char trail[TRAIL_SIZE];

moe_status moe_fail(moe_status code, const char *format, ...) {
  /* The arguments may include the present message, so it is replaced only when the new one is
   * complete. */
  char text[MESSAGE_SIZE];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  /* Messages quote files: what they hold must not drive the terminal. */
  for (char *p = text; *p; p++)
    if (((unsigned char)*p < 0x20 && *p != '\n' && *p != '\t') || *p == 0x7f) *p = '?';
  memcpy(message, text, strlen(text) + 1);
  trail[0] = '\0';
  return code;
}

const char *moe_error_message(void) {
  return message;
}

const char *moe_error_trail(void) {
  return trail;
}

void moe_error_clear(void) {
  message[0] = '\0';
  trail[0] = '\0';
}

moe_status moe_error_pass(moe_status status, const char *file, int line, const char *function) {
  size_t used = strlen(trail);
  snprintf(trail + used, sizeof trail - used, "  %s:%d %s\n", file, line, function);
  return status;
}

const char *moe_status_name(moe_status status) {
  switch (status) {
#define X(name, code, text) \
  case MOE_##name:          \
    return text;
    MOE_STATUS_MAP(X)
#undef X
  }
  return "unknown status";
}

int moe_status_exit_code(moe_status status) {
  switch (status) {
#define X(name, code, text) \
  case MOE_##name:          \
    return code;
    MOE_STATUS_MAP(X)
#undef X
  }
  return 1;
}
