/* Exports that read back as the checkpoint, imports that give it back, and what both refuse. */
#include <math.h>
#include <sys/stat.h>

#include "checkpoint/hf.h"
#include "checkpoint/hf_tokenizer.h"
#include "checkpoint/json.h"
#include "checkpoint/safetensors.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

TestSuite(hf, .init = open_world, .fini = close_world, .timeout = 300);

static char out[128], imported[128];

static moe_export_options exporting(int dtype) {
  snprintf(out, sizeof out, "%s/hf", run);
  snprintf(imported, sizeof imported, "%s/imported", run);
  return (moe_export_options){
      .checkpoint = in_step(1, ""), .out = out, .dtype = dtype, .tokenizer = "none"};
}

/* Save a model of this precision and export it. */
static void make_export(int groups, int precision, int dtype) {
  moe_config *c = model_config(groups, precision);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(dtype);
  EXPECT_OK(moe_export_hf(&o));
}

static void expect_export(moe_dtype dtype) {
  moe_weights *w;
  EXPECT_OK(moe_weights_open_hf(out, &w));
  expect_values(w, dtype);
  cr_assert_eq(w->dims.heads, 6);
  cr_assert_eq(w->dims.head_dim, 10);
  cr_assert_eq(w->context, 40);
  cr_assert_float_eq(w->norm_eps, 3e-5, 1e-12);
  cr_assert_float_eq(w->rope_base, 500.0, 1e-9);
  moe_weights_close(w);
}

static bool there(const char *folder, const char *name) {
  char path[256];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return stat(path, &st) == 0;
}

/* Names in the run's folder that begin so. */
static int count_like(const char *pattern) {
  moe_command c = moe_command_run(20, "ls -d %s/%s 2>/dev/null | wc -l", run, pattern);
  int n = atoi(c.output);
  moe_command_free(&c);
  return n;
}

/* ---- export ------------------------------------------------------------------------------------
 */

Test(hf, an_fp32_export_holds_the_checkpoint_bit_for_bit) {
  make_export(2, MOE_PRECISION_FP32, MOE_EXPORT_RUN_DTYPE);
  expect_export(MOE_F32);
}

Test(hf, a_bf16_export_holds_the_params_the_run_computes_with) {
  make_export(1, MOE_PRECISION_BF16, MOE_EXPORT_RUN_DTYPE);
  expect_export(MOE_BF16);
}

Test(hf, a_bf16_run_can_leave_with_its_fp32_masters) {
  make_export(2, MOE_PRECISION_BF16, MOE_F32);
  expect_export(MOE_F32);
}

Test(hf, an_fp16_export_rounds_once) {
  make_export(2, MOE_PRECISION_BF16, MOE_F16);
  expect_export(MOE_F16);
}

Test(hf, an_export_leaves_nothing_beside_it) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  cr_assert_eq(count_like("hf*"), 1);
  cr_assert(there(out, "config.json") && there(out, "generation_config.json") &&
            there(out, "README.md") && there(out, "model.safetensors"));
  cr_assert(!there(out, "model.safetensors.index.json"));
}

Test(hf, a_large_model_is_cut_into_files_with_an_index) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.shard_bytes = 20000;
  EXPECT_OK(moe_export_hf(&o));
  expect_export(MOE_F32);
  cr_assert(there(out, "model.safetensors.index.json"));
  cr_assert_gt(count_like("hf/model-*"), 3);
  SHELL("test -z \"$(find %s -name 'model-*' -size +22k)\"", out); /* header and data */
}

Test(hf, alpha_is_folded_into_the_rotary_base_and_lengthens_the_context) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.alpha = 8.0;
  EXPECT_OK(moe_export_hf(&o));
  moe_weights *w;
  EXPECT_OK(moe_weights_open_hf(out, &w));
  cr_assert_float_eq(w->rope_base, 500.0 * pow(8.0, 10.0 / 8.0), 1e-6);
  cr_assert_eq(w->context, 320);
  moe_weights_close(w);
}

