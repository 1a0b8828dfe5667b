/* config.json.
 *
 * Reading asks for everything that changes what the model computes and refuses what we do not
 * compute: a setting that was passed over would give a model that loads and is wrong. */
#include "checkpoint/hf_config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "checkpoint/json.h"
#include "data/tokenizer.h"

enum {
  CONFIG_LIMIT = 1 << 20, /* bytes of config.json */
  MOST_EXPERTS = 1 << 17  /* of all layers: each is three entries of a table */
};

/* ---- reading -----------------------------------------------------------------------------------
 */

static void refuse(moe_json_reader *r, const char *key, const char *what) {
  if (r->status == MOE_OK) r->status = moe_fail(MOE_USAGE, "%s: \"%s\" %s", r->where, key, what);
}

static void check_architecture(moe_json_reader *r, const cJSON *root) {
  const char *type = moe_json_text(r, root, "model_type");
  if (r->status == MOE_OK && strcmp(type, "mixtral") != 0)
    r->status = moe_fail(MOE_USAGE,
                         "%s: \"model_type\" is \"%.40s\": only mixtral has the layers that this "
                         "program trains",
                         r->where, type);
  const cJSON *act = moe_json_member(root, "hidden_act");
  if (act && !(cJSON_IsString(act) && strcmp(act->valuestring, "silu") == 0))
    refuse(r, "hidden_act", "is not \"silu\", the only activation this program has");
  if (moe_json_member(root, "sliding_window"))
    refuse(r, "sliding_window", "is set: attention here sees the whole sequence");
  if (cJSON_IsTrue(moe_json_member(root, "tie_word_embeddings")))
    refuse(r, "tie_word_embeddings", "is true: embedding and head are separate here");
  if (cJSON_IsTrue(moe_json_member(root, "attention_bias")))
    refuse(r, "attention_bias", "is true: projections have no bias here");
  if (moe_json_member(root, "rope_scaling"))
    refuse(r, "rope_scaling", "is set: only a plain rotary base is supported");
  if (moe_json_member(root, "quantization_config"))
    refuse(r, "quantization_config", "is set: give unquantised weights");
}

/* The older spelling is a member of the file, the newer one of "rope_parameters". */
static void read_theta(moe_json_reader *r, const cJSON *root, moe_hf_config *out) {
  const cJSON *rope = moe_json_member(root, "rope_parameters");
  const cJSON *type = moe_json_member(rope, "rope_type");
  if (!type) type = moe_json_member(rope, "type");
  if (type && !(cJSON_IsString(type) && strcmp(type->valuestring, "default") == 0))
    refuse(r, "rope_parameters", "has a rope_type other than \"default\"");
  const cJSON *partial = moe_json_member(rope, "partial_rotary_factor");
  if (partial && !(cJSON_IsNumber(partial) && partial->valuedouble == 1.0))
    refuse(r, "partial_rotary_factor", "is not 1: whole heads are rotated here");
  bool newer = moe_json_member(rope, "rope_theta") != NULL;
  out->theta = moe_json_positive(r, newer ? rope : root, "rope_theta");
  if (newer && moe_json_member(root, "rope_theta") &&
      moe_json_positive(r, root, "rope_theta") != out->theta)
    moe_json_fault(r, "rope_theta", "differs from that of rope_parameters");
}

static moe_dtype read_dtype(moe_json_reader *r, const cJSON *root) {
  const char *key = moe_json_member(root, "dtype") ? "dtype" : "torch_dtype";
  if (!moe_json_member(root, key)) return MOE_F32;
  const char *name = moe_json_text(r, root, key);
  if (strcmp(name, "float32") == 0) return MOE_F32;
  if (strcmp(name, "bfloat16") == 0) return MOE_BF16;
  if (strcmp(name, "float16") != 0) refuse(r, key, "is not float32, bfloat16 or float16");
  return MOE_F16;
}

