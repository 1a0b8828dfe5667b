/* Everything a user can get wrong in a configuration: the message must name the place and the key,
 * and say how to mend it. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/config.h"

static moe_config c;

static moe_status parse(const char *text) {
  moe_config_defaults(&c);
  return moe_config_parse(&c, text, (int64_t)strlen(text), "cfg.ini");
}

/* The message has every one of the '|'-separated parts, and is one line. */
static void assert_says(const char *text, const char *parts) {
  const char *message = moe_error_message();
  cr_assert_null(strchr(message, '\n'), "%s", message);
  char copy[512];
  snprintf(copy, sizeof copy, "%s", parts);
  for (char *part = strtok(copy, "|"); part; part = strtok(NULL, "|"))
    cr_assert_not_null(strstr(message, part), "of: %s\nsays: %s\nnot: %s", text, message, part);
}

typedef struct {
  const char *text, *says;
} bad;

/* ---- wrong on their own -------------------------------------------------------------------- */

static const bad lines[] = {
    /* names */
    {"[modle]\n", "cfg.ini:1: [modle]: no such section|use one of|[model]"},
    {"[modle]\nsteps = 1\n", "cfg.ini:1: [modle]|use one of|[model]"},
    {"[Train]\n", "cfg.ini:1: [Train]|[train]"},
    {"[ train]\n", "cfg.ini:1: [ train]|[train]"},
    {"[]\nsteps = 1\n", "cfg.ini:1: []: no such section|use one of"},
    {"[train]\nstep = 10\n", "cfg.ini:2: [train] step:|did you mean [train] steps?"},
    {"[train]\nlr = 0.1\n", "cfg.ini:2: [train] lr:|did you mean [optim] lr?"},
    {"[train]\nSteps = 10\n", "cfg.ini:2: [train] Steps:|did you mean [train] steps?"},
    {"[log]\nfrobnication = 1\n", "cfg.ini:2: [log] frobnication:|docs/config.md"},
    {"[train]\n= 3\n", "cfg.ini:2: [train] : no such key"},
    {"steps = 10\n", "cfg.ini:1: steps: key outside a section|[train]"},
    {"\n; hello\n\n  lr = 1\n[optim]\n", "cfg.ini:4: lr: key outside a section"},
    /* repetition */
    {"[train]\nsteps = 1\nseed = 2\nsteps = 1\n", "cfg.ini:4: [train] steps:|line 2|keep one"},
    {"[train]\nsteps = 1\n[data]\n[train]\nsteps = 2\n", "cfg.ini:5: [train] steps:|line 2"},
    /* shape of a line */
    {"[train]\nsteps\n", "cfg.ini:2:|key = value"},
    {"[train\nsteps = 1\n", "cfg.ini:1:|[section]"},
    {"[train] steps = 1\n", "cfg.ini:1:|line of its own"},
    {"[train]\nsteps = 1\n]\n", "cfg.ini:3:|key = value"},
    /* integers */
    {"[train]\nsteps = abc\n", "cfg.ini:2: [train] steps = abc: not an integer|from 0 to"},
    {"[train]\nsteps =\n", "cfg.ini:2: [train] steps = : not an integer|whole number"},
    {"[train]\nsteps = 10x\n", "[train] steps = 10x: not an integer|whole number"},
    {"[train]\nsteps = 1e6\n", "[train] steps = 1e6: not an integer|whole number"},
    {"[train]\nsteps = 0x10\n", "[train] steps = 0x10: not an integer"},
    {"[train]\nsteps = 10.0\n", "[train] steps = 10.0: not an integer"},
    {"[train]\nsteps = 1 000\n", "[train] steps = 1 000: not an integer"},
    {"[train]\nsteps = -\n", "[train] steps = -: not an integer"},
    {"[train]\nsteps = +-3\n", "[train] steps = +-3: not an integer"},
    {"[train]\nsteps = -1\n", "[train] steps = -1: out of range|from 0 to 1099511627776"},
    {"[train]\nsteps = 99999999999999999999\n", "steps = 99999999999999999999: out of range|0 to"},
    {"[train]\nmicro_batch = 0\n", "[train] micro_batch = 0: out of range|from 1 to 1048576"},
    {"[model]\ntop_k = 65\n", "[model] top_k = 65: out of range|from 0 to 64"},
    {"[checkpoint]\nkeep = 1\n", "[checkpoint] keep = 1: out of range|from 2 to"},
    /* numbers */
    {"[optim]\nlr = fast\n", "cfg.ini:2: [optim] lr = fast: not a number|from 0 to 100"},
    {"[optim]\nlr = 1e-4x\n", "[optim] lr = 1e-4x: not a number"},
    {"[optim]\nlr = 1e\n", "[optim] lr = 1e: not a number"},
    {"[optim]\nlr = 0,001\n", "[optim] lr = 0,001: not a number"},
    {"[optim]\nlr = nan\n", "[optim] lr = nan: not a number"},
    {"[optim]\nlr = inf\n", "[optim] lr = inf: not a number"},
    {"[optim]\nlr = 0x1p-3\n", "[optim] lr = 0x1p-3: not a number"},
    {"[optim]\nlr = 1e999\n", "[optim] lr = 1e999: out of range|from 0 to 100"},
    {"[optim]\nlr = 1e-999\n", "[optim] lr = 1e-999: out of range"},
    {"[optim]\nlr = -1e-9\n", "[optim] lr = -1e-9: out of range|from 0 to 100"},
    {"[optim]\nbeta1 = 1\n", "[optim] beta1 = 1: out of range|0.999999"},
    {"[optim]\nlr =\n", "[optim] lr = : not a number"},
    /* booleans and choices */
    {"[run]\ndebug = on\n", "cfg.ini:2: [run] debug = on:|true, false, yes, no, 1, 0"},
    {"[run]\ndebug = True\n", "[run] debug = True:|true, false"},
    {"[run]\ndebug = 2\n", "[run] debug = 2:|true, false"},
    {"[precision]\ndtype = float32\n", "[precision] dtype = float32:|give one of fp32, bf16, fp16"},
    {"[model]\npreset = 7b\n", "[model] preset = 7b:|tiny, small, 1b, 6.9b"},
    {"[model]\npreset = tiny|small\n", "[model] preset = tiny"},
    {"[model]\npreset =\n", "[model] preset = :|tiny, small"},
    /* texts */
    {"[run]\ndir = a\tb\n", "cfg.ini:2: [run] dir = a\tb: control character 9 at byte 2: remove"},
    {"[run]\ndir = a\x7f\n", "[run] dir|control character 127"},
};

