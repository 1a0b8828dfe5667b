#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>

#include "core/base/status.h"

static moe_status deepest(void) {
  return moe_fail(MOE_DAMAGED, "bad magic: %s: give a token file", "a.idx");
}
static moe_status middle(void) {
  MOE_TRY(deepest());
  return MOE_OK;
}
static moe_status top(int *released) {
  moe_status status = MOE_OK;
  MOE_TRY_OR(status, done, middle());
done:
  (*released)++;
  return status;
}

Test(status, message_is_kept_and_passed_up) {
  int released = 0;
  cr_assert_eq(top(&released), MOE_DAMAGED);
  cr_assert_eq(released, 1);
  cr_assert_str_eq(moe_error_message(), "bad magic: a.idx: give a token file");
  cr_assert_not_null(strstr(moe_error_trail(), "middle"));
  cr_assert_not_null(strstr(moe_error_trail(), "top"));
}

Test(status, new_message_may_quote_the_old_one) {
  moe_fail(MOE_IO, "disk full");
  moe_fail(MOE_IO, "cannot save: %s", moe_error_message());
  cr_assert_str_eq(moe_error_message(), "cannot save: disk full");
  cr_assert_str_eq(moe_error_trail(), "");
}

Test(status, clear_forgets) {
  cr_assert_eq(middle(), MOE_DAMAGED);
  moe_error_clear();
  cr_assert_str_eq(moe_error_message(), "");
  cr_assert_str_eq(moe_error_trail(), "");
}

Test(status, long_messages_and_trails_are_cut) {
  char text[10000];
  memset(text, 'x', sizeof text - 1);
  text[sizeof text - 1] = '\0';
  moe_fail(MOE_IO, "%s", text);
  cr_assert_lt(strlen(moe_error_message()), sizeof text);
  cr_assert_gt(strlen(moe_error_message()), (size_t)1000);
  for (int i = 0; i < 1000; i++) moe_error_pass(MOE_IO, "file.c", i, "function");
  cr_assert_lt(strlen(moe_error_trail()), (size_t)5000);
}

static void *fail_elsewhere(void *unused) {
  moe_fail(MOE_IO, "from another thread");
  return unused;
}

Test(status, quoted_files_cannot_drive_the_terminal) {
  moe_fail(MOE_USAGE, "bad key: \033[2Jx\x7f: use \xc3\xa9");
  cr_assert_str_eq(moe_error_message(), "bad key: ?[2Jx?: use \xc3\xa9");
}

Test(status, messages_are_per_thread) {
  moe_fail(MOE_IO, "mine");
  pthread_t thread;
  cr_assert_eq(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
  pthread_join(thread, NULL);
  cr_assert_str_eq(moe_error_message(), "mine");
}

Test(status, exit_codes_are_those_of_the_contract) {
  cr_assert_eq(moe_status_exit_code(MOE_OK), 0);
  cr_assert_eq(moe_status_exit_code(MOE_FAILED), 1);
  cr_assert_eq(moe_status_exit_code(MOE_USAGE), 2);
  cr_assert_eq(moe_status_exit_code(MOE_DAMAGED), 3);
  cr_assert_eq(moe_status_exit_code(MOE_DIVERGED), 4);
  cr_assert_eq(moe_status_exit_code(MOE_STOPPED), 75);
  cr_assert_eq(moe_status_exit_code((moe_status)1000), 1);
  cr_assert_str_eq(moe_status_name(MOE_NO_MEMORY), "out of memory");
}
