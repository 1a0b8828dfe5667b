/* moe-generate as users meet it, with a model that a few steps of training have made. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/flip_slice.h"
#include "tests/support/run_command.h"

static char folder[] = "/tmp/moe-generate-XXXXXX";

static const char config[] =
    "[model]\npreset = tiny\nvocab_size = 260\nhidden_size = 32\nhead_dim = 8\nffn_size = 32\n"
    "context = 64\n[data]\ntrain = tokens\ntokenizer = bytes\n[optim]\nlr = 1e-2\n"
    "warmup_steps = 2\n[train]\nsteps = 40\nmicro_batch = 4\n[run]\ndir = run\nthreads = 1\n"
    "[log]\ntensorboard = false\n[precision]\ndtype = bf16\ngrad_dtype = "
    "bf16\n[checkpoint]\ninterval = 20\n";

static void set_up(void) {
  cr_assert(mkdtemp(folder));
  char path[256];
  snprintf(path, sizeof path, "%s/cfg.ini", folder);
  FILE *f = fopen(path, "w");
  fputs(config, f);
  fclose(f);
  cr_assert_eq(
      moe_shell("cd %s && for i in $(seq 60); do echo \"a b c d e f caf\xC3\xA9 $((i %% 3)) g h\"; "
                "done >text && %s/moe-data tokenize --input text --tokenizer bytes --output "
                "tokens --split-documents lines >log 2>&1 && %s/moe-train cfg.ini >>log 2>&1",
                folder, MOE_BIN_DIR, MOE_BIN_DIR),
      0);
}

static void tear_down(void) {
  moe_shell("rm -rf %s", folder);
}

TestSuite(moe_generate, .init = set_up, .fini = tear_down, .timeout = 120);

/* Run it in the folder on so many ranks (0: without mpirun); standard output goes to `out`, errors
 * to `err`. */
static int generate(int ranks, const char *arguments) {
  char launcher[64] = "";
  if (ranks > 0)
    snprintf(launcher, sizeof launcher, "mpirun --oversubscribe --bind-to none -np %d", ranks);
  return moe_shell("cd %s && %s %s/moe-generate --checkpoint run --threads 1 %s >out 2>err", folder,
                   launcher, MOE_BIN_DIR, arguments);
}

static void succeeds(int ranks, const char *arguments) {
  int code = generate(ranks, arguments);
  if (code != 0) moe_shell("cat %s/err >&2", folder);
  cr_assert_eq(code, 0, "%s: exit code %d", arguments, code);
}

/* One message that says `text` (a pattern), and the exit code. */
static void fails(int ranks, const char *arguments, int code, const char *text) {
  int got = generate(ranks, arguments);
  if (got != code) moe_shell("cat %s/err >&2", folder);
  cr_assert_eq(got, code, "%s: exit code %d, not %d", arguments, got, code);
  if (moe_shell("test $(grep -c '^moe-generate: .*%s' %s/err) = 1", text, folder) != 0)
    cr_assert_eq(moe_shell("cat %s/err >&2; false", folder), 0, "%s: no \"%s\"", arguments, text);
}

static char *contents(const char *name) {
  static char text[1 << 16];
  char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *f = fopen(path, "r");
  cr_assert(f, "%s", path);
  size_t n = fread(text, 1, sizeof text - 1, f);
  fclose(f);
  text[n] = 0;
  return text;
}

/* The last line of the file that is a JSON object. */
static cJSON *json_in(const char *name) {
  char *text = contents(name), *last = NULL;
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
    if (*line == '{') last = line;
  cr_assert(last, "no JSON in %s", name);
  cJSON *json = cJSON_Parse(last);
  cr_assert(json, "not JSON: %s", last);
  return json;
}

static double number(const cJSON *json, const char *key) {
  const cJSON *value = cJSON_GetObjectItem(json, key);
  cr_assert(cJSON_IsNumber(value), "no number %s", key);
  return value->valuedouble;
}

