/* What a test asks of a worker's job: it ended well, in time, and after checking something. */
#ifndef MOE_TESTS_PARALLEL_EXPECT_PASSED_H
#define MOE_TESTS_PARALLEL_EXPECT_PASSED_H

#include <criterion/criterion.h>

#include "tests/support/run_command.h"

static inline void expect_passed(moe_command c) {
  cr_expect(!c.timed_out && c.exit_code == 0 && moe_command_says(&c, "checks passed"),
            "exit code %d%s:\n%s", c.exit_code, c.timed_out ? " (timed out)" : "", c.output);
  moe_command_free(&c);
}

#endif
