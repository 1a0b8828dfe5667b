/* moe-train as users meet it: bad input ends with one line that says what, where and how to mend
 * it, and the documented exit code, on any number of ranks and without a hang. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/token_file.h"
#include "tests/support/run_command.h"

static char folder[] = "/tmp/moe-cli-XXXXXX";

static void write_tokens(const char *name, int32_t biggest) {
  char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  moe_token_writer *w;
  cr_assert_eq(moe_token_writer_create(path, 60000, &w), MOE_OK);
  for (int d = 0; d < 40; d++) {
    int32_t ids[64];
    for (int i = 0; i < 64; i++) ids[i] = (d * 7 + i * 3) % 90;
    if (d == 20) ids[10] = biggest;
    cr_assert_eq(moe_token_writer_append(w, ids, 64), MOE_OK);
    cr_assert_eq(moe_token_writer_end_document(w), MOE_OK);
  }
  cr_assert_eq(moe_token_writer_finish(w), MOE_OK);
  moe_token_writer_destroy(w);
}

static void write_config(const char *more) {
  char path[256];
  snprintf(path, sizeof path, "%s/cfg.ini", folder);
  FILE *f = fopen(path, "w");
  fprintf(f,
          "[model]\npreset = tiny\nvocab_size = 97\ncontext = 16\n[data]\ntrain = %s/tokens\n"
          "[run]\ndir = %s/run\nthreads = 1\n[train]\nsteps = 20\n[optim]\nwarmup_steps = 2\n%s",
          folder, folder, more);
  fclose(f);
}

static void set_up(void) {
  cr_assert(mkdtemp(folder));
  write_tokens("tokens", 5);
  write_config("");
}

static void tear_down(void) {
  moe_shell("rm -rf %s", folder);
}

TestSuite(moe_train, .init = set_up, .fini = tear_down);

/* The command ends with `code` within a minute, and says each of `words` in exactly one line that
 * begins with the program's name. */
static void fails(int ranks, const char *arguments, int code, const char *words) {
  int got = moe_shell("timeout 60 mpirun --oversubscribe -np %d %s/moe-train %s >%s/log 2>&1",
                      ranks, MOE_BIN_DIR, arguments, folder);
  int lines = moe_shell("test $(grep -c '^moe-train.*: .*%s' %s/log) -eq 1", words, folder);
  if (got != code || lines != 0) moe_shell("cat %s/log >&2", folder);
  cr_assert_eq(got, code, "%s: exit code %d, not %d", arguments, got, code);
  cr_assert_eq(lines, 0, "%s: no single line with: %s", arguments, words);
}

/* The same for the standard configuration with one more line. */
static void refuses(int ranks, const char *line, const char *words) {
  char arguments[512];
  write_config(line);
  snprintf(arguments, sizeof arguments, "%s/cfg.ini", folder);
  fails(ranks, arguments, 2, words);
}

Test(moe_train, names_file_and_line_of_a_bad_setting) {
  refuses(2, "lr = fast\n", "cfg.ini:14: .*lr.*fast");
  refuses(3, "speed = 9\n", "cfg.ini:14: .*speed");
  refuses(2, "warmup_steps = 3\n", "cfg.ini:14: .*warmup_steps");
  refuses(2, "beta1 = 1.5\n", "cfg.ini:14: .*beta1");
  refuses(1, "[nowhere]\n x = 1\n", "cfg.ini:1[45]: .*nowhere");
}

Test(moe_train, says_how_to_mend_contradictions) {
  refuses(2, "[parallel]\nep = 7\n", "ep");
  refuses(6, "[parallel]\nep = 4\n", "ep");
  refuses(4, "[parallel]\nep = 3\n", "ep");
  refuses(2, "[run]\nbackend = cuda\n", "run.backend = cpu");
}

Test(moe_train, names_a_file_that_is_not_there) {
  fails(2, "/nowhere/cfg.ini", 2, "/nowhere/cfg.ini");
  refuses(2, "[data]\nvalid = /nowhere/tokens\n[train]\neval_interval = 5\n", "/nowhere/tokens");
}