Test(hf, an_output_that_exists_is_kept_unless_it_may_be_replaced) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  SHELL("echo mine >%s/mine", out);
  moe_export_options o = exporting(MOE_BF16);
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("--overwrite");
  expect_export(MOE_F32);
  o.overwrite = true;
  EXPECT_OK(moe_export_hf(&o));
  expect_export(MOE_BF16);
  cr_assert(!there(out, "mine"));
  cr_assert_eq(count_like("hf*"), 1);
}

Test(hf, a_folder_that_is_no_export_is_never_replaced) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.overwrite = true;
  SHELL("mkdir %s && echo mine >%s/mine", out, out);
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("no export to replace");
  cr_assert(there(out, "mine"));
}

Test(hf, a_stopped_export_leaves_nothing) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  volatile sig_atomic_t stop = 1;
  moe_export_options o = exporting(MOE_F32);
  o.stop = &stop;
  cr_assert_eq(moe_export_hf(&o), MOE_STOPPED);
  cr_assert_eq(count_like("hf*"), 0);
}

Test(hf, a_value_beyond_the_range_of_fp16_is_no_infinity_in_the_export) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  ((float *)pieces[0].data)[3] = 70000.0f;
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  moe_export_options o = exporting(MOE_F16);
  cr_assert_eq(moe_export_hf(&o), MOE_FAILED);
  EXPECT_SAYS(pieces[0].name);
  cr_assert_eq(count_like("hf*"), 0);
  o.dtype = MOE_BF16;
  EXPECT_OK(moe_export_hf(&o));
}

Test(hf, a_router_bias_is_not_lost_in_silence) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  float bias[15] = {0.5f};
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  state.router_bias = bias;
  state.router_bias_count = 15;
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  moe_export_options o = exporting(MOE_F32);
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("--drop-router-bias");
  o.drop_router_bias = true;
  EXPECT_OK(moe_export_hf(&o));
}

/* ---- tokenizers ---- */

Test(hf, a_tokenizer_of_more_pieces_than_the_vocabulary_is_refused) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.tokenizer = "bytes";
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("260 pieces");
  cr_assert_eq(count_like("hf*"), 0);
}

/* tokenizer.json of a SentencePiece model, written into the run's folder. */
static cJSON *tokenizer_json(const char *name) {
  char path[256];
  moe_tokenizer *t;
  cJSON *root;
  snprintf(path, sizeof path, MOE_SOURCE_DIR "/tests/fuzz/seeds/tokenizer/%s", name);
  EXPECT_OK(moe_tokenizer_open(path, &t));
  EXPECT_OK(moe_hf_tokenizer_write(t, path, 40, run));
  moe_tokenizer_close(t);
  SHELL("cmp %s %s/tokenizer.model", path, run);
  cr_assert(there(run, "tokenizer_config.json") && there(run, "special_tokens_map.json"));
  snprintf(path, sizeof path, "%s/tokenizer.json", run);
  EXPECT_OK(moe_json_read(path, 1 << 20, &root));
  return root;
}

Test(hf, merges_of_a_bpe_tokenizer_make_its_pieces_best_first) {
  cJSON *root = tokenizer_json("bpe");
  const cJSON *model = moe_json_member(root, "model"), *merge;
  const cJSON *vocab = moe_json_member(model, "vocab");
  double last = 0.0; /* pieces are numbered by score */
  int merges = 0;
  cJSON_ArrayForEach(merge, moe_json_member(model, "merges")) {
    char made[128];
    snprintf(made, sizeof made, "%s%s", cJSON_GetArrayItem(merge, 0)->valuestring,
             cJSON_GetArrayItem(merge, 1)->valuestring);
    const cJSON *id = moe_json_member(vocab, made);
    cr_assert(cJSON_IsNumber(id), "%s is no piece", made);
    cr_assert_geq(id->valuedouble, last);
    last = id->valuedouble;
    merges++;
  }
  cr_assert_eq(merges, 5); /* er, _e, es, ou, to: each of two characters */
  cJSON_Delete(root);
}

