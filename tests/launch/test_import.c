/* Weights that left for Hugging Face's layout come back and train on as if they had never left. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/expect_command.h"
#include "tests/support/tokens.h"

static char folder[] = "/tmp/moe-import-XXXXXX";

#define runs(...) runs_in(folder, __VA_ARGS__)

/* A run of two steps at a learning rate of 0: its weights are those it began with. */
static void train(void) {
  char path[256];
  cr_assert(mkdtemp(folder));
  write_tokens(folder, 97);
  snprintf(path, sizeof path, "%s/cfg.ini", folder);
  FILE *f = fopen(path, "w");
  fputs("[model]\npreset = tiny\nvocab_size = 97\nhidden_size = 24\nnum_layers = 3\n"
        "num_heads = 6\nnum_kv_heads = 2\nhead_dim = 10\nnum_experts = 5\ntop_k = 3\n"
        "ffn_size = 14\ncontext = 16\ninit_std = 0.2\n[data]\ntrain = tokens\n"
        "valid_fraction = 0\n[run]\ndir = run\nthreads = 1\n[train]\nsteps = 2\n"
        "[optim]\nlr = 0\nwarmup_steps = 1\n[log]\ntensorboard = false\npeak_tflops = 1\n",
        f);
  fclose(f);
  runs(0, "", "moe-train cfg.ini");
}

static void clean(void) {
  moe_command c = moe_command_run(20, "rm -rf %s", folder);
  moe_command_free(&c);
}

TestSuite(import, .init = train, .fini = clean, .timeout = 300);

/* The losses of a run's steps as text. */
#define LOSSES "sed -n 's/.*\"loss\": \\([^,]*\\),.*/\\1/p' "

Test(import, gives_the_first_loss_again_on_one_rank_and_on_two) {
  runs(0, "", "moe-convert export-hf run --output hf --tokenizer none");
  runs(0, "the optimizer starts afresh", "moe-convert import-hf hf --output back");
  runs(0, "no optimizer state",
       "moe-train back/config.ini --set data.train=tokens --set train.steps=2 --set optim.lr=0 "
       "--set data.valid_fraction=0 --set optim.warmup_steps=1 --set run.threads=1 "
       "--resume back/checkpoints/step-00000000");
  runs(0, "",
       LOSSES "run/metrics.jsonl >a && " LOSSES "back/metrics.jsonl >b && test -s a && cmp a b");
  runs(0, "", "cp -r back/checkpoints/step-00000000 imported");
  runs(0, "",
       "mpirun --oversubscribe --bind-to none -np 2 moe-train back/config.ini "
       "--set run.dir=other --set train.global_batch=2 --set train.steps=1 --set optim.lr=1e-3 "
       "--set data.valid_fraction=0 --set optim.warmup_steps=1 --set run.threads=1 "
       "--set precision.dtype=bf16 --resume imported");
  runs(0, "", "test $(wc -l <other/metrics.jsonl) = 1");
}

Test(import, of_another_model_than_the_run_is_refused) {
  runs(0, "", "moe-convert export-hf run --output hf --tokenizer none");
  runs(0, "", "moe-convert import-hf hf --output back");
  moe_command c = moe_command_run(
      60,
      "cd %s && %s/moe-train cfg.ini --set run.dir=other --set model.rope_base=20000 "
      "--resume back/checkpoints/step-00000000",
      folder, MOE_BIN_DIR);
  cr_assert_eq(c.exit_code, 2, "%s", c.output);
  cr_assert(moe_command_says(&c, "model.rope_base"), "%s", c.output);
  moe_command_free(&c);
}
