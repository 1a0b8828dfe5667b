/* What a Criterion test asks of a command: its exit code, and words in its output. */
#ifndef MOE_TESTS_SUPPORT_EXPECT_COMMAND_H
#define MOE_TESTS_SUPPORT_EXPECT_COMMAND_H

#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdio.h>

#include "tests/support/run_command.h"

/* `c`, which ran `line`, ended with `code` and says each of the texts that follow, up to NULL.
 * Frees c. */
static inline void expect_command(moe_command c, const char *line, int code, ...) {
  cr_expect(!c.timed_out && c.exit_code == code, "%s: exit code %d, not %d:\n%s", line, c.exit_code,
            code, c.output);
  va_list texts;
  va_start(texts, code);
  for (const char *t = va_arg(texts, const char *); t; t = va_arg(texts, const char *))
    cr_expect(moe_command_says(&c, t), "%s: does not say: %s\nbut:\n%s", line, t, c.output);
  va_end(texts);
  moe_command_free(&c);
}

/* Run a command (printf-style) in `folder`, with our programs to be found; it must exit with `code`
 * and say `words` ("": anything). */
static inline void runs_in(const char *folder, int code, const char *words, const char *format,
                           ...) {
  char line[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  moe_command c = moe_command_run(100, "cd %s && PATH=%s:$PATH && %s", folder, MOE_BIN_DIR, line);
  cr_assert(!c.timed_out && c.exit_code == code, "%s: exit code %d, not %d:\n%s", line, c.exit_code,
            code, c.output);
  cr_assert(moe_command_says(&c, words), "%s: does not say \"%s\":\n%s", line, words, c.output);
  moe_command_free(&c);
}

#endif