static void read_sizes(moe_json_reader *r, const cJSON *root, moe_hf_config *out) {
  moe_dims *d = &out->dims;
  int64_t most = 1LL << 32; /* the settings' own limits are checked when they are applied */
  d->vocab = moe_json_int(r, root, "vocab_size", 1, most);
  d->hidden = moe_json_int(r, root, "hidden_size", 1, most);
  d->ffn = moe_json_int(r, root, "intermediate_size", 1, most);
  d->layers = moe_json_int(r, root, "num_hidden_layers", 1, most);
  d->heads = moe_json_int(r, root, "num_attention_heads", 1, most);
  d->kv_heads = moe_json_int(r, root, "num_key_value_heads", 1, most);
  d->experts = moe_json_int(r, root, "num_local_experts", 1, most);
  d->top_k = moe_json_int(r, root, "num_experts_per_tok", 1, most);
  if (moe_json_member(root, "head_dim"))
    d->head_dim = moe_json_int(r, root, "head_dim", 1, most);
  else if (d->hidden % d->heads == 0)
    d->head_dim = d->hidden / d->heads;
  else
    moe_json_fault(r, "head_dim", "is missing, and hidden_size is no multiple of the heads");
  out->context = moe_json_int(r, root, "max_position_embeddings", 1, most);
  out->norm_eps = moe_json_positive(r, root, "rms_norm_eps");
  if (r->status == MOE_OK && d->layers > MOST_EXPERTS / d->experts)
    refuse(r, "num_local_experts", "times the layers is more than this program lists (131072)");
}

moe_status moe_hf_config_parse(const char *text, int64_t length, const char *where,
                               moe_hf_config *out) {
  cJSON *root;
  *out = (moe_hf_config){.init_std = 0.02, .aux_coef = 0.01, .special = {-1, -1, -1, -1}};
  MOE_TRY(moe_json_parse(text, length, where, &root));
  moe_json_reader r = {where, MOE_OK};
  check_architecture(&r, root);
  read_sizes(&r, root, out);
  read_theta(&r, root, out);
  out->dtype = read_dtype(&r, root);
  const cJSON *std = moe_json_member(root, "initializer_range");
  const cJSON *aux = moe_json_member(root, "router_aux_loss_coef");
  if (cJSON_IsNumber(std) && std->valuedouble >= 0.0 && std->valuedouble <= 10.0)
    out->init_std = std->valuedouble;
  if (cJSON_IsNumber(aux) && aux->valuedouble >= 0.0 && aux->valuedouble <= 100.0)
    out->aux_coef = aux->valuedouble;
  cJSON_Delete(root);
  return r.status;
}

moe_status moe_hf_config_read(const char *path, moe_hf_config *out) {
  char *text;
  int64_t length;
  MOE_TRY(moe_files_read(path, CONFIG_LIMIT, &text, &length));
  moe_status status = moe_hf_config_parse(text, length, path, out);
  free(text);
  return status;
}

static moe_status set(moe_config *c, const char *key, double value, const char *where) {
  char assignment[96];
  snprintf(assignment, sizeof assignment, "model.%s=%.17g", key, value);
  if (moe_config_set(c, assignment) == MOE_OK) return MOE_OK;
  return moe_fail(MOE_USAGE, "%s: %s", where, moe_error_message());
}

/* By name, through the parser: so the table's limits hold for what a file says, too. */
moe_status moe_hf_config_apply(const moe_hf_config *h, const char *where, moe_config *c) {
  const moe_dims *d = &h->dims;
  const struct {
    const char *key;
    double value;
  } settings[] = {
      {"vocab_size", (double)d->vocab},
      {"hidden_size", (double)d->hidden},
      {"num_layers", (double)d->layers},
      {"num_heads", (double)d->heads},
      {"num_kv_heads", (double)d->kv_heads},
      {"head_dim", (double)d->head_dim},
      {"num_experts", (double)d->experts},
      {"top_k", (double)d->top_k},
      {"ffn_size", (double)d->ffn},
      {"context", (double)h->context},
      {"norm_eps", h->norm_eps},
      {"rope_base", h->theta},
      {"rope_alpha", 1.0},
      {"init_std", h->init_std},
  };
  for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
    MOE_TRY(set(c, settings[i].key, settings[i].value, where));
  c->precision.dtype = h->dtype == MOE_F32    ? MOE_PRECISION_FP32
                       : h->dtype == MOE_BF16 ? MOE_PRECISION_BF16
                                              : MOE_PRECISION_FP16;
  c->train.aux_coef = h->aux_coef;
  if (moe_config_resolve(c, 0) == MOE_OK) return MOE_OK;
  return moe_fail(MOE_USAGE, "%s: %s", where, moe_error_message());
}

