/* Checkpoints as GGUF files: what is in them, that they read back, and what is refused. */
#include <math.h>

#include "checkpoint/files.h"
#include "checkpoint/gguf_export.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

TestSuite(gguf_export, .init = open_world, .fini = close_world, .timeout = 120);

enum { SEED = 5 };
static char out[128];

static moe_gguf_options exporting(int type) {
  snprintf(out, sizeof out, "%s/m.gguf", run);
  return (moe_gguf_options){.common = {.checkpoint = in_step(1, ""),
                                       .out = out,
                                       .dtype = MOE_EXPORT_RUN_DTYPE,
                                       .tokenizer = "none"},
                            .type = type};
}

/* Save the model with other sizes (NULL: its own) and export it. */
static void make_export(int groups, int precision, int type, const char *const *sizes) {
  moe_config *c = model_config(groups, precision);
  for (; sizes && *sizes; sizes++) EXPECT_OK(moe_config_set(c, *sizes));
  EXPECT_OK(moe_config_resolve(c, 1));
  save_model(c, SEED, 1);
  free(c);
  moe_gguf_options o = exporting(type);
  EXPECT_OK(moe_export_gguf(&o));
}

/* Every tensor read back is the test's values, encoded and decoded. */
static void expect_file_values(moe_ggml_type type) {
  moe_weights *w;
  EXPECT_OK(moe_weights_open_gguf(out, &w));
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    float *expected = model_values(p, SEED), *got = malloc((size_t)p->count * sizeof *got);
    moe_ggml_type kept = moe_gguf_param_type(p, type);
    void *raw = malloc((size_t)p->count * sizeof(float));
    moe_ggml_encode(kept, expected, p->count, raw);
    moe_ggml_decode(kept, raw, p->count, expected);
    EXPECT_OK(moe_weights_read(w, p, 0, p->count, got));
    cr_assert_arr_eq(got, expected, (size_t)p->count * sizeof *got, "%s", p->name);
    /* and in parts that begin and end within rows and blocks */
    for (int64_t at = 0, n = 1; at < p->count; at += n, n = 1 + (7 * n + 3) % 50) {
      if (n > p->count - at) n = p->count - at;
      EXPECT_OK(moe_weights_read(w, p, at, n, got));
      cr_assert_arr_eq(got, expected + at, (size_t)n * sizeof *got, "%s", p->name);
    }
    free(raw);
    free(expected);
    free(got);
  }
  moe_weights_close(w);
}

static int count_like(const char *pattern) {
  moe_command c = moe_command_run(20, "ls -d %s/%s 2>/dev/null | wc -l", run, pattern);
  int n = atoi(c.output);
  moe_command_free(&c);
  return n;
}

/* ---- values ---- */

Test(gguf_export, fp32_comes_back_bit_for_bit) {
  make_export(2, MOE_PRECISION_FP32, MOE_GGUF_RUN_TYPE, NULL);
  expect_file_values(MOE_GGML_F32);
  cr_assert_eq(count_like("m*"), 1, "something is left beside it");
}

Test(gguf_export, a_bf16_run_leaves_in_bf16_with_one_key_value_head) {
  make_export(1, MOE_PRECISION_BF16, MOE_GGUF_RUN_TYPE, NULL);
  expect_file_values(MOE_GGML_BF16);
}

Test(gguf_export, fp16_rounds_once) {
  make_export(2, MOE_PRECISION_BF16, MOE_GGML_F16, NULL);
  expect_file_values(MOE_GGML_F16);
}

static const char *const blocks[] = {"model.hidden_size=64", "model.ffn_size=96",
                                     "model.head_dim=16", NULL};

Test(gguf_export, q8_0_comes_back_as_what_its_blocks_say) {
  make_export(2, MOE_PRECISION_FP32, MOE_GGML_Q8_0, blocks);
  expect_file_values(MOE_GGML_Q8_0);
}

Test(gguf_export, q8_0_keeps_rows_that_are_not_whole_blocks_in_fp16) {
  make_export(2, MOE_PRECISION_FP32, MOE_GGML_Q8_0, NULL);
  expect_file_values(MOE_GGML_Q8_0);
  moe_gguf *g;
  EXPECT_OK(moe_gguf_open(out, &g));
  cr_assert_eq(moe_gguf_tensor_find(g, "output.weight")->type, MOE_GGML_F16);
  cr_assert_eq(moe_gguf_tensor_find(g, "blk.2.ffn_gate_inp.weight")->type, MOE_GGML_F32);
  moe_gguf_close(g);
}

