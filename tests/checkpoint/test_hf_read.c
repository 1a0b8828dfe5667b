/* Folders that others wrote: other spellings of the same model, and what is refused. */
#include "checkpoint/safetensors.h"
#include "tests/checkpoint/hf.h"

TestSuite(hf_read, .init = open_world, .fini = close_world, .timeout = 300);

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
    EXPECT_OK(moe_safetensors_write(&writer, writer.size - writer.left, p->count * 4, values));
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
          EXPECT_OK(
              moe_safetensors_write(&writer, writer.size - writer.left, p->count * 4, values));
        }
  EXPECT_OK(moe_safetensors_finish(&writer));
  free(values);
}

Test(hf_read, experts_fused_by_layer_are_found) {
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

Test(hf_read, refuses_a_config_that_is_not_what_this_program_computes_or_its_files_hold) {
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

Test(hf_read, refuses_files_that_are_not_what_the_index_says) {
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
