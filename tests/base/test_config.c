#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/config_rows.h"
#include "core/base/rng.h"

static moe_config c;

static void read_text(moe_config *config, const char *text) {
  moe_status status = moe_config_parse(config, text, (int64_t)strlen(text), "cfg.ini");
  cr_assert_eq(status, MOE_OK, "%s\n%s", moe_error_message(), text);
}

static void resolve(moe_config *config, int world) {
  cr_assert_eq(moe_config_resolve(config, world), MOE_OK, "%s", moe_error_message());
}

Test(config, defaults_resolve_to_the_6_9b_model) {
  moe_config_defaults(&c);
  resolve(&c, 1);
  cr_assert_eq(c.model.vocab_size, 32000);
  cr_assert_eq(c.model.hidden_size, 768);
  cr_assert_eq(c.model.num_layers, 30);
  cr_assert_eq(c.model.num_heads, 12);
  cr_assert_eq(c.model.num_kv_heads, 1);
  cr_assert_eq(c.model.head_dim, 64);
  cr_assert_eq(c.model.num_experts, 16);
  cr_assert_eq(c.model.top_k, 4);
  cr_assert_eq(c.model.ffn_size, 6144);
  cr_assert_eq(c.model.context, 32768);
  cr_assert_eq(c.data.sequence_length, 32768);
  cr_assert_eq(c.optim.lr, 1e-4);
  cr_assert_eq(c.optim.warmup_steps, 2000);
  cr_assert_eq(c.train.aux_coef, 0.01);
}

/* Parameters by hand: 2 V D + L (2 D H d + 2 D G d + E D + 3 E D F + 2 D) + D. */
static double parameters(const char *preset) {
  char assignment[64];
  snprintf(assignment, sizeof assignment, "model.preset=%s", preset);
  moe_config_defaults(&c);
  cr_assert_eq(moe_config_set(&c, assignment), MOE_OK);
  resolve(&c, 0);
  double D = (double)c.model.hidden_size, E = (double)c.model.num_experts;
  double heads = (double)((c.model.num_heads + c.model.num_kv_heads) * c.model.head_dim);
  double layer = 2 * D * heads + E * D + 3 * E * D * (double)c.model.ffn_size + 2 * D;
  return 2 * (double)c.model.vocab_size * D + (double)c.model.num_layers * layer + D;
}

Test(config, presets_have_the_promised_sizes) {
  cr_assert_float_eq(parameters("tiny"), 0.54e6, 0.005e6);
  cr_assert_float_eq(parameters("small"), 28e6, 0.5e6);
  cr_assert_float_eq(parameters("1b"), 0.96e9, 0.005e9);
  cr_assert_float_eq(parameters("6.9b"), 6.88e9, 0.005e9);
}

Test(config, a_key_overrides_the_preset_and_says_where_it_was_set) {
  moe_config_defaults(&c);
  read_text(&c, "[model]\npreset = small\n\ntop_k = 2\n");
  cr_assert_eq(moe_config_set(&c, "model.num_layers=3"), MOE_OK);
  resolve(&c, 0);
  cr_assert_eq(c.model.top_k, 2);
  cr_assert_eq(c.model.num_layers, 3);
  cr_assert_eq(c.model.hidden_size, 256);
  cr_assert_str_eq(moe_config_origin(&c, "model", "top_k"), "cfg.ini:4");
  cr_assert_str_eq(moe_config_origin(&c, "model", "num_layers"), "--set");
  cr_assert_str_eq(moe_config_origin(&c, "model", "hidden_size"), "preset small");
  cr_assert_str_eq(moe_config_origin(&c, "optim", "lr"), "default");
  cr_assert_str_eq(moe_config_origin(&c, "no", "such key"), "default");
}

Test(config, spaces_comments_and_line_ends_do_not_matter) {
  moe_config_defaults(&c);
  read_text(&c, "\xef\xbb\xbf# top\r\n"
                "[train]   ; the run\r\n"
                "\r\n"
                "  steps=+0042 ; half of 84\r\n"
                "\tseed : 7\r\n"
                "; steps = 3\r\n"
                "[run]\r\n"
                "dir =  /data/run 1/a;b#c  # where\r\n"
                "debug = yes\r\n"
                "[optim]\r\n"
                "lr = .5e-3\r\n"
                "[run]\r\n"
                "deterministic = 1");
  cr_assert_eq(c.train.steps, 42);
  cr_assert_eq(c.train.seed, 7);
  cr_assert_str_eq(c.run.dir, "/data/run 1/a;b#c");
  cr_assert(c.run.debug);
  cr_assert(c.run.deterministic);
  cr_assert_eq(c.optim.lr, 0.5e-3);
}

