/* moe-convert as users meet it: its commands on a run that four ranks have trained, and one clear
 * line with the documented exit code for everything it is given wrongly. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/expect_command.h"
#include "tests/support/flip_slice.h"
#include "tests/support/tokens.h"

static char folder[] = "/tmp/moe-convert-XXXXXX";

#define runs(...) runs_in(folder, __VA_ARGS__)

/* A run of two checkpoints, written by four ranks; every size differs, 5 experts. */
static void train(void) {
  char path[256];
  cr_assert(mkdtemp(folder));
  write_tokens(folder, 261);
  snprintf(path, sizeof path, "%s/cfg.ini", folder);
  FILE *f = fopen(path, "w");
  fputs("[model]\npreset = tiny\nvocab_size = 261\nhidden_size = 24\nnum_layers = 3\n"
        "num_heads = 6\nnum_kv_heads = 2\nhead_dim = 10\nnum_experts = 5\ntop_k = 3\n"
        "ffn_size = 14\ncontext = 16\n[data]\ntrain = tokens\nvalid_fraction = 0\n"
        "tokenizer = bytes\n[run]\ndir = run\nthreads = 1\n[train]\nsteps = 4\n[optim]\n"
        "warmup_steps = 2\n[precision]\ndtype = bf16\n[checkpoint]\ninterval = 2\n[log]\n"
        "tensorboard = false\npeak_tflops = 1\n",
        f);
  fclose(f);
  runs(0, "/s), verified in ", "mpirun --oversubscribe --bind-to none -np 4 moe-train cfg.ini");
  runs(0, "", "test $(ls run/checkpoints/step-00000004/*.h5 | wc -l) = 4");
}

static void clean(void) {
  moe_command c = moe_command_run(20, "rm -rf %s", folder);
  moe_command_free(&c);
}

TestSuite(moe_convert, .init = train, .fini = clean, .timeout = 300);

Test(moe_convert, every_command_works_on_what_four_ranks_wrote) {
  runs(0, "written by   4 ranks, 4 files", "moe-convert inspect run");
  runs(0, "every hash is right", "moe-convert verify run --all");
  runs(0, "are equal",
       "moe-convert reshard run --output again --ranks 3 && "
       "moe-convert diff run again");
  runs(1, "step: 2, 4", "moe-convert diff run/checkpoints/step-00000002 run");
  runs(0, "proof: all 69 tensors, 45 of them experts'",
       "moe-convert export-gguf run --output m.gguf --dtype fp32");
  runs(0, "are equal", "moe-convert diff run m.gguf");
  runs(0, "proof: all 69 tensors", "moe-convert export-hf run --output hf --alpha 8");
  runs(0, "are equal", "moe-convert import-hf hf --output back && moe-convert diff back hf");
  /* the reshaped run goes on where the other stopped, on other ranks */
  runs(0, "",
       "mpirun --oversubscribe --bind-to none -np 2 moe-train again/config.ini "
       "--set train.steps=5 --set train.global_batch=4 --set train.micro_batch=1");
  runs(0, "step         5", "moe-convert inspect again");
}

Test(moe_convert, wrong_use_is_exit_code_2_and_says_how_to_mend_it) {
  runs(0, "Exit codes", "moe-convert --help");
  runs(0, "--ranks N", "moe-convert reshard --help");
  runs(0, "moe-convert 0", "moe-convert --version");
  runs(2, "see moe-convert --help", "moe-convert");
  runs(2, "frob", "moe-convert frob run");
  runs(2, "--ranks is no option", "moe-convert inspect run --ranks 2");
  runs(2, "usage: moe-convert diff A B", "moe-convert diff run");
  runs(2, "one path too many: c", "moe-convert diff a b c");
  runs(2, "--output", "moe-convert export-gguf run");
  runs(2, "--dtype q8_0", "moe-convert export-hf run --output x --dtype q8_0");
  runs(2, "--ranks 0", "moe-convert reshard run --output x --ranks 0");
  runs(2, "5GB", "moe-convert export-hf run --output x --shard-size 5PB");
  runs(2, "no such folder", "moe-convert verify nowhere");
  runs(2, "without mpirun", "mpirun --oversubscribe -np 2 moe-convert verify run");
  runs(2, "nowhere.model", "moe-convert export-gguf run --output x --tokenizer nowhere.model");
  runs(0, "", "test ! -e x");
}

static const char *step_folder(int step) {
  static char path[MOE_PATH];
  snprintf(path, sizeof path, "%s/run/checkpoints/step-%08d", folder, step);
  return path;
}

Test(moe_convert, an_export_minds_the_weights_and_takes_an_older_checkpoint_when_they_are_damaged) {
  flip_slice(step_folder(4), MOE_ROLE_ADAM_V);
  runs(0, "", "moe-convert export-gguf run --output m.gguf --dtype fp32");
  runs(0, "are equal", "moe-convert diff run/checkpoints/step-00000004 m.gguf");
  flip_slice(step_folder(4), MOE_ROLE_MASTER);
  runs(3, "does not have the hash",
       "moe-convert export-hf run/checkpoints/step-00000004 --output hf");
  runs(0, "skipping the checkpoint of step 4",
       "moe-convert export-hf run --output hf --dtype fp32");
  runs(0, "are equal", "moe-convert diff run/checkpoints/step-00000002 hf");
  runs(0, "skipping the checkpoint of step 4", "moe-convert reshard run --output two --ranks 2");
  runs(0, "", "test ! -e two/checkpoints/step-00000004 && ! ls -d *.tmp-*");
}

Test(moe_convert, damage_is_exit_code_3_and_an_older_checkpoint_is_taken) {
  runs(0, "", "truncate -s -1 run/checkpoints/step-00000004/shard-00002-of-00004.h5");
  runs(3, "shard-00002-of-00004.h5", "moe-convert verify run");
  runs(0, "skipping the checkpoint of step 4",
       "moe-convert export-gguf run --output m.gguf --dtype q8_0");
  runs(3, "shard-00002-of-00004.h5", "moe-convert diff run/checkpoints/step-00000004 m.gguf");
  runs(0, "", "head -c 5000 m.gguf >cut.gguf");
  runs(3, "cut.gguf", "moe-convert diff run/checkpoints/step-00000002 cut.gguf");
}