/* ---- llama.cpp's layout, by its own definition ---- */

/* convert_hf_to_gguf: reshape(heads, 2, d/2, D).swapaxes(1, 2). */
static void expect_exchanged(const moe_gguf *g, const char *name, const float *ours, int heads) {
  enum { HEAD = 10, COLUMNS = 24 };
  const moe_gguf_tensor *t = moe_gguf_tensor_find(g, name);
  cr_assert(t && t->ne[0] == COLUMNS && t->ne[1] == heads * HEAD);
  float *x = malloc((size_t)t->bytes);
  EXPECT_OK(moe_gguf_read(g, t, 0, t->elements, x));
  for (int h = 0; h < heads; h++)
    for (int half = 0; half < 2; half++)
      for (int j = 0; j < HEAD / 2; j++)
        cr_assert_arr_eq(x + (h * HEAD + 2 * j + half) * COLUMNS,
                         ours + (h * HEAD + half * (HEAD / 2) + j) * COLUMNS, COLUMNS * 4, "%s",
                         name);
  free(x);
}

Test(gguf_export, rotary_rows_and_merged_experts_are_where_llama_cpp_looks) {
  make_export(2, MOE_PRECISION_FP32, MOE_GGML_F32, NULL);
  moe_gguf *g;
  moe_weights *w;
  EXPECT_OK(moe_gguf_open(out, &g));
  EXPECT_OK(moe_weights_open_checkpoint(in_step(1, ""), &w));
  const struct {
    const char *ours, *theirs;
    int heads;
  } rotary[] = {{"model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight", 6},
                {"model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight", 2}};
  for (int i = 0; i < 2; i++) {
    float *values = model_values(moe_params_find(&w->params, rotary[i].ours), SEED);
    expect_exchanged(g, rotary[i].theirs, values, rotary[i].heads);
    free(values);
  }
  const moe_gguf_tensor *down = moe_gguf_tensor_find(g, "blk.2.ffn_down_exps.weight");
  cr_assert(down && down->dims == 3 && down->ne[0] == 14 && down->ne[1] == 24 && down->ne[2] == 5);
  float got[14 * 24];
  EXPECT_OK(moe_gguf_read(g, down, 3 * 14 * 24, 14 * 24, got));
  float *expert = model_values(
      moe_params_find(&w->params, "model.layers.2.block_sparse_moe.experts.3.w2.weight"), SEED);
  cr_assert_arr_eq(got, expert, sizeof got);
  free(expert);
  moe_weights_close(w);
  moe_gguf_close(g);
}

Test(gguf_export, alpha_is_folded_into_the_rotary_base_and_lengthens_the_context) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, SEED, 1);
  free(c);
  moe_gguf_options o = exporting(MOE_GGML_F32);
  o.common.alpha = 8.0;
  EXPECT_OK(moe_export_gguf(&o));
  moe_weights *w;
  EXPECT_OK(moe_weights_open_gguf(out, &w));
  cr_assert_float_eq(w->rope_base, 500.0 * pow(8.0, 10.0 / 8.0), 1e-3);
  cr_assert_eq(w->context, 320);
  moe_weights_close(w);
}

/* ---- the tokenizer ---- */

Test(gguf_export, the_bytes_tokenizer_fills_the_vocabulary) {
  static const char *const sizes[] = {"model.vocab_size=300", NULL};
  make_export(2, MOE_PRECISION_FP32, MOE_GGML_F32, sizes);
  moe_gguf_options o = exporting(MOE_GGML_F32);
  o.common.tokenizer = "bytes";
  o.common.overwrite = true;
  EXPECT_OK(moe_export_gguf(&o));
  moe_gguf *g;
  moe_gguf_entry tokens, types;
  int64_t eos;
  char *model;
  EXPECT_OK(moe_gguf_open(out, &g));
  cr_assert(moe_gguf_find(g, "tokenizer.ggml.tokens", &tokens) && tokens.count == 300);
  cr_assert(moe_gguf_find(g, "tokenizer.ggml.token_type", &types) && types.count == 300);
  EXPECT_OK(moe_gguf_int(g, "tokenizer.ggml.eos_token_id", &eos));
  EXPECT_OK(moe_gguf_text(g, "tokenizer.ggml.model", &model));
  cr_assert(eos == 3 && strcmp(model, "llama") == 0);
  int32_t kind[300];
  memcpy(kind, types.data, sizeof kind);
  cr_assert(kind[2] == 3 && kind[1] == 2 && kind[4] == 6 && kind[4 + ' '] == 1 && kind[299] == 5);
  free(model);
  moe_gguf_close(g);
}