Test(config, text_may_be_utf8_or_any_bytes_above) {
  moe_config_defaults(&c);
  read_text(&c, "[data]\ntrain = /corpora/\xe4\xb8\xad\xe6\x96\x87\n[run]\ndir = a\xff\xfe\n");
  cr_assert_str_eq(c.data.train, "/corpora/\xe4\xb8\xad\xe6\x96\x87");
  cr_assert_str_eq(c.run.dir, "a\xff\xfe");
}

Test(config, later_files_and_set_override_earlier_ones) {
  moe_config_defaults(&c);
  read_text(&c, "[train]\nsteps = 1\nseed = 1\n");
  read_text(&c, "[train]\nsteps = 2\n");
  cr_assert_eq(moe_config_set(&c, " train . seed = 3 "), MOE_OK, "%s", moe_error_message());
  cr_assert_eq(moe_config_set(&c, "data.train=0.5:a=b,c"), MOE_OK);
  cr_assert_eq(moe_config_set(&c, "data.tokenizer="), MOE_OK);
  cr_assert_eq(c.train.steps, 2);
  cr_assert_eq(c.train.seed, 3);
  cr_assert_str_eq(c.data.train, "0.5:a=b,c");
}

Test(config, empty_text_changes_nothing) {
  static moe_config before;
  moe_config_defaults(&before);
  moe_config_defaults(&c);
  cr_assert_eq(moe_config_parse(&c, NULL, 0, "cfg.ini"), MOE_OK);
  read_text(&c, "\n\n[train]\n");
  cr_assert_arr_eq(&c, &before, sizeof c);
}

Test(config, resolving_twice_changes_nothing) {
  static moe_config once;
  moe_config_defaults(&c);
  read_text(&c, "[model]\npreset = tiny\n[train]\nmicro_batch = 3\n");
  resolve(&c, 0);
  cr_assert_eq(c.train.global_batch, 0, "the ranks are not known yet");
  resolve(&c, 4);
  cr_assert_eq(c.train.global_batch, 12);
  once = c;
  resolve(&c, 4);
  cr_assert_arr_eq(&c, &once, sizeof c);
}

Test(config, checks_that_need_the_ranks_wait_for_them) {
  moe_config_defaults(&c);
  read_text(&c, "[parallel]\nep = 3\n[train]\nglobal_batch = 7\n");
  resolve(&c, 0);
  cr_assert_eq(moe_config_resolve(&c, 2), MOE_USAGE);
}

Test(config, a_run_of_no_steps_has_no_schedule_to_contradict) {
  moe_config_defaults(&c);
  read_text(&c, "[train]\nsteps = 0\n");
  resolve(&c, 1);
}

Test(config, compute_type_follows_precision) {
  static const moe_dtype expected[] = {MOE_F32, MOE_BF16, MOE_F16};
  moe_config_defaults(&c);
  for (int i = 0; i < 3; i++) {
    c.precision.dtype = i;
    cr_assert_eq(moe_config_compute_dtype(&c), expected[i]);
  }
}

/* The enumerators in config.h are the table's choices, in its order. */
Test(config, enumerators_match_the_table) {
  static const struct {
    const char *assignment;
    int value;
    int *member;
  } cases[] = {
      {"train.recompute=auto", MOE_RECOMPUTE_AUTO, &c.train.recompute},
      {"train.recompute=swiglu", MOE_RECOMPUTE_SWIGLU, &c.train.recompute},
      {"train.recompute=experts", MOE_RECOMPUTE_EXPERTS, &c.train.recompute},
      {"train.recompute=block", MOE_RECOMPUTE_BLOCK, &c.train.recompute},
      {"train.aux_scope=sequence", MOE_AUX_SEQUENCE, &c.train.aux_scope},
      {"optim.schedule=wsd", MOE_SCHEDULE_WSD, &c.optim.schedule},
      {"optim.schedule=linear", MOE_SCHEDULE_LINEAR, &c.optim.schedule},
      {"optim.schedule=constant", MOE_SCHEDULE_CONSTANT, &c.optim.schedule},
      {"parallel.exchange=alltoall", MOE_EXCHANGE_ALLTOALL, &c.parallel.exchange},
      {"parallel.exchange=allgather", MOE_EXCHANGE_ALLGATHER, &c.parallel.exchange},
      {"precision.dtype=bf16", MOE_PRECISION_BF16, &c.precision.dtype},
      {"precision.dtype=fp16", MOE_PRECISION_FP16, &c.precision.dtype},
      {"run.backend=cuda", MOE_BACKEND_CUDA, &c.run.backend},
      {"run.backend=cpu", MOE_BACKEND_CPU, &c.run.backend},
  };
  moe_config_defaults(&c);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    cr_assert_eq(moe_config_set(&c, cases[i].assignment), MOE_OK, "%s", moe_error_message());
    cr_assert_eq(*cases[i].member, cases[i].value, "%s", cases[i].assignment);
  }
}

