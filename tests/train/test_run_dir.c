/* The run's folder: room on its disk, the record of starts, and what saves take of memory. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/train/run_dir.h"
#include "core/train/run_state.h"
#include "core/train/save_plan.h"

static char folder[] = "/tmp/moe-run-dir-XXXXXX";
static moe_engine engine; /* what these functions read of one */

static void set_up(void) {
  moe_device_options options = {.kind = MOE_DEVICE_CPU, .threads = 1};
  cr_assert(mkdtemp(folder));
  moe_log_init("test", 0);
  cr_assert(moe_comm_init(NULL, NULL) == MOE_OK &&
            moe_device_open(&options, &engine.dev) == MOE_OK);
  cr_assert(moe_comm_world(engine.dev, &engine.world) == MOE_OK);
  moe_config_defaults(&engine.config);
  cr_assert(moe_config_set(&engine.config, "model.preset=tiny") == MOE_OK);
  snprintf(engine.config.run.dir, sizeof engine.config.run.dir, "%s", folder);
  cr_assert(moe_config_resolve(&engine.config, 1) == MOE_OK, "%s", moe_error_message());
  cr_assert(moe_mesh_create(engine.world, 0, engine.config.model.num_experts, &engine.mesh) ==
            MOE_OK);
}

static void tear_down(void) {
  char command[64];
  moe_mesh_destroy(&engine.mesh);
  moe_comm_destroy(engine.world);
  moe_device_close(engine.dev);
  moe_comm_finalize();
  snprintf(command, sizeof command, "rm -rf %s", folder);
  cr_assert_eq(system(command), 0);
}

TestSuite(run_dir, .init = set_up, .fini = tear_down);