/* ---- writing -----------------------------------------------------------------------------------
 */

/* A number that Python reads as a float. */
static void put_real(FILE *out, const char *key, double value) {
  char text[40];
  for (int digits = 6; digits <= 17; digits++) {
    snprintf(text, sizeof text, "%.*g", digits, value);
    if (strtod(text, NULL) == value) break;
  }
  bool whole = !strpbrk(text, ".e");
  fprintf(out, "\"%s\": %s%s", key, text, whole ? ".0" : "");
}

static void put_int(FILE *out, const char *key, int64_t value) {
  fprintf(out, "  \"%s\": %lld,\n", key, (long long)value);
}

static void put_special(FILE *out, const moe_hf_config *h) {
  static const struct {
    const char *key;
    int which;
  } ids[] = {{"bos_token_id", MOE_TOKEN_BOS},
             {"eos_token_id", MOE_TOKEN_EOS},
             {"pad_token_id", MOE_TOKEN_PAD}};
  for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
    if (h->special[ids[i].which] >= 0)
      put_int(out, ids[i].key, h->special[ids[i].which]);
    else
      fprintf(out, "  \"%s\": null,\n", ids[i].key);
  }
}

static void print_config(FILE *out, const void *context) {
  const moe_hf_config *h = context;
  const moe_dims *d = &h->dims;
  const char *dtype = h->dtype == MOE_F32    ? "float32"
                      : h->dtype == MOE_BF16 ? "bfloat16"
                                             : "float16";
  fprintf(out, "{\n  \"architectures\": [\"MixtralForCausalLM\"],\n"
               "  \"model_type\": \"mixtral\",\n");
  put_int(out, "vocab_size", d->vocab);
  put_int(out, "hidden_size", d->hidden);
  put_int(out, "intermediate_size", d->ffn);
  put_int(out, "num_hidden_layers", d->layers);
  put_int(out, "num_attention_heads", d->heads);
  put_int(out, "num_key_value_heads", d->kv_heads);
  put_int(out, "head_dim", d->head_dim);
  put_int(out, "num_local_experts", d->experts);
  put_int(out, "num_experts_per_tok", d->top_k);
  put_int(out, "max_position_embeddings", h->context);
  put_special(out, h);
  fputs("  ", out);
  put_real(out, "rms_norm_eps", h->norm_eps);
  /* transformers before version 5, and vLLM with it, know the first spelling, later ones both */
  fputs(",\n  ", out);
  put_real(out, "rope_theta", h->theta);
  fputs(",\n  \"rope_parameters\": {\"rope_type\": \"default\", ", out);
  put_real(out, "rope_theta", h->theta);
  fputs("},\n  ", out);
  put_real(out, "initializer_range", h->init_std);
  fputs(",\n  ", out);
  put_real(out, "router_aux_loss_coef", h->aux_coef);
  fprintf(out,
          ",\n  \"hidden_act\": \"silu\",\n  \"sliding_window\": null,\n"
          "  \"tie_word_embeddings\": false,\n  \"attention_dropout\": 0.0,\n"
          "  \"router_jitter_noise\": 0.0,\n  \"output_router_logits\": false,\n"
          "  \"use_cache\": true,\n  \"torch_dtype\": \"%s\",\n  \"dtype\": \"%s\"\n}\n",
          dtype, dtype);
}

static void print_generation(FILE *out, const void *context) {
  fprintf(out, "{\n");
  put_special(out, context);
  fprintf(out, "  \"do_sample\": false\n}\n");
}

moe_status moe_hf_config_write(const moe_hf_config *h, const char *folder) {
  char path[MOE_PATH + 32];
  snprintf(path, sizeof path, "%s/config.json", folder);
  MOE_TRY(moe_files_print_new(path, print_config, h));
  snprintf(path, sizeof path, "%s/generation_config.json", folder);
  return moe_files_print_new(path, print_generation, h);
}