/* ---- printing ------------------------------------------------------------------------------ */

static uint64_t draw_state;

static uint64_t draw(void) {
  uint32_t w[4];
  moe_philox(2024, draw_state++, 0, w);
  return (uint64_t)w[0] << 32 | w[1];
}

static void draw_text(char *text) {
  static const char bytes[] = "abcXYZ019/._-:,=[] ;#\"'\\|%$ \xc3\xa9\xff";
  size_t length = draw() % 4 ? draw() % 40 : draw() % MOE_CONFIG_TEXT, n = 0;
  while (n < length) {
    char byte = bytes[draw() % (sizeof bytes - 1)];
    bool edge = n == 0 || n + 1 == length;
    if (byte == ' ' && edge) continue;
    if ((byte == ';' || byte == '#') && (n == 0 || text[n - 1] == ' ')) continue;
    text[n++] = byte;
  }
  text[n] = '\0';
}

static void draw_value(int i) {
  const moe_config_row *row = &moe_config_rows[i];
  void *member = moe_config_member_of(&c, i);
  char choice[MOE_CONFIG_TEXT];
  int choices = 0;
  switch (row->kind) {
  case MOE_ROW_INT:
    *(int64_t *)member =
        row->int_min + (int64_t)(draw() % (uint64_t)(row->int_max - row->int_min + 1));
    break;
  case MOE_ROW_REAL: {
    double at = (double)(draw() >> 11) * 0x1p-53;
    *(double *)member = row->real_min + at * (row->real_max - row->real_min);
    break;
  }
  case MOE_ROW_BOOL:
    *(bool *)member = draw() % 2;
    break;
  case MOE_ROW_TEXT:
    draw_text(member);
    break;
  case MOE_ROW_ENUM:
    while (moe_config_choice(row->choices, choices, choice)) choices++;
    *(int *)member = (int)(draw() % (uint64_t)choices);
    break;
  }
}

Test(config, every_configuration_reads_back_from_its_print) {
  for (int trial = 0; trial < 300; trial++) {
    moe_config_defaults(&c);
    for (int i = 0; i < moe_config_row_count; i++)
      if (draw() % 2) draw_value(i);
    char *text = moe_config_text(&c);
    cr_assert_not_null(text);

    static moe_config back;
    moe_config_defaults(&back);
    read_text(&back, text);
    memset(back.origin, 0, sizeof back.origin);
    cr_assert_arr_eq(&back, &c, sizeof c, "%s", text);
    char *again = moe_config_text(&back);
    cr_assert_str_eq(again, text);
    free(text);
    free(again);
  }
}

Test(config, a_resolved_print_resolves_to_itself) {
  for (int preset = 0; preset < 4; preset++) {
    moe_config_defaults(&c);
    c.model.preset = preset;
    resolve(&c, 8);
    char *text = moe_config_text(&c);
    static moe_config back;
    moe_config_defaults(&back);
    read_text(&back, text);
    resolve(&back, 8);
    char *again = moe_config_text(&back);
    cr_assert_str_eq(again, text);
    free(text);
    free(again);
  }
}

Test(config, markdown_has_every_key) {
  char *text = NULL;
  size_t length = 0;
  FILE *out = open_memstream(&text, &length);
  moe_config_print_markdown(out);
  fclose(out);
  for (int i = 0; i < moe_config_row_count; i++) {
    char cell[128];
    snprintf(cell, sizeof cell, "| `%s` |", moe_config_rows[i].key);
    cr_assert_not_null(strstr(text, cell), "%s", cell);
    cr_assert_not_null(strstr(text, moe_config_rows[i].section));
  }
  free(text);
}

/* ---- resuming ------------------------------------------------------------------------------ */

Test(config, resume_compares_what_decides_the_run) {
  static moe_config saved;
  moe_config_defaults(&saved);
  resolve(&saved, 2);
  c = saved;
  char *text = NULL;
  size_t length = 0;
  FILE *out = open_memstream(&text, &length);
  c.model.preset = 0; /* only a source of defaults */
  c.train.steps *= 2;
  c.parallel.ep = 1;
  snprintf(c.run.dir, sizeof c.run.dir, "elsewhere");
  cr_assert_eq(moe_config_diff_for_resume(&saved, &c, out), 0);
  c.train.seed = 99;
  c.model.rope_base = 5e5;
  c.train.aux_scope = MOE_AUX_SEQUENCE;
  cr_assert_eq(moe_config_diff_for_resume(&saved, &c, out), 3);
  fclose(out);
  cr_assert_str_eq(text, "model.rope_base: saved 10000, now 500000\n"
                         "train.seed: saved 1234, now 99\n"
                         "train.aux_scope: saved batch, now sequence\n");
  free(text);
}