static const char *string(const cJSON *json, const char *key) {
  const cJSON *value = cJSON_GetObjectItem(json, key);
  cr_assert(cJSON_IsString(value), "no string %s", key);
  return value->valuestring;
}

/* Four prompts, of which one is long enough to be read with its tokens sorted by expert. */
static const char texts[] = "--prompt-file text4 --temperature 1.1 --max-new 24 --ignore-eos";

static void write_prompts(void) {
  const char *prompts = "a b\\n\\ncaf\xC3\xA9 2\\nx\\na b c d e f a b c d e f a b c d e f a b c\\n";
  cr_assert_eq(moe_shell("cd %s && printf '%s' >text4", folder, prompts), 0);
}

Test(moe_generate, writes_the_same_on_one_two_and_three_ranks_in_every_type) {
  const char *types[] = {"fp32", "bf16", "fp16"};
  char more[256];
  write_prompts();
  for (int t = 0; t < 3; t++) {
    snprintf(more, sizeof more, "%s --dtype %s", texts, types[t]);
    succeeds(1, more);
    cr_assert_eq(moe_shell("cd %s && mv out one && test $(wc -c <one) -gt 100", folder), 0);
    for (int ranks = 2; ranks <= 3; ranks++) {
      succeeds(ranks, more);
      cr_assert_eq(moe_shell("cd %s && cmp out one", folder), 0, "%d ranks differ in %s", ranks,
                   types[t]);
    }
  }
}

Test(moe_generate, writes_the_same_in_any_batch_and_something_else_from_another_seed) {
  char more[256];
  write_prompts();
  snprintf(more, sizeof more, "%s --dtype fp32", texts);
  succeeds(0, more);
  cr_assert_eq(moe_shell("cd %s && mv out one", folder), 0);
  for (int batch = 1; batch <= 2; batch++) {
    snprintf(more, sizeof more, "%s --dtype fp32 --batch %d", texts, batch);
    succeeds(0, more);
    cr_assert_eq(moe_shell("cd %s && cmp out one", folder), 0, "%d texts at a time differ", batch);
  }
  snprintf(more, sizeof more, "%s --dtype fp32 --seed 7", texts);
  succeeds(0, more);
  cr_assert_neq(moe_shell("cd %s && cmp -s out one", folder), 0, "another seed, the same text");
}

Test(moe_generate, gives_texts_ids_and_rates_as_json) {
  succeeds(0, "--json --greedy --prompt 'a b c' --prompt 'd e f caf' --max-new 8");
  cJSON *json = json_in("out");
  cr_assert_eq(number(json, "index"), 1.0);
  cr_assert_str_eq(string(json, "prompt"), "d e f caf");
  cr_assert_eq(cJSON_GetArraySize(cJSON_GetObjectItem(json, "prompt_ids")), 9);
  cJSON *ids = cJSON_GetObjectItem(json, "ids");
  cr_assert_eq(cJSON_GetArraySize(ids), 8);
  cr_assert_str_eq(string(json, "end"), "length");
  if (cJSON_GetArrayItem(ids, 0)->valueint == 4 + 0xC3) /* it has learnt the word */
    cr_assert_eq(strncmp(string(json, "text"), "\xC3\xA9", 2), 0);
  cJSON_Delete(json);
  json = json_in("err");
  cr_assert_eq(number(json, "prompt_tokens"), 14.0);
  cr_assert_eq(number(json, "decode_tokens"), 14.0);
  cr_assert_eq(number(json, "decode_steps"), 7.0);
  cr_assert(number(json, "prefill_tokens_per_s") > 0.0 && number(json, "first_token_s") > 0.0);
  cr_assert_str_eq(string(json, "dtype"), "bf16");
  cJSON_Delete(json);
}