Test(config_errors, each_line_is_refused_with_its_place_and_a_way_to_mend_it) {
  for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
    cr_assert_eq(parse(lines[i].text), MOE_USAGE, "accepted: %s", lines[i].text);
    assert_says(lines[i].text, lines[i].says);
  }
}

/* ---- contradictions ------------------------------------------------------------------------ */

static const bad contradictions[] = {
    {"[model]\nnum_heads = 10\nnum_kv_heads = 4\n",
     "cfg.ini:2: [model] num_heads = 10:|num_kv_heads = 4 (cfg.ini:3)|use 8 or 12"},
    {"[model]\nnum_kv_heads = 16\n",
     "[model] num_heads = 12:|preset 6.9b|16 (cfg.ini:2)|use 16 or"},
    {"[model]\nhead_dim = 33\n", "cfg.ini:2: [model] head_dim = 33: odd|use 32 or 34"},
    {"[model]\nhead_dim = 1\n", "cfg.ini:2: [model] head_dim = 1: odd|use 2"},
    {"[model]\nhead_dim = 2\nrope_alpha = 8\n", "cfg.ini:3: [model] rope_alpha = 8:|cfg.ini:2|use"},
    {"[model]\npreset = tiny\ntop_k = 5\n",
     "cfg.ini:3: [model] top_k = 5:|num_experts = 4 (preset tiny)|use at most 4"},
    {"[model]\nnum_layers = 4096\nnum_experts = 4096\nffn_size = 1048576\nhidden_size = 131072\n",
     "cfg.ini:2: [model] num_layers = 4096:|parameters|smaller"},
    {"[model]\npreset = tiny\n[data]\nsequence_length = 1024\n",
     "cfg.ini:4: [data] sequence_length = 1024:|context = 512 (preset tiny)|use at most 512|"
     "rope_alpha"},
    {"[train]\nmicro_batch = 1048576\n",
     "cfg.ini:2: [train] micro_batch = 1048576:|at most 16383|global_batch"},
    {"[train]\neval_interval = 5\n[data]\nvalid_fraction = 0\n",
     "cfg.ini:2: [train] eval_interval = 5:|valid_fraction is 0 (cfg.ini:4)|set"},
    {"[train]\nrecompute = block\nrecompute_layers = 31\n",
     "cfg.ini:3: [train] recompute_layers = 31:|num_layers = 30 (preset 6.9b)|at most 30"},
    {"[train]\nrecompute_layers = 3\nrecompute = none\n",
     "cfg.ini:2: [train] recompute_layers = 3:|recompute = none (cfg.ini:3)|set recompute to"},
    {"[train]\ncapacity_factor = 1e-9\n",
     "cfg.ini:2: [train] capacity_factor = 1e-09: an expert would keep no token|use 1 or more"},
    {"[optim]\nmin_lr = 1\nlr = 0.5\n",
     "cfg.ini:2: [optim] min_lr = 1: above|lr = 0.5 (cfg.ini:3)|use at most"},
    {"[optim]\nmin_lr = -0.5\n", "cfg.ini:2: [optim] min_lr = -0.5: negative|use 0 or more, or -1"},
    {"[train]\nsteps = 100\n",
     "default: [optim] warmup_steps = 2000:|steps = 100 (cfg.ini:2)|at most 100, as 10"},
    {"[optim]\nwarmup_steps = 10001\n", "cfg.ini:2: [optim] warmup_steps = 10001:|(default)|use"},
    {"[optim]\nschedule = wsd\ndecay_steps = 9000\n",
     "cfg.ini:3: [optim] decay_steps = 9000:|warmup_steps = 2000 (default)|at most 8000"},
    {"[train]\nglobal_batch = 10\nmicro_batch = 2\n",
     "cfg.ini:2: [train] global_batch = 10:|2 * 4 = 8|(micro_batch: cfg.ini:3)|use 8 or 16"},
    {"[train]\nglobal_batch = 3\n", "cfg.ini:2: [train] global_batch = 3:|1 * 4 = 4|use 4,"},
    {"[parallel]\nep = 3\n",
     "cfg.ini:2: [parallel] ep = 3:|the 4 ranks|num_experts = 16 (preset 6.9b)|use 1, 2, 4, or 0"},
    {"[parallel]\nep = 8\n", "cfg.ini:2: [parallel] ep = 8:|use 1, 2, 4, or 0"},
    {"[parallel]\nep = 4\n[model]\nnum_experts = 3\ntop_k = 1\n",
     "cfg.ini:2: [parallel] ep = 4:|num_experts = 3 (cfg.ini:4)|use 1, 2, or 0"},
    {"[precision]\ngrad_dtype = bf16\ndtype = fp16\n",
     "cfg.ini:2: [precision] grad_dtype = bf16:|dtype = fp16 (cfg.ini:3)|use grad_dtype = fp32"},
    {"[precision]\ngrad_dtype = bf16\n",
     "cfg.ini:2: [precision] grad_dtype = bf16:|dtype = fp32 (default)|dtype = bf16"},
    {"[precision]\ngrad_dtype = bf16\ndtype = bf16\n[train]\nglobal_batch = 16\nmicro_batch = 2\n",
     "cfg.ini:2: [precision] grad_dtype = bf16:|global_batch = 16 (cfg.ini:5) makes 2 "
     "micro-batches|"
     "global_batch = 8"},
};