Test(hf, a_unigram_tokenizer_keeps_its_pieces_and_scores) {
  cJSON *root = tokenizer_json("unigram");
  const cJSON *vocab = moe_json_member(moe_json_member(root, "model"), "vocab");
  moe_tokenizer *t;
  EXPECT_OK(moe_tokenizer_open(MOE_SOURCE_DIR "/tests/fuzz/seeds/tokenizer/unigram", &t));
  cr_assert_eq(cJSON_GetArraySize(vocab), moe_tokenizer_vocab_size(t));
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(t); id++) {
    const cJSON *piece = cJSON_GetArrayItem(vocab, id);
    cr_assert_str_eq(cJSON_GetArrayItem(piece, 0)->valuestring, moe_tokenizer_piece(t, id));
    cr_assert_eq((float)cJSON_GetArrayItem(piece, 1)->valuedouble,
                 moe_tokenizer_piece_score(t, id));
  }
  moe_tokenizer_close(t);
  cJSON_Delete(root);
}

/* ---- round trip --------------------------------------------------------------------------------
 */

static void round_trip(int groups, int precision) {
  make_export(groups, precision, MOE_EXPORT_RUN_DTYPE);
  exporting(0);
  moe_import_options o = {.folder = out, .run_dir = imported, .dtype = MOE_EXPORT_RUN_DTYPE};
  EXPECT_OK(moe_import_hf(world, &o));
  char step[192];
  snprintf(step, sizeof step, "%s/checkpoints/step-00000000", imported);
  moe_weights *w;
  EXPECT_OK(moe_weights_open_checkpoint(step, &w));
  moe_dtype dtype = precision == MOE_PRECISION_FP32 ? MOE_F32 : MOE_BF16;
  expect_values(w, dtype);
  for (int i = 0; i < w->params.count; i++) /* in the same types, so the same bits */
    cr_assert_eq(moe_weights_dtype(w, &w->params.list[i]),
                 moe_pool_dtype(w->params.list[i].row->pool, dtype));
  bool moments;
  EXPECT_OK(moe_checkpoint_has_role(step, MOE_ROLE_ADAM_M, &moments));
  cr_assert(!moments);
  moe_weights_close(w);
}

Test(hf, fp32_weights_come_back_bit_for_bit) {
  round_trip(2, MOE_PRECISION_FP32);
}
Test(hf, bf16_weights_come_back_bit_for_bit) {
  round_trip(1, MOE_PRECISION_BF16);
}

Test(hf, fp32_files_become_the_masters_of_a_bf16_run) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  exporting(0);
  moe_import_options o = {.folder = out, .run_dir = imported, .step = 7, .dtype = MOE_BF16};
  EXPECT_OK(moe_import_hf(world, &o));
  char step[192];
  snprintf(step, sizeof step, "%s/checkpoints/step-00000007", imported);
  moe_weights *w;
  bool masters;
  EXPECT_OK(moe_weights_open_checkpoint(step, &w));
  EXPECT_OK(moe_checkpoint_has_role(step, MOE_ROLE_MASTER, &masters));
  cr_assert(masters);
  expect_values(w, MOE_F32);
  cr_assert_eq(w->compute, MOE_BF16);
  moe_weights_close(w);
}

Test(hf, a_run_with_checkpoints_is_not_imported_into) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  moe_import_options o = {.folder = out, .run_dir = run, .dtype = MOE_EXPORT_RUN_DTYPE};
  cr_assert_eq(moe_import_hf(world, &o), MOE_USAGE);
  EXPECT_SAYS("has checkpoints");
}

/* ---- other spellings of the same model ----------------------------------------------------------
 */