/* The vocabulary of a seed model of tests/fuzz in a file of its own. */
static moe_gguf *vocab_of(const char *model, moe_gguf_vocab kind) {
  moe_tokenizer *t;
  moe_gguf_writer *w;
  moe_gguf *g;
  char name[512];
  snprintf(name, sizeof name, "%s/tests/fuzz/seeds/tokenizer/%s", MOE_SOURCE_DIR, model);
  snprintf(out, sizeof out, "%s/%s-%d.gguf", run, model, (int)kind);
  EXPECT_OK(moe_tokenizer_open(name, &t));
  EXPECT_OK(moe_gguf_writer_create(&w));
  EXPECT_OK(moe_gguf_put_vocab(w, t, moe_tokenizer_vocab_size(t) + 2, kind));
  EXPECT_OK(moe_gguf_writer_open(w, out));
  EXPECT_OK(moe_gguf_writer_finish(w));
  moe_gguf_writer_destroy(w);
  moe_tokenizer_close(t);
  EXPECT_OK(moe_gguf_open(out, &g));
  return g;
}

/* The type of the token with this text, 0 when there is none; there is at most one. */
static int type_of(const moe_gguf *g, const char *text) {
  moe_gguf_entry tokens, types;
  int32_t type = 0;
  cr_assert(moe_gguf_find(g, "tokenizer.ggml.tokens", &tokens) &&
            moe_gguf_find(g, "tokenizer.ggml.token_type", &types) && types.count == tokens.count);
  const char *at = tokens.data;
  for (int64_t i = 0; i < tokens.count; i++) {
    uint64_t length;
    memcpy(&length, at, sizeof length);
    at += sizeof length;
    if (length == strlen(text) && memcmp(at, text, length) == 0) {
      cr_assert_eq(type, 0, "\"%s\" is there twice", text);
      memcpy(&type, (const char *)types.data + i * 4, sizeof type);
    }
    at += length;
  }
  return type;
}

static void expect_vocab(const char *model, moe_gguf_vocab kind, const char *algorithm) {
  char *text;
  moe_gguf *g = vocab_of(model, kind);
  EXPECT_OK(moe_gguf_text(g, "tokenizer.ggml.model", &text));
  cr_assert_str_eq(text, algorithm);
  bool spelled = strcmp(algorithm, "t5") == 0;
  cr_assert_eq(type_of(g, "\n"), spelled ? 1 : 0);
  cr_assert_eq(type_of(g, "<0x0A>"), spelled ? 0 : 6);
  cr_assert_eq(type_of(g, "<0xFF>"), 6);
  cr_assert_eq(type_of(g, "<eos>"), 3);
  cr_assert_eq(type_of(g, "<unk>"), 2);
  free(text);
  moe_gguf_close(g);
}

Test(gguf_export, each_kind_of_tokenizer_asks_for_the_algorithm_that_gives_its_tokens) {
  expect_vocab("unigram", MOE_GGUF_VOCAB_AUTO, "t5");
  expect_vocab("unigram", MOE_GGUF_VOCAB_LLAMA, "llama");
  expect_vocab("bpe", MOE_GGUF_VOCAB_AUTO, "llama");
}

Test(gguf_export, a_tokenizer_larger_than_the_model_is_refused) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, SEED, 1);
  free(c);
  moe_gguf_options o = exporting(MOE_GGML_F32);
  o.common.tokenizer = "bytes"; /* 260 pieces, the model has 101 tokens */
  cr_assert_eq(moe_export_gguf(&o), MOE_USAGE);
  EXPECT_SAYS("--tokenizer");
  cr_assert_eq(count_like("m*"), 0);
}

/* ---- what fails leaves nothing ---- */

Test(gguf_export, failures_leave_nothing_and_what_was_there) {
  make_export(2, MOE_PRECISION_FP32, MOE_GGML_F32, NULL);
  moe_gguf_options o = exporting(MOE_GGML_F16);
  cr_assert_eq(moe_export_gguf(&o), MOE_USAGE);
  EXPECT_SAYS("--overwrite");
  volatile sig_atomic_t stop = 1;
  o.common.overwrite = true;
  o.common.stop = &stop;
  cr_assert_eq(moe_export_gguf(&o), MOE_STOPPED);
  expect_file_values(MOE_GGML_F32);
  cr_assert_eq(count_like("m*"), 1);
}

