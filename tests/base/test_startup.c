#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/startup.h"

static void work_for(int milliseconds, const char *what) {
  usleep((useconds_t)milliseconds * 1000);
  moe_startup_done(what);
}

/* Sleeps may last longer than asked, so the figures are compared with the clock. */
Test(startup, says_where_the_time_went_and_leaves_out_what_took_none, .init = cr_redirect_stderr) {
  char line[256], name[3][16];
  double all, part[3];
  moe_log_init("moe-train", 0);
  double start = moe_clock_s();
  moe_startup_begin();
  work_for(120, "device");
  for (int i = 0; i < 5; i++) moe_startup_done("nothing");
  work_for(200, "plan");
  work_for(150, "device");
  double end = moe_clock_s();
  moe_startup_tell();
  fflush(stderr);
  cr_assert(fgets(line, sizeof line, cr_get_redirected_stderr()));
  int found = sscanf(line, "moe-train: ready after %lf s: %15s %lf, %15s %lf, %15s", &all, name[0],
                     &part[0], name[1], &part[1], name[2]);
  cr_assert_eq(found, 5, "%s", line);
  cr_assert_str_eq(name[0], "device");
  cr_assert_str_eq(name[1], "plan");
  cr_assert_float_eq(all, end - start, 0.06);
  cr_assert_float_eq(part[0] + part[1], all, 0.11);
  cr_assert_geq(part[0], 0.25);
  cr_assert_geq(part[1], 0.15);
}

Test(startup, begins_anew_after_it_was_told, .init = cr_redirect_stderr) {
  moe_log_init("moe-train", 0);
  moe_startup_begin();
  work_for(100, "first");
  moe_startup_tell();
  moe_startup_tell();
  fflush(stderr);
  char line[256];
  cr_assert(fgets(line, sizeof line, cr_get_redirected_stderr()));
  cr_assert(strstr(line, " s: first "), "%s", line);
  cr_assert(fgets(line, sizeof line, cr_get_redirected_stderr()));
  cr_assert_str_eq(line, "moe-train: ready after 0.0 s\n");
}

Test(startup, keeps_the_sum_when_the_parts_are_many, .init = cr_redirect_stderr) {
  static const char *const names[] = {"a", "b", "c", "d", "e", "f", "g", "h", "i", "j",
                                      "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"};
  char line[256];
  double all;
  moe_log_init("moe-train", 0);
  double start = moe_clock_s();
  moe_startup_begin();
  for (int i = 0; i < 20; i++) work_for(10, names[i]);
  double end = moe_clock_s();
  moe_startup_tell();
  fflush(stderr);
  cr_assert(fgets(line, sizeof line, cr_get_redirected_stderr()));
  cr_assert_eq(sscanf(line, "moe-train: ready after %lf s", &all), 1, "%s", line);
  cr_assert_float_eq(all, end - start, 0.06);
}
