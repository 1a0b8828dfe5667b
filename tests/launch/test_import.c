/* Weights that left for Hugging Face's layout come back and train on as if they had never left. */
#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/token_file.h"
#include "tests/support/run_command.h"

static char folder[] = "/tmp/moe-import-XXXXXX";

/* Run a command in the folder; it must exit with 0 and say `words` ("": anything). */
static void runs(const char *words, const char *format, ...) {
  char line[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  moe_command c = moe_command_run(100, "cd %s && PATH=%s:$PATH && %s", folder, MOE_BIN_DIR, line);
  cr_assert(!c.timed_out && c.exit_code == 0, "%s: exit code %d:\n%s", line, c.exit_code, c.output);
  cr_assert(moe_command_says(&c, words), "%s: does not say \"%s\":\n%s", line, words, c.output);
  moe_command_free(&c);
}

static void write_tokens(void) {
  char path[256];
  moe_token_writer *w;
  snprintf(path, sizeof path, "%s/tokens", folder);
  cr_assert_eq(moe_token_writer_create(path, 97, &w), MOE_OK);
  for (int d = 0; d < 20; d++) {
    int32_t ids[64];
    for (int i = 0; i < 64; i++) ids[i] = 4 + (d * 7 + i * 3) % 90;
    cr_assert_eq(moe_token_writer_append(w, ids, 64), MOE_OK);
    cr_assert_eq(moe_token_writer_end_document(w), MOE_OK);
  }
  cr_assert_eq(moe_token_writer_finish(w), MOE_OK);
  moe_token_writer_destroy(w);
}

/* A run of two steps at a learning rate of 0: its weights are those it began with. */
static void train(void) {
  char path[256];
  cr_assert(mkdtemp(folder));
  write_tokens();
  snprintf(path, sizeof path, "%s/cfg.ini", folder);
  FILE *f = fopen(path, "w");
  fputs("[model]\npreset = tiny\nvocab_size = 97\nhidden_size = 24\nnum_layers = 3\n"
        "num_heads = 6\nnum_kv_heads = 2\nhead_dim = 10\nnum_experts = 5\ntop_k = 3\n"
        "ffn_size = 14\ncontext = 16\ninit_std = 0.2\n[data]\ntrain = tokens\n"
        "valid_fraction = 0\n[run]\ndir = run\nthreads = 1\n[train]\nsteps = 2\n"
        "[optim]\nlr = 0\nwarmup_steps = 1\n[log]\ntensorboard = false\npeak_tflops = 1\n",
        f);
  fclose(f);
  runs("", "moe-train cfg.ini");
}

static void clean(void) {
  moe_command c = moe_command_run(20, "rm -rf %s", folder);
  moe_command_free(&c);
}

TestSuite(import, .init = train, .fini = clean, .timeout = 300);

/* The losses of a run's steps as text. */
#define LOSSES "sed -n 's/.*\"loss\": \\([^,]*\\),.*/\\1/p' "

Test(import, gives_the_first_loss_again_on_one_rank_and_on_two) {
  runs("", "moe-convert export-hf run --output hf --tokenizer none");
  runs("the optimizer starts afresh", "moe-convert import-hf hf --output back");
  runs("no optimizer state",
       "moe-train back/config.ini --set data.train=tokens --set train.steps=2 --set optim.lr=0 "
       "--set data.valid_fraction=0 --set optim.warmup_steps=1 --set run.threads=1 "
       "--resume back/checkpoints/step-00000000");
  runs("",
       LOSSES "run/metrics.jsonl >a && " LOSSES "back/metrics.jsonl >b && test -s a && cmp a b");
  runs("", "cp -r back/checkpoints/step-00000000 imported");
  runs("", "mpirun --oversubscribe --bind-to none -np 2 moe-train back/config.ini "
           "--set run.dir=other --set train.global_batch=2 --set train.steps=1 --set optim.lr=1e-3 "
           "--set data.valid_fraction=0 --set optim.warmup_steps=1 --set run.threads=1 "
           "--set precision.dtype=bf16 --resume imported");
  runs("", "test $(wc -l <other/metrics.jsonl) = 1");
}

Test(import, of_another_model_than_the_run_is_refused) {
  runs("", "moe-convert export-hf run --output hf --tokenizer none");
  runs("", "moe-convert import-hf hf --output back");
  moe_command c = moe_command_run(
      60,
      "cd %s && %s/moe-train cfg.ini --set run.dir=other --set model.rope_base=20000 "
      "--resume back/checkpoints/step-00000000",
      folder, MOE_BIN_DIR);
  cr_assert_eq(c.exit_code, 2, "%s", c.output);
  cr_assert(moe_command_says(&c, "model.rope_base"), "%s", c.output);
  moe_command_free(&c);
}