Test(config_errors, each_contradiction_names_both_sides_and_values_that_work) {
  for (size_t i = 0; i < sizeof contradictions / sizeof contradictions[0]; i++) {
    cr_assert_eq(parse(contradictions[i].text), MOE_OK, "%s", moe_error_message());
    cr_assert_eq(moe_config_resolve(&c, 4), MOE_USAGE, "accepted: %s", contradictions[i].text);
    assert_says(contradictions[i].text, contradictions[i].says);
  }
}

/* ---- --set --------------------------------------------------------------------------------- */

static const bad assignments[] = {
    {"", "--set|section.key=value"},
    {"train.steps", "--set: train.steps:|section.key=value"},
    {"steps=3", "--set: steps=3:|section.key=value"},
    {"data=x.y", "--set: data=x.y:|section.key=value"},
    {"trian.steps=3", "--set: [trian]: no such section|[train]"},
    {"train.step=3", "--set: [train] step:|did you mean [train] steps?"},
    {"train.steps=3;4", "--set: [train] steps = 3;4: not an integer"},
    {"run.dir=a #b", "--set: [run] dir = a #b:|comment|remove"},
    {"run.dir=;b", "--set: [run] dir = ;b:|comment|remove"},
    {"run.dir=a\nb", "control character 10"},
    {".steps=3", "--set: steps: key outside a section"},
};

