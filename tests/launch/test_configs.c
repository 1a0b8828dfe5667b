/* The example configurations: each reads, resolves for the ranks it is meant for, and is listed
 * here. */
#include "core/base/config.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <glob.h>
#include <string.h>

typedef struct {
  const char *name;
  int ranks[4]; /* that must work, 0-terminated */
  int64_t tokens_per_step;
} example;

static const example examples[] = {
    {"quickstart.ini", {1, 2}, 2048},      {"tiny.ini", {2}, 1024},
    {"small.ini", {1, 4, 32}, 16384},      {"1b.ini", {1, 2, 8}, 262144},
    {"6.9b-1gpu.ini", {1, 2, 16}, 524288}, {"6.9b-2gpu.ini", {2, 8, 16}, 524288},
};
enum { EXAMPLES = sizeof examples / sizeof *examples };

static void path_of(const char *name, char path[512]) {
  snprintf(path, 512, "%s/launch/configs/%s", MOE_SOURCE_DIR, name);
}

static void read_example(const char *name, moe_config *c) {
  char path[512];
  path_of(name, path);
  moe_config_defaults(c);
  cr_assert(eq(int, moe_config_read(c, path), MOE_OK), "%s", moe_error_message());
}

Test(configs, resolve_for_the_ranks_they_are_meant_for) {
  for (int i = 0; i < EXAMPLES; i++) {
    for (int r = 0; examples[i].ranks[r] > 0; r++) {
      static moe_config c;
      read_example(examples[i].name, &c);
      cr_assert(eq(int, moe_config_resolve(&c, examples[i].ranks[r]), MOE_OK), "%s",
                moe_error_message());
      cr_assert(eq(i64, c.train.global_batch * c.data.sequence_length, examples[i].tokens_per_step),
                "%s on %d ranks", examples[i].name, examples[i].ranks[r]);
    }
  }
}

Test(configs, say_where_the_run_and_its_data_are) {
  for (int i = 0; i < EXAMPLES; i++) {
    static moe_config c;
    read_example(examples[i].name, &c);
    cr_assert(eq(int, strncmp(c.run.dir, "runs/", 5), 0), "%s", examples[i].name);
    cr_assert(eq(int, strncmp(c.data.train, "runs/", 5), 0), "%s", examples[i].name);
    cr_assert(eq(int, strncmp(c.data.tokenizer, "runs/", 5), 0), "%s", examples[i].name);
  }
}

/* A run may move between one GPU and two, so they must agree on what a resume compares. */
Test(configs, of_one_and_two_gpus_are_the_same_run) {
  static moe_config one, two;
  read_example("6.9b-1gpu.ini", &one);
  read_example("6.9b-2gpu.ini", &two);
  cr_assert(eq(int, moe_config_resolve(&one, 1), MOE_OK));
  cr_assert(eq(int, moe_config_resolve(&two, 2), MOE_OK));
  cr_assert(eq(int, moe_config_diff_for_resume(&one, &two, stderr), 0));
  cr_assert(eq(str, one.run.dir, two.run.dir));
  cr_assert(eq(i64, one.train.steps, two.train.steps));
}

Test(configs, are_all_tested_here) {
  char pattern[512];
  path_of("*.ini", pattern);
  glob_t found;
  cr_assert(eq(int, glob(pattern, 0, NULL, &found), 0));
  for (size_t i = 0; i < found.gl_pathc; i++) {
    const char *name = strrchr(found.gl_pathv[i], '/') + 1;
    int listed = 0;
    for (int k = 0; k < EXAMPLES; k++) listed += strcmp(name, examples[k].name) == 0;
    cr_assert(eq(int, listed, 1), "%s is not in this test", name);
  }
  cr_assert(eq(sz, found.gl_pathc, EXAMPLES));
  globfree(&found);
}