/* Write the model of save_model as one file whose experts are fused by layer. */
static void write_fused(const char *folder, moe_weights *w) {
  char path[192];
  const moe_dims *d = &w->dims;
  moe_safetensors_writer writer;
  moe_safetensors_entry entries[64];
  int n = 0;
  /* the writer knows two dimensions; a fused tensor is its rows */
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    if (p->expert >= 0) continue;
    entries[n] = (moe_safetensors_entry){.dtype = MOE_F32, .dims = p->dims};
    snprintf(entries[n].name, sizeof entries[n].name, "%s", p->name);
    memcpy(entries[n++].shape, p->shape, sizeof p->shape);
  }
  int dense = n;
  for (int64_t l = 0; l < d->layers; l++) {
    entries[n] = (moe_safetensors_entry){
        .dtype = MOE_F32, .dims = 2, .shape = {d->experts * 2 * d->ffn, d->hidden}};
    snprintf(entries[n++].name, 96, "model.layers.%d.mlp.experts.gate_up_proj", (int)l);
    entries[n] = (moe_safetensors_entry){
        .dtype = MOE_F32, .dims = 2, .shape = {d->experts * d->hidden, d->ffn}};
    snprintf(entries[n++].name, 96, "model.layers.%d.mlp.experts.down_proj", (int)l);
  }
  snprintf(path, sizeof path, "%s/flat.safetensors", folder);
  EXPECT_OK(moe_safetensors_create(path, entries, n, &writer));
  float *values = malloc(1 << 20);
  for (int i = 0; i < dense; i++) {
    const moe_param *p = moe_params_find(&w->params, entries[i].name);
    EXPECT_OK(moe_weights_read(w, p, 0, p->count, values));
    EXPECT_OK(moe_safetensors_append(&writer, values, p->count * 4));
  }
  for (int64_t l = 0; l < d->layers; l++)
    for (int down = 0; down < 2; down++)
      for (int64_t e = 0; e < d->experts; e++)
        for (int half = 0; half < (down ? 1 : 2); half++) {
          const char *pattern = down   ? "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight"
                                : half ? "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight"
                                       : "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight";
          const moe_param *p = moe_params_at(&w->params, pattern, l, e);
          EXPECT_OK(moe_weights_read(w, p, 0, p->count, values));
          EXPECT_OK(moe_safetensors_append(&writer, values, p->count * 4));
        }
  EXPECT_OK(moe_safetensors_finish(&writer));
  free(values);
}

Test(hf, experts_fused_by_layer_are_found) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  moe_weights *w;
  EXPECT_OK(moe_weights_open_hf(out, &w));
  write_fused(out, w);
  moe_weights_close(w);
  /* three dimensions, of the same number of digits plus a comma: the header has blanks to spare */
  SHELL("cd %s && python3 -c \"\n"
        "import json, struct\n"
        "raw = open('flat.safetensors', 'rb').read()\n"
        "n, = struct.unpack('<Q', raw[:8])\n"
        "h = json.loads(raw[8:8 + n])\n"
        "for k, t in h.items():\n"
        "  if 'gate_up' in k: t['shape'] = [5, 28, 24]\n"
        "  if 'down_proj' in k: t['shape'] = [5, 24, 14]\n"
        "text = json.dumps(h).encode()\n"
        "open('model.safetensors', 'wb').write(struct.pack('<Q', len(text)) + text + raw[8 + n:])\n"
        "\" && rm flat.safetensors",
        out);
  expect_export(MOE_F32);
}

/* ---- what is refused ----------------------------------------------------------------------------
 */

typedef struct {
  const char *change; /* Python over config.json as `c`, or a shell command in the folder */
  moe_status code;
  const char *says;
} refusal;