Test(moe_generate, stops_at_texts_and_tokens) {
  succeeds(0, "--json --prompt 'a b c d e' --max-new 60 --temperature 0.9 --ignore-eos");
  cJSON *json = json_in("out"), *ids = cJSON_GetObjectItem(json, "ids");
  char more[256], text[256];
  snprintf(text, sizeof text, "%s", string(json, "text"));
  int fifth = cJSON_GetArrayItem(ids, 5)->valueint, before = 0;
  while (cJSON_GetArrayItem(ids, before)->valueint != fifth) before++;
  cJSON_Delete(json);
  snprintf(more, sizeof more,
           "--json --prompt 'a b c d e' --max-new 60 --temperature 0.9 --ignore-eos --stop-id %d",
           fifth);
  succeeds(0, more);
  json = json_in("out");
  cr_assert_str_eq(string(json, "end"), "stop");
  cr_assert_eq(cJSON_GetArraySize(cJSON_GetObjectItem(json, "ids")), before + 1);
  cJSON_Delete(json);
  char stop[3] = {text[4], text[5], 0};
  cr_assert(strpbrk(stop, "'\\") == NULL);
  snprintf(more, sizeof more,
           "--json --prompt 'a b c d e' --max-new 60 --temperature 0.9 --ignore-eos --stop '%s'",
           stop);
  succeeds(0, more);
  json = json_in("out");
  cr_assert_str_eq(string(json, "end"), "stop");
  *strstr(text, stop) = 0;
  cr_assert_str_eq(string(json, "text"), text);
  cJSON_Delete(json);
}

Test(moe_generate, continues_ids_without_a_tokenizer) {
  succeeds(0, "--ids --prompt '101 36, 102' --max-new 5 --greedy");
  cr_assert_eq(moe_shell("cd %s && grep -qE '^101 36 102( [0-9]+){5} $' out", folder), 0);
  succeeds(0, "--ids --prompt '101 36, 102' --max-new 5 --greedy --no-echo");
  cr_assert_eq(moe_shell("cd %s && grep -qE '^([0-9]+ ){5}$' out", folder), 0);
  fails(0, "--ids --prompt '101 260'", 2, "not a token id below 260");
  fails(0, "--ids --prompt '1 two'", 2, "not a token id");
}

static double perplexity_in(const char *dtype, int ranks, const char *more) {
  char arguments[256];
  snprintf(arguments, sizeof arguments, "--perplexity tokens --dtype %s --json %s", dtype, more);
  succeeds(ranks, arguments);
  cJSON *json = json_in("out");
  double nats = number(json, "nats_per_token");
  cr_assert(fabs(log(number(json, "perplexity")) - nats) < 1e-6);
  cr_assert(strstr(more, "--limit") || number(json, "tokens") == 1439.0, "%g tokens",
            number(json, "tokens"));
  cJSON_Delete(json);
  return nats;
}

static double perplexity(int ranks, const char *more) {
  return perplexity_in("fp32", ranks, more);
}

Test(moe_generate, measures_perplexity_the_same_in_any_batch_and_on_any_ranks) {
  double one = perplexity(0, "--batch 1");
  cr_assert(one > 0.0 && one < 3.0, "%g nats: nothing was learnt", one);
  cr_assert_float_eq(perplexity(0, "--batch 5 --chunk 100"), one, 1e-5 * one);
  cr_assert_eq(perplexity(3, "--batch 1"), one);
  cr_assert_eq(perplexity_in("bf16", 2, ""), perplexity_in("bf16", 0, ""));
  cr_assert_neq(perplexity(0, "--stride 16"), one); /* the same tokens after more context */
  cr_assert_eq(perplexity(0, "--limit 60 --stride 7"), perplexity(0, "--limit 60"));
  cr_assert_neq(perplexity(0, "--limit 500"), one);
}