Test(gguf_export, a_value_beyond_the_range_of_fp16_is_no_infinity_in_the_file) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, SEED, &n);
  ((float *)pieces[0].data)[3] = 70000.0f;
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  moe_gguf_options o = exporting(MOE_GGML_F16);
  cr_assert_eq(moe_export_gguf(&o), MOE_FAILED);
  EXPECT_SAYS(pieces[0].name);
  cr_assert_eq(count_like("m*"), 0);
}

Test(gguf_export, quantisation_that_changes_the_model_too_much_is_refused) {
  /* one outlier per block leaves the others a few steps: the logits are far off */
  static const char *const sizes[] = {"model.hidden_size=64", "model.ffn_size=96", NULL};
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  for (int i = 0; sizes[i]; i++) EXPECT_OK(moe_config_set(c, sizes[i]));
  int n;
  moe_piece *pieces = model_pieces(c, SEED, &n);
  for (int i = 0; i < n; i++) {
    float *x = pieces[i].data;
    bool down = strstr(pieces[i].name, ".w2.") || strstr(pieces[i].name, "lm_head");
    for (int64_t k = 0; down && pieces[i].role == MOE_ROLE_PARAM && k < pieces[i].count; k++)
      x[k] = k % 32 == 0 ? (k / 32 % 2 ? 3e4f : -3e4f) : 100.0f * x[k];
  }
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  moe_gguf_options o = exporting(MOE_GGML_Q8_0);
  cr_assert_eq(moe_export_gguf(&o), MOE_FAILED);
  EXPECT_SAYS("choose a wider type");
  cr_assert_eq(count_like("m*"), 0);
}

/* ---- files of others ---- */

/* The export with the `n` bytes `skip` after the first `text` replaced is refused. */
static void refused(const char *text, int skip, const void *with, size_t n, moe_status code,
                    const char *says) {
  char bad[160], *data;
  int64_t size;
  moe_weights *w = NULL;
  EXPECT_OK(moe_files_read(out, 1 << 24, &data, &size));
  char *at = memmem(data, (size_t)size, text, strlen(text));
  cr_assert(at, "%s is not in the file", text);
  memcpy(at + strlen(text) + skip, with, n);
  snprintf(bad, sizeof bad, "%s.bad", out);
  EXPECT_OK(moe_files_replace(bad, data, size));
  cr_assert_eq(moe_weights_open_gguf(bad, &w), code, "%s: %s", text, moe_error_message());
  EXPECT_SAYS(says);
  free(data);
}

/* The value of a key that is an integer or a real of 4 bytes. */
static void refused_value(const char *key, uint32_t value, moe_status code, const char *says) {
  refused(key, 4, &value, sizeof value, code, says);
}

Test(gguf_export, files_whose_keys_contradict_their_tensors_are_refused) {
  make_export(2, MOE_PRECISION_FP32, MOE_GGML_F32, NULL);
  refused_value("llama.expert_count", INT32_MAX, MOE_DAMAGED, "llama.expert_count");
  refused_value("llama.expert_count", 6, MOE_DAMAGED, "ffn_gate_inp");
  refused("llama.expert_count", 0, "\6", 1, MOE_DAMAGED, "llama.expert_count"); /* its type */
  refused_value("llama.expert_used_count", 6, MOE_DAMAGED, "expert_used_count");
  refused_value("llama.block_count", 0, MOE_DAMAGED, "block_count");
  refused_value("llama.block_count", 4, MOE_DAMAGED, "blk.3");
  refused_value("llama.block_count", 4096, MOE_DAMAGED, "fewer tensors than layers");
  refused_value("llama.attention.head_count", 7, MOE_DAMAGED, "impossible");
  refused_value("llama.attention.key_length", 12, MOE_USAGE, "one size");
  refused_value("llama.embedding_length", 32, MOE_DAMAGED, "is [24, 101");
  refused_value("llama.rope.freq_base", 0x7fc00000, MOE_DAMAGED, "rotary base");
  refused("general.architecture", 12, "llamb", 5, MOE_USAGE, "architecture");
  refused("output_norm.weigh", 0, "u", 1, MOE_DAMAGED, "output_norm.weight is missing");
  refused("blk.1.ffn_up_exps.weigh", 0, "u", 1, MOE_DAMAGED, "blk.1.ffn_up_exps.weight");
}
