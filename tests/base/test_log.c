#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <stdlib.h>

#include "core/base/log.h"

static void assert_bytes(double bytes, const char *expected) {
  char text[MOE_TEXT];
  cr_assert_str_eq(moe_text_bytes(text, bytes), expected);
}
static void assert_count(double count, const char *expected) {
  char text[MOE_TEXT];
  cr_assert_str_eq(moe_text_count(text, count), expected);
}
static void assert_seconds(double seconds, const char *expected) {
  char text[MOE_TEXT];
  cr_assert_str_eq(moe_text_seconds(text, seconds), expected);
}

Test(log, bytes_read_well) {
  assert_bytes(0, "0 B");
  assert_bytes(1023, "1023 B");
  assert_bytes(1024, "1.00 KiB");
  assert_bytes(1.23 * 1024 * 1024 * 1024, "1.23 GiB");
  assert_bytes(99.9 * 1024, "99.9 KiB");
  assert_bytes(1e30, "8.88e+14 PiB");
}

Test(log, counts_read_well) {
  assert_count(0, "0");
  assert_count(999, "999");
  assert_count(6.88e9, "6.88 B");
  assert_count(28.1e6, "28.1 M");
  assert_count(999.9e3, "1.00 M");
  assert_count(0.5, "0.50");
}

Test(log, times_read_well) {
  assert_seconds(0.0000015, "1.5 us");
  assert_seconds(0.0125, "12.5 ms");
  assert_seconds(1.0, "1.0 s");
  assert_seconds(59.96, "1m 00s");
  assert_seconds(7380, "2h 03m");
  assert_seconds(3 * 86400 + 5 * 3600, "3d 05h");
  assert_seconds(-1, "unknown");
  assert_seconds(0.0 / 0.0, "unknown");
}

Test(log, info_speaks_on_rank_0_only, .init = cr_redirect_stderr) {
  moe_log_init("moe-train", 3);
  moe_info("quiet");
  moe_warn("careful: %d", 7);
  moe_log_init("moe-train", 0);
  moe_info("hello");
  fflush(stderr);
  cr_assert_stderr_eq_str("moe-train (rank 3): warning: careful: 7\nmoe-train: hello\n");
}

Test(log, report_prints_the_message_once, .init = cr_redirect_stderr) {
  unsetenv("MOE_TRACE");
  moe_log_init("moe-data", -1);
  cr_assert_eq(moe_report(moe_fail(MOE_DAMAGED, "bad: a.idx")), 3);
  cr_assert_eq(moe_report(MOE_OK), 0);
  moe_error_clear();
  cr_assert_eq(moe_report(MOE_STOPPED), 75);
  fflush(stderr);
  cr_assert_stderr_eq_str("moe-data: bad: a.idx\nmoe-data: stopped on request after saving\n");
}

Test(log, clock_runs_forward) {
  double before = moe_clock_s();
  cr_assert_geq(moe_clock_s(), before);
}