Test(moe_generate, plans_memory_and_refuses_what_does_not_fit) {
  succeeds(0, "--prompt x --dry-run");
  cr_assert_eq(moe_shell("cd %s && grep -q 'key/value cache' out && grep -q 'memory ' out", folder),
               0);
  fails(0, "--prompt x --memory-gib 0.001", 1, "the plan needs");
  fails(0, "--prompt x --context 65", 2, "the model reaches 64");
  fails(0, "--prompt x --alpha 100000 --context 6400000 --batch 1 --memory-gib 0.5", 1,
        "key/value cache");
  succeeds(0, "--prompt x --alpha 8 --context 512 --max-new 500 --ignore-eos --json --no-echo");
  cJSON *json = json_in("out");
  cr_assert_eq(cJSON_GetArraySize(cJSON_GetObjectItem(json, "ids")), 500);
  cJSON_Delete(json);
  succeeds(0, "--prompt x --ignore-eos --json"); /* 128 are asked for, and the context is 64 */
  json = json_in("out");
  cr_assert_eq(cJSON_GetArraySize(cJSON_GetObjectItem(json, "ids")), 63);
  cr_assert_str_eq(string(json, "end"), "context");
  cJSON_Delete(json);
}

Test(moe_generate, says_what_is_wrong_with_its_input) {
  fails(0, "", 2, "nothing to continue");
  fails(0, "--prompt x --perplexity tokens", 2, "ask for one");
  fails(0, "--prompt x --top-p 2", 2, "--top-p 2");
  fails(0, "--prompt x --dtype int8", 2, "--dtype int8");
  fails(0, "--prompt x --frobnicate", 2, "--frobnicate");
  fails(0, "--prompt x stray", 2, "stray");
  fails(2, "--prompt x --tokenizer none.model", 2, "none.model");
  fails(0, "--prompt x --tokenizer text", 3, "not a SentencePiece model: text");
  fails(0, "--prompt-file none", 2, "cannot open prompts: none");
  fails(2, "--perplexity none", 2, "none");
  fails(5, "--prompt x", 2, "4 experts");
  cr_assert_eq(moe_shell("printf 'good\\nb\\377d\\n' >%s/text2", folder), 0);
  fails(0, "--prompt-file text2", 3, "text2, line 2, byte 1");
  fails(0, "--prompt x --checkpoint nowhere", 2, "nowhere: there is no such folder");
  fails(0, "--prompt x --checkpoint auto", 2, "auto: there is no such folder");
  cr_assert_eq(moe_shell("%s/moe-generate --help | grep -q 'Exit codes'", MOE_BIN_DIR), 0);
  cr_assert_eq(moe_shell("%s/moe-generate --version | grep -q '^moe-generate [0-9]'", MOE_BIN_DIR),
               0);
}

static const char *step_folder(int step) {
  static char path[MOE_PATH];
  snprintf(path, sizeof path, "%s/run/checkpoints/step-%08d", folder, step);
  return path;
}

static bool said(const char *text) {
  return moe_shell("grep -q '%s' %s/err", text, folder) == 0;
}

Test(moe_generate, reads_and_minds_the_weights_alone) {
  flip_slice(step_folder(40), MOE_ROLE_ADAM_M);
  flip_slice(step_folder(40), MOE_ROLE_MASTER); /* the model is bf16 */
  succeeds(2, "--prompt x");
  cr_expect(!said("step 40"));
}

Test(moe_generate, takes_an_older_checkpoint_when_the_newest_is_damaged) {
  succeeds(0, "--prompt 'a b c' --checkpoint run/checkpoints/step-00000020");
  cr_assert_eq(moe_shell("cp %s/out %s/older", folder, folder), 0);
  flip_slice(step_folder(40), MOE_ROLE_PARAM);
  for (int ranks = 0; ranks <= 2; ranks += 2) {
    succeeds(ranks, "--prompt 'a b c'");
    cr_expect(said("skipping the checkpoint of step 40: .*does not have the hash"));
    cr_expect(moe_shell("cmp %s/out %s/older", folder, folder) == 0);
  }
  cr_expect(generate(0, "--prompt x --checkpoint run/checkpoints/step-00000040") == 3,
            "asked for by name there is no falling back");
}

Test(moe_generate, refuses_damaged_checkpoints) {
  flip_slice(step_folder(20), MOE_ROLE_PARAM);
  flip_slice(step_folder(40), MOE_ROLE_PARAM);
  cr_assert_eq(generate(2, "--prompt x"), 3);
  cr_expect(said("^moe-generate: .*none of its checkpoints is valid"));
}