/* Each change, by itself, to the same export. */
static void expect_refusals(const char *wrap, const refusal *r, size_t n) {
  SHELL("cp -r %s %s.good", out, out);
  for (size_t i = 0; i < n; i++) {
    char command[1024];
    moe_weights *w = NULL;
    snprintf(command, sizeof command, wrap, r[i].change);
    SHELL("rm -r %s && cp -r %s.good %s && cd %s && %s", out, out, out, out, command);
    cr_expect_eq(moe_weights_open_hf(out, &w), r[i].code, "%s: %s", r[i].change,
                 moe_error_message());
    cr_expect(strstr(moe_error_message(), r[i].says), "%s: %s", r[i].change, moe_error_message());
    moe_weights_close(w);
  }
}

Test(hf, refuses_a_config_that_is_not_what_this_program_computes_or_its_files_hold) {
  static const refusal cases[] = {
      {"c['sliding_window'] = 4096", MOE_USAGE, "sliding_window"},
      {"c['tie_word_embeddings'] = True", MOE_USAGE, "tie_word_embeddings"},
      {"c['hidden_act'] = 'gelu'", MOE_USAGE, "hidden_act"},
      {"c['model_type'] = 'llama'", MOE_USAGE, "llama"},
      {"c['rope_scaling'] = {'type': 'yarn'}", MOE_USAGE, "rope_scaling"},
      {"c['rope_parameters']['rope_type'] = 'yarn'", MOE_USAGE, "rope_type"},
      {"c['quantization_config'] = {}", MOE_USAGE, "quantization_config"},
      {"c['rope_theta'] = 7.0", MOE_DAMAGED, "rope_theta"},
      {"del c['num_local_experts']", MOE_DAMAGED, "num_local_experts"},
      {"c['num_hidden_layers'] = 2.5", MOE_DAMAGED, "num_hidden_layers"},
      {"c['vocab_size'] = -1", MOE_DAMAGED, "vocab_size"},
      {"c['num_local_experts'] = 1 << 31", MOE_USAGE, "num_local_experts"},
      {"c['num_hidden_layers'] = 1 << 31", MOE_USAGE, "131072"},
      {"c['num_hidden_layers'] = 4", MOE_DAMAGED, "layers.3"},
      {"c['num_hidden_layers'] = 2", MOE_USAGE, "elements"},
      {"c['hidden_size'] = 32", MOE_DAMAGED, "shape"},
      {"c['num_experts_per_tok'] = 6", MOE_USAGE, "top_k"},
      {"c = [c]", MOE_DAMAGED, "not a JSON object"},
  };
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  expect_refusals("python3 -c \"import json; c = json.load(open('config.json')); %s; "
                  "json.dump(c, open('config.json', 'w'))\"",
                  cases, sizeof cases / sizeof cases[0]);
}

Test(hf, refuses_files_that_are_not_what_the_index_says) {
  static const refusal cases[] = {
      {"rm model-00002-*", MOE_DAMAGED, "is missing"},
      {"rm config.json", MOE_USAGE, "no such file"},
      {"truncate -s -100 model-00002-*", MOE_DAMAGED, "beyond the end"},
      {"echo more >>$(ls model-00002-*)", MOE_DAMAGED, "belong to no tensor"},
      {"sed -i 's|model-00002|/etc/model-00002|' *.index.json", MOE_DAMAGED,
       "not in a file of this folder"},
      {"sed -i '/model.norm.weight/d; s/\\(model.layers.2.*w2.weight.*\\),/\\1,/' *.index.json",
       MOE_DAMAGED, "tensors"},
      {"sed -i '/embed_tokens/s/model-00001/model-00002/' *.index.json", MOE_DAMAGED,
       "where the index has it"},
      {"echo '{' >model.safetensors.index.json", MOE_DAMAGED, "JSON"},
      {"rm model.safetensors.index.json", MOE_DAMAGED, "is missing"},
  };
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.shard_bytes = 30000;
  EXPECT_OK(moe_export_hf(&o));
  expect_refusals("%s", cases, sizeof cases / sizeof cases[0]);
}
