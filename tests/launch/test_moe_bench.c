/* moe-bench as users meet it: figures that fit together, as text and as JSON. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/expect_command.h"

static char folder[] = "/tmp/moe-bench-XXXXXX";
#define runs(...) runs_in(folder, __VA_ARGS__)
#define TINY                                                                             \
  "moe-bench --set model.preset=tiny --set data.sequence_length=32 --set run.threads=1 " \
  "--set train.micro_batch=2 --steps 2 --warmup 1 --no-collectives --json json "
#define ON_TWO "mpirun --oversubscribe --bind-to none -np 2 "

static void set_up(void) {
  cr_assert(mkdtemp(folder));
}

static void tear_down(void) {
  runs(0, "", "rm -rf %s", folder);
}

TestSuite(moe_bench, .init = set_up, .fini = tear_down, .timeout = 120);

static cJSON *read_json(void) {
  static char text[1 << 16];
  char path[64];
  snprintf(path, sizeof path, "%s/json", folder);
  FILE *f = fopen(path, "r");
  cr_assert(f);
  text[fread(text, 1, sizeof text - 1, f)] = 0;
  fclose(f);
  cJSON *json = cJSON_Parse(text);
  cr_assert(json, "%s", text);
  return json;
}

static double number(const cJSON *json, const char *key) {
  const cJSON *value = cJSON_GetObjectItem(json, key);
  cr_assert(cJSON_IsNumber(value), "no number: %s", key);
  return value->valuedouble;
}

Test(moe_bench, parts_sum_to_the_step_and_the_exchange_is_within) {
  runs(0, "ep 2 x edp 1, exchange all-gather", ON_TWO TINY "--set parallel.exchange=allgather");
  cJSON *json = read_json();
  const cJSON *part;
  double step = number(json, "step_seconds"), sum = 0.0, exchange = 0.0;
  cJSON_ArrayForEach(part, cJSON_GetObjectItem(json, "parts")) {
    sum += number(part, "seconds");
    if (strstr(cJSON_GetObjectItem(part, "name")->valuestring, "exchange"))
      exchange = number(part, "seconds");
  }
  cr_expect(fabs(sum - step) < 1e-4 * step, "parts %g, step %g", sum, step);
  cr_expect(exchange > 0.0);
  cr_expect(number(json, "exchange_least_seconds") > 0.0);
  cr_expect(number(json, "exchange_least_seconds") <= number(json, "exchange_seconds"));
  cr_expect(number(json, "exchange_seconds") < step * 2.0); /* a mean of steps, not the median */
  cr_expect_eq(number(json, "tokens"), 2 * 2 * 32);
  cr_expect_eq(number(json, "ep"), 2);
  cr_expect(number(json, "planned_bytes") > 1e6 && number(json, "used_bytes") > 1e6);
  cJSON_Delete(json);
}

Test(moe_bench, says_which_exchange_it_measured) {
  runs(0, "exchange all-to-all,", ON_TWO TINY "--set parallel.exchange=alltoall");
  runs(0, "exchange all-to-all per expert,",
       "export MOE_DEDUP=off; " ON_TWO TINY "--set parallel.exchange=alltoall --operations");
  cJSON *json = read_json();
  cr_expect_str_eq(cJSON_GetObjectItem(json, "exchange")->valuestring, "all-to-all per expert");
  cJSON_Delete(json);
}

Test(moe_bench, tells_no_power_of_a_host) {
  runs(0, "gaps", TINY "--clocks >all 2>&1; cat all");
  runs(1, "0", "grep -c -e ' W of ' -e MHz -e 'J a step' -e 'not available' all");
  cJSON *json = read_json();
  cr_expect_eq(number(json, "watts"), 0.0);
  cr_expect_eq(number(json, "joules"), 0.0);
  cJSON_Delete(json);
}

Test(moe_bench, wrong_use_is_exit_code_2) {
  runs(2, "--steps 0", "moe-bench --steps 0");
  runs(2, "--warmup x", "moe-bench --warmup x");
  runs(2, "unknown or incomplete option: --loud", "moe-bench --loud");
  runs(2, "preset = huge", "moe-bench --set model.preset=huge");
  runs(0, "--balanced", "moe-bench --help");
}

Test(moe_bench, says_where_the_time_before_the_first_step_went) {
  runs(0, "moe-bench: ready after ", TINY);
}