static const char *in_folder(const char *name) {
  static char path[128];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

Test(run_dir, counts_the_checkpoints_that_come_before_one_is_deleted) {
  moe_run_disk d;
  engine.config.checkpoint.keep = 3;
  cr_assert_eq(moe_run_disk_of(&engine.config, &d), MOE_OK);
  cr_expect_eq(d.more, 4);
  cr_expect_eq(d.each, moe_run_state_bytes(&engine.config));
  cr_expect(d.free > 0);
  mkdir(in_folder("checkpoints"), 0777);
  for (int i = 1; i <= 4; i++) {
    char name[64];
    snprintf(name, sizeof name, "checkpoints/step-%08d", i);
    mkdir(in_folder(name), 0777);
    cr_assert_eq(moe_run_disk_of(&engine.config, &d), MOE_OK);
    cr_expect_eq(d.more, i < 3 ? 4 - i : 1, "%d there: %d more", i, (int)d.more);
  }
}

Test(run_dir, a_disk_without_room_for_one_checkpoint_is_an_error) {
  cr_expect_eq(moe_run_dir_check_disk(&engine.config), MOE_OK);
  engine.config.model.hidden_size = 1 << 17; /* 10^13 bytes and more */
  engine.config.model.ffn_size = 1 << 20;
  cr_expect_eq(moe_run_dir_check_disk(&engine.config), MOE_IO);
  cr_expect(strstr(moe_error_message(), "one checkpoint takes"), "%s", moe_error_message());
  engine.config.checkpoint.interval = 0;
  engine.config.checkpoint.save_final = false;
  cr_expect_eq(moe_run_dir_check_disk(&engine.config), MOE_OK, "it saves nothing");
}

/* Line `number`, parsed; the caller deletes it. */
static cJSON *line_of(int number) {
  char line[1 << 16];
  FILE *f = fopen(in_folder("provenance.jsonl"), "r");
  cr_assert(f);
  for (int i = 0; i <= number; i++) cr_assert(fgets(line, sizeof line, f), "line %d", i);
  fclose(f);
  return cJSON_Parse(line);
}

static const char *text_of(const cJSON *o, const char *key) {
  const char *text = cJSON_GetStringValue(cJSON_GetObjectItem(o, key));
  return text ? text : "(none)";
}

Test(run_dir, each_start_is_a_line_even_after_a_torn_one) {
  cr_assert_eq(moe_run_dir_record_start(&engine, 0, ""), MOE_OK);
  FILE *f = fopen(in_folder("provenance.jsonl"), "a");
  fprintf(f, "{\"time\":\"2026-");
  fclose(f);
  cr_assert_eq(moe_run_dir_record_start(&engine, 70, "/there/step-00000070"), MOE_OK);
  cJSON *first = line_of(0), *second = line_of(2);
  cr_assert(first && second);
  cr_expect_eq(cJSON_GetObjectItem(second, "step")->valueint, 70);
  cr_expect_str_eq(text_of(second, "from"), "/there/step-00000070");
  cr_expect_str_eq(text_of(first, "from"), "");
  cr_expect_str_eq(text_of(first, "version"), MOE_VERSION);
  cr_expect_gt(strlen(text_of(first, "commit")), 6);
  const cJSON *command = cJSON_GetObjectItem(first, "command");
  cr_expect_gt(strlen(cJSON_GetStringValue(cJSON_GetArrayItem(command, 0))), 0);
  char host[64] = "";
  gethostname(host, sizeof host - 1);
  cr_expect_str_eq(cJSON_GetStringValue(cJSON_GetArrayItem(cJSON_GetObjectItem(first, "hosts"), 0)),
                   host);
  bool hdf5 = false;
  const cJSON *library;
  cJSON_ArrayForEach(library, cJSON_GetObjectItem(first, "libraries")) hdf5 =
      hdf5 || strstr(cJSON_GetStringValue(library), "/libhdf5_serial.so.");
  cr_expect(hdf5, "the library that writes checkpoints is among those listed");
  cJSON_Delete(first);
  cJSON_Delete(second);
}

Test(run_dir, a_record_that_cannot_be_written_is_only_a_warning) {
  mkdir(in_folder("provenance.jsonl"), 0777);
  cr_expect_eq(moe_run_dir_record_start(&engine, 0, ""), MOE_OK);
}

Test(run_dir, config_ini_reads_back) {
  moe_config again;
  cr_assert_eq(moe_run_dir_write_config(&engine.config), MOE_OK);
  moe_config_defaults(&again);
  cr_assert_eq(moe_config_read(&again, in_folder("config.ini")), MOE_OK);
  cr_expect_eq(again.model.hidden_size, 64);
  cr_expect_str_eq(again.run.dir, folder);
}

/* ---- memory for saves ---- */

Test(run_dir, one_rank_saves_everything) {
  moe_save_plan plan;
  cr_assert_eq(moe_save_plan_make(&engine, &plan), MOE_OK);
  int64_t all = moe_run_state_bytes(&engine.config);
  cr_expect(plan.part >= all && plan.part <= all + (2 << 20));
  cr_expect_eq(plan.memory, plan.part);
}

Test(run_dir, memory_for_saves_follows_the_settings) {
  moe_save_plan plan;
  engine.config.checkpoint.snapshot_gib = 0.001;
  cr_assert_eq(moe_save_plan_make(&engine, &plan), MOE_OK);
  cr_expect_eq(plan.memory, 1073741, "%lld", (long long)plan.memory);
  engine.config.checkpoint.snapshot_gib = 0.0;
  engine.config.checkpoint.async = 2; /* off */
  cr_assert_eq(moe_save_plan_make(&engine, &plan), MOE_OK);
  cr_expect_eq(plan.memory, 0);
}

Test(run_dir, asked_for_memory_that_is_not_there_on_is_an_error_and_auto_does_without) {
  moe_save_plan plan;
  engine.config.model.hidden_size = 1 << 17;
  engine.config.model.ffn_size = 1 << 20;
  engine.config.run.memory_gib = 0.05; /* a budget of 50 MiB for everything */
  cr_assert_eq(moe_save_plan_make(&engine, &plan), MOE_OK);
  cr_expect_eq(plan.memory, 0);
  engine.config.checkpoint.async = 1; /* on */
  cr_expect_eq(moe_save_plan_make(&engine, &plan), MOE_NO_MEMORY);
  cr_expect(strstr(moe_error_message(), "checkpoint.async = on needs"));
}