Test(config_errors, each_bad_assignment_is_refused) {
  for (size_t i = 0; i < sizeof assignments / sizeof assignments[0]; i++) {
    moe_config_defaults(&c);
    cr_assert_eq(moe_config_set(&c, assignments[i].text), MOE_USAGE, "%s", assignments[i].text);
    if (strchr(assignments[i].text, '\n') == NULL)
      assert_says(assignments[i].text, assignments[i].says);
  }
}

/* ---- sizes and files ----------------------------------------------------------------------- */

static char *value_of(const char *before, size_t length, const char *after) {
  char *text = malloc(strlen(before) + length + strlen(after) + 1);
  char *p = stpcpy(text, before);
  memset(p, 'x', length);
  strcpy(p + length, after);
  return text;
}

Test(config_errors, values_may_have_1023_bytes_and_no_more) {
  char *fits = value_of("[run]\ndir = ", 1023, "\n");
  cr_assert_eq(parse(fits), MOE_OK, "%s", moe_error_message());
  cr_assert_eq(strlen(c.run.dir), (size_t)1023);
  char *too_long = value_of("[run]\ndir = ", 1024, "\n");
  cr_assert_eq(parse(too_long), MOE_USAGE);
  assert_says("1024 bytes", "cfg.ini:2: [run] dir = xxx|1024 bytes|at most 1023");
  char *set = value_of("run.dir=", 1024, "");
  cr_assert_eq(moe_config_set(&c, set), MOE_USAGE);
  assert_says("1024 bytes", "--set|at most 1023");
  char *huge = value_of("run.dir=", 100000, "");
  cr_assert_eq(moe_config_set(&c, huge), MOE_USAGE);
  assert_says("100000 bytes", "--set|too long");
  free(fits), free(too_long), free(set), free(huge);
}

Test(config_errors, long_lines_are_refused_not_split) {
  /* What lies beyond the limit would be a valid line of its own. */
  char *text = value_of("[train]\n; ", 2046, "steps = 7\n");
  cr_assert_eq(parse(text), MOE_USAGE);
  assert_says("long comment", "cfg.ini:2: line of|give at most");
  free(text);
  text = value_of("[train]\n; ", 2000, "\nsteps = 7\n");
  cr_assert_eq(parse(text), MOE_OK, "%s", moe_error_message());
  cr_assert_eq(c.train.steps, 7);
  free(text);
  text = value_of("[", 3000, "]\n");
  cr_assert_eq(parse(text), MOE_USAGE);
  free(text);
  text = value_of("[train]\n", 1500, " = 3\n");
  cr_assert_eq(parse(text), MOE_USAGE);
  assert_says("long key", "cfg.ini:2: [train] xxx|no such key");
  free(text);
}

Test(config_errors, zero_bytes_are_refused) {
  static const char text[] = "[train]\nsteps = 1\0"
                             "0\n";
  moe_config_defaults(&c);
  cr_assert_eq(moe_config_parse(&c, text, sizeof text - 1, "cfg.ini"), MOE_USAGE);
  assert_says("zero byte", "cfg.ini:2: a zero byte|INI file");
}

Test(config_errors, long_file_names_keep_the_line) {
  char *name = value_of("", 5000, "/cfg.ini");
  moe_config_defaults(&c);
  cr_assert_eq(moe_config_parse(&c, "[train]\nx=1", 11, name), MOE_USAGE);
  assert_says("long name", "x/cfg.ini:2: [train] x");
  free(name);
}

Test(config_errors, files_that_cannot_be_read_are_named) {
  moe_config_defaults(&c);
  cr_assert_eq(moe_config_read(&c, "/nowhere/cfg.ini"), MOE_USAGE);
  assert_says("missing", "/nowhere/cfg.ini|No such file|check the path");
  cr_assert_eq(moe_config_read(&c, "/tmp"), MOE_USAGE);
  assert_says("directory", "/tmp|directory|INI file");
  cr_assert_eq(moe_config_read(&c, "/dev/zero"), MOE_USAGE);
  assert_says("endless", "/dev/zero|larger than|INI file");
}

Test(config_errors, errors_of_a_file_name_the_file) {
  char path[] = "/tmp/moe-config-XXXXXX";
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  static const char text[] = "[model]\npreset = tiny\n\n[train]\nsteps = many\n";
  cr_assert_eq(write(fd, text, sizeof text - 1), (ssize_t)(sizeof text - 1));
  close(fd);
  moe_config_defaults(&c);
  moe_status status = moe_config_read(&c, path);
  unlink(path);
  cr_assert_eq(status, MOE_USAGE);
  char expected[64];
  snprintf(expected, sizeof expected, "%s:5: [train] steps = many", path);
  assert_says(text, expected);
}