Test(moe_train, explains_its_command_line) {
  char arguments[512];
  fails(1, "", 2, "--help");
  fails(2, "--frobnicate", 2, "--frobnicate");
  snprintf(arguments, sizeof arguments, "%s/cfg.ini --set train.steps", folder);
  fails(2, arguments, 2, "train.steps");
  cr_assert_eq(moe_shell("%s/moe-train --help | grep -q 'exit\\|Exit codes'", MOE_BIN_DIR), 0);
  cr_assert_eq(moe_shell("%s/moe-train --version | grep -q '^moe-train [0-9]'", MOE_BIN_DIR), 0);
}

Test(moe_train, names_file_and_offset_of_damage) {
  char arguments[512];
  snprintf(arguments, sizeof arguments, "%s/cfg.ini", folder);
  cr_assert_eq(moe_shell("truncate -s -3 %s/tokens.idx", folder), 0);
  fails(2, arguments, 3, "tokens.idx");
  write_tokens("tokens", 5);
  cr_assert_eq(moe_shell("truncate -s -8 %s/tokens.bin", folder), 0);
  fails(3, arguments, 3, "tokens.idx, byte 190");
}

Test(moe_train, names_file_and_offset_of_a_token_outside_the_vocabulary) {
  char arguments[512];
  write_tokens("tokens", 4711);
  snprintf(arguments, sizeof arguments, "%s/cfg.ini --set train.micro_batch=8 --set train.steps=40",
           folder);
  fails(2, arguments, 3, "4711.*tokens.bin");
}

Test(moe_train, a_second_job_on_one_run_folder_is_refused) {
  cr_assert_eq(
      moe_shell("mkdir -p %s/run && flock %s/run/.lock sleep 20 & sleep 1", folder, folder), 0);
  char arguments[512];
  snprintf(arguments, sizeof arguments, "%s/cfg.ini", folder);
  fails(2, arguments, 1, "another job");
}

Test(moe_train, a_signal_saves_and_exits_75_and_the_same_command_goes_on) {
  write_config("[checkpoint]\ninterval = 0\n");
  /* wait for a few steps, then send the signal to mpirun, which forwards it */
  int code =
      moe_shell("cd %s; mpirun --oversubscribe -np 2 %s/moe-train cfg.ini --set "
                "train.steps=1000000 >log 2>&1 & pid=$!; "
                "for i in $(seq 300); do test $(wc -l <%s/run/metrics.jsonl 2>/dev/null || echo "
                "0) -gt 5 && break; "
                "sleep 0.2; done; kill -USR2 $pid; wait $pid",
                folder, MOE_BIN_DIR, folder);
  if (code != 75) moe_shell("tail -5 %s/log >&2", folder);
  cr_assert_eq(code, 75);
  cr_assert_eq(moe_shell("grep -q 'stopped on request' %s/log", folder), 0);
  cr_assert_eq(moe_shell("ls %s/run/checkpoints | grep -q step-", folder), 0);
}

/* `line` is in the log once, after `before`. */
static void says_after(const char *before, const char *line) {
  int wrong =
      moe_shell("sed -n '/%s/,$p' %s/log | grep -c '%s' | grep -qx 1", before, folder, line);
  if (wrong) moe_shell("cat %s/log >&2", folder);
  cr_assert_not(wrong, "no \"%s\" after \"%s\"", line, before);
}

Test(moe_train, says_what_it_begins_with_and_when_it_is_ready) {
  static const char *const command =
      "timeout 60 mpirun --oversubscribe -np 2 %s/moe-train %s/cfg.ini --set train.steps=%d "
      "--set optim.warmup_steps=0 >%s/log 2>&1";
  cr_assert_eq(moe_shell(command, MOE_BIN_DIR, folder, 1, folder), 0);
  says_after("new run: initial weights", "^moe-train: ready after [0-9.]* s");
  says_after("ready after", "^step 1/1 ");
  cr_assert_eq(moe_shell(command, MOE_BIN_DIR, folder, 2, folder), 0);
  says_after("^moe-train: loading .*step-[0-9]*, [0-9.]* [KM]iB$", "resuming after step 1:");
  says_after("resuming after step 1:", "^moe-train: ready after [0-9.]* s");
  says_after("ready after", "^step 2/2 ");
}
