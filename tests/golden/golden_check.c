/* Train on a golden file (an independent float64 oracle's answers) and compare.
 *
 * File: params/NAME initial weights, tokens [steps, B, S+1], logits and grads/NAME of the first
 * step, expert_load [L, E] of the first step, steps/{ce,aux,z,loss,grad_norm,lr}, final/NAME;
 * attributes give sizes and hyper-parameters.
 *
 * Where the ranks do not divide the batch, its sequences are trained on in as many copies as make
 * them: all losses and gradients are means, so the answers are the same for any number of ranks. */
#include <getopt.h>
#include <hdf5.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/train/schedule.h"
#include "core/train/step.h"

/* attribute -> setting */
static const char *const settings[][2] = {{"vocab_size", "model.vocab_size"},
                                          {"hidden_size", "model.hidden_size"},
                                          {"n_layers", "model.num_layers"},
                                          {"n_heads", "model.num_heads"},
                                          {"n_kv_heads", "model.num_kv_heads"},
                                          {"head_dim", "model.head_dim"},
                                          {"n_experts", "model.num_experts"},
                                          {"top_k", "model.top_k"},
                                          {"ffn_size", "model.ffn_size"},
                                          {"norm_eps", "model.norm_eps"},
                                          {"rope_base", "model.rope_base"},
                                          {"rope_alpha", "model.rope_alpha"},
                                          {"seq", "data.sequence_length"},
                                          {"seq", "model.context"},
                                          {"batch", "train.global_batch"},
                                          {"aux", "train.aux_coef"},
                                          {"z", "train.z_coef"},
                                          {"lr", "optim.lr"},
                                          {"min_lr", "optim.min_lr"},
                                          {"warmup", "optim.warmup_steps"},
                                          {"total", "train.steps"},
                                          {"beta1", "optim.beta1"},
                                          {"beta2", "optim.beta2"},
                                          {"eps", "optim.eps"},
                                          {"wd", "optim.weight_decay"},
                                          {"clip", "optim.clip"}};

enum { LOGITS, GRADS, FINAL, CE, AUX, Z, LOSS, NORM, LR, LOAD, COSINE, COSINE_FLIPPED, QUANTITIES };
static const char *const names[QUANTITIES] = {"logits",
                                              "gradients",
                                              "final weights",
                                              "ce",
                                              "aux",
                                              "z",
                                              "loss",
                                              "gradient norm",
                                              "lr",
                                              "expert load",
                                              "1 - gradient cosine",
                                              "the same, flipped"};
/* Largest allowed deviation, relative; negative: shown, not judged. z is judged where it is part of
 * the loss, that is where its coefficient is not 0. */
static const double allowed_fp32[QUANTITIES] = {2e-5, 2e-5, 2e-5,  2e-6, 2e-6, 2e-6,
                                                2e-6, 1e-5, 1e-12, 1e-6, -1,   -1};
static const double allowed_bf16[QUANTITIES] = {-1,   -1, -1,    0.02, 0.02, 0.02,
                                                0.02, -1, 1e-12, -1,   0.01, 0.1};

typedef struct {
  double value;
  char where[112];
} worst;

typedef struct {
  hid_t file;
  moe_engine engine;
  int64_t batch, seq, steps;
  worst worst[QUANTITIES];
  double *golden_load;
  bool *flipped; /* [L] the routing of the first step differs from the oracle's */
} check;

static void fatal(const char *what, const char *where) {
  moe_error("%s: %s", what, where);
  moe_abort(MOE_FAILED);
}

static void must(moe_status status) {
  if (status != MOE_OK) moe_abort(status);
}

static double attribute(hid_t file, const char *name) {
  double value = 0.0;
  hid_t a = H5Aopen(file, name, H5P_DEFAULT);
  if (a < 0 || H5Aread(a, H5T_NATIVE_DOUBLE, &value) < 0) fatal("no attribute", name);
  H5Aclose(a);
  return value;
}

static void *read_all(hid_t file, const char *name, hid_t type, size_t element, int64_t expected) {
  hid_t d = H5Dopen2(file, name, H5P_DEFAULT);
  if (d < 0) fatal("no dataset", name);
  hid_t space = H5Dget_space(d);
  int64_t n = H5Sget_simple_extent_npoints(space);
  if (expected >= 0 && n != expected) fatal("wrong size", name);
  void *data = malloc((size_t)n * element);
  if (!data || H5Dread(d, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)
    fatal("cannot read", name);
  H5Sclose(space);
  H5Dclose(d);
  return data;
}

static void note(check *c, int quantity, double value, const char *where) {
  if (value <= c->worst[quantity].value) return; /* a NaN falls through and stays */
  if (isnan(c->worst[quantity].value)) return;
  c->worst[quantity].value = value;
  snprintf(c->worst[quantity].where, sizeof c->worst[quantity].where, "%s", where);
}

static void note_step(check *c, int quantity, double got, double expected, int64_t step) {
  char where[32];
  snprintf(where, sizeof where, "step %lld", (long long)step + 1);
  double scale = expected != 0.0 ? fabs(expected) : 1.0;
  note(c, quantity, fabs(got - expected) / scale, where);
}

/* |got - expected| / |expected|; cosine too. */
static double relative(const float *got, const float *expected, int64_t n, double *cosine) {
  double difference = 0.0, norm = 0.0, own = 0.0, dot = 0.0;
  for (int64_t i = 0; i < n; i++) {
    double g = (double)got[i], e = (double)expected[i];
    difference += (g - e) * (g - e);
    norm += e * e;
    own += g * g;
    dot += g * e;
  }
  if (cosine) *cosine = norm > 0.0 && own > 0.0 ? dot / sqrt(norm * own) : norm == own ? 1.0 : 0.0;
  return norm > 0.0 ? sqrt(difference / norm) : sqrt(difference);
}

/* The fewest copies of `batch` sequences that `ranks` divide. */
static int64_t copies(int64_t batch, int64_t ranks) {
  int64_t a = batch, b = ranks;
  while (b != 0) { /* Euclid */
    int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return ranks / a;
}

static void set_up(check *c, const char *dtype, const char *recompute, const char *backend,
                   char **sets, int set_count) {
  moe_config *config = calloc(1, sizeof *config);
  char text[256];
  moe_config_defaults(config);
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
    double value = attribute(c->file, settings[i][0]);
    snprintf(text, sizeof text, "%s=%.17g", settings[i][1], value);
    must(moe_config_set(config, text));
  }
  const char *const chosen[][2] = {
      {"precision.dtype", dtype}, {"train.recompute", recompute}, {"run.backend", backend}};
  for (int i = 0; i < 3; i++) {
    snprintf(text, sizeof text, "%s=%s", chosen[i][0], chosen[i][1]);
    must(moe_config_set(config, text));
  }
  c->batch = config->train.global_batch;
  c->seq = config->data.sequence_length;
  c->steps = config->train.steps;
  moe_comm *world = NULL;
  must(moe_comm_world(NULL, &world));
  int ranks = moe_comm_size(world);
  config->train.global_batch = c->batch * copies(c->batch, ranks);
  config->train.micro_batch = config->train.global_batch / ranks;
  for (int i = 0; i < set_count; i++) must(moe_config_set(config, sets[i]));
  must(moe_config_resolve(config, ranks));
  moe_device *dev = NULL;
  must(moe_engine_open_device(config, &dev));
  must(moe_engine_create(config, dev, true, false, &c->engine));
  moe_comm_destroy(world);
  free(config);
}

static void load_weights(check *c) {
  const moe_params *params = moe_model_params(c->engine.model);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    char path[128];
    snprintf(path, sizeof path, "params/%s", p->name);
    float *values = read_all(c->file, path, H5T_NATIVE_FLOAT, 4, p->count);
    const moe_optimizer_pool *o = moe_optimizer_pool_state(c->engine.optimizer, p->row->pool);
    must(moe_model_write_param(c->engine.model, p, 0, p->count, values, o->master, o->owned.begin));
    free(values);
  }
}

/* Did the routing of this layer, or of one above, whose gradient reaches it, flip? (The embedding,
 * layer -1 and first, is below all; head and final norm, found by their place, are above all.) */
static bool flipped_from(const check *c, const moe_param *p) {
  bool any = false;
  int64_t layer = p->layer >= 0              ? p->layer
                  : strstr(p->name, "embed") ? 0
                                             : c->engine.config.model.num_layers;
  for (int64_t l = layer; l < c->engine.config.model.num_layers; l++) any = any || c->flipped[l];
  return any;
}

/* Parameter p's elements of a pool of which `values` holds elements `have`: host memory in the type
 * of the pool. NULL if they are not all there. */
static void *bring(const check *c, const moe_param *p, moe_tensor values, moe_range have) {
  if (p->offset < have.begin || p->offset + p->count > have.end) return NULL;
  moe_tensor part = moe_tensor_rows(values, p->offset - have.begin, p->count);
  void *out = malloc((size_t)moe_tensor_bytes(part));
  must(moe_device_download(c->engine.dev, out, part.data, moe_tensor_bytes(part)));
  must(moe_device_sync(c->engine.dev));
  return out;
}

/* Compare p's values with the file's GROUP/NAME; frees them. */
static void compare(check *c, const moe_param *p, const char *group, float *got, int quantity,
                    float scale) {
  if (!got) return;
  char path[128];
  snprintf(path, sizeof path, "%s/%s", group, p->name);
  float *expected = read_all(c->file, path, H5T_NATIVE_FLOAT, 4, p->count);
  for (int64_t i = 0; i < p->count; i++) got[i] *= scale;
  double cosine;
  note(c, quantity, relative(got, expected, p->count, &cosine), p->name);
  if (quantity == GRADS)
    note(c, flipped_from(c, p) ? COSINE_FLIPPED : COSINE, 1.0 - cosine, p->name);
  free(got);
  free(expected);
}

static void compare_grads(check *c, double loss_scale) {
  const moe_params *params = moe_model_params(c->engine.model);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    moe_range have = moe_optimizer_pool_state(c->engine.optimizer, p->row->pool)->owned;
    moe_tensor grads = moe_tensor_rows(moe_model_grads(c->engine.model, p->row->pool), have.begin,
                                       moe_range_size(have));
    compare(c, p, "grads", bring(c, p, grads, have), GRADS, (float)(1.0 / loss_scale));
  }
}

/* The f32 weights of p, wherever they are kept. */
static float *final_weights(const check *c, const moe_param *p) {
  const moe_optimizer_pool *o = moe_optimizer_pool_state(c->engine.optimizer, p->row->pool);
  moe_tensor weights = moe_model_weights(c->engine.model, p->row->pool);
  moe_range all = {0, weights.shape[0]};
  if (!moe_tensor_present(o->master)) return bring(c, p, weights, all);
  void *master = bring(c, p, o->master, o->owned);
  if (!master || o->master.dtype == MOE_F32) return master;
  uint16_t *high = bring(c, p, weights, all);
  float *joined = malloc((size_t)p->count * sizeof *joined);
  moe_join_halves(high, master, joined, p->count);
  free(high);
  free(master);
  return joined;
}

static void compare_final(check *c) {
  const moe_params *params = moe_model_params(c->engine.model);
  moe_pool_gather *gather = moe_model_gather(c->engine.model, MOE_POOL_EXPERT);
  moe_range all = {0, moe_model_weights(c->engine.model, MOE_POOL_EXPERT).shape[0]};
  if (gather) must(moe_pool_gather_need(gather, all));
  for (int i = 0; i < params->count; i++)
    compare(c, &params->list[i], "final", final_weights(c, &params->list[i]), FINAL, 1.0f);
}

/* Rows of tokens [B, S+1] of this rank's micro-batch i, from sequence `first` of the step on. */
static void make_batch(const check *c, const int32_t *tokens, int64_t i, int32_t *room,
                       moe_batch *out, int64_t *first) {
  int64_t micro = c->engine.config.train.micro_batch, t = micro * c->seq;
  int ranks = moe_comm_size(c->engine.world), rank = moe_comm_rank(c->engine.world);
  *first = (i * ranks + rank) * micro;
  for (int64_t b = 0; b < micro; b++) {
    const int32_t *row = tokens + (*first + b) % c->batch * (c->seq + 1);
    for (int64_t s = 0; s < c->seq; s++) {
      room[b * c->seq + s] = row[s];
      room[t + b * c->seq + s] = row[s + 1];
      room[2 * t + b * c->seq + s] = (int32_t)s;
    }
  }
  *out = (moe_batch){.batch = micro,
                     .seq = c->seq,
                     .tokens = room,
                     .targets = room + t,
                     .positions = room + 2 * t};
}

static void compare_logits(check *c, const int32_t *tokens, int32_t *room) {
  int64_t vocab = c->engine.config.model.vocab_size, micro = c->engine.config.train.micro_batch;
  int64_t row = c->seq * vocab;
  float *expected = read_all(c->file, "logits", H5T_NATIVE_FLOAT, 4, c->batch * row);
  float *got = malloc((size_t)(micro * row) * sizeof *got);
  for (int64_t i = 0; i < c->engine.accumulation; i++) {
    moe_batch batch;
    int64_t first;
    make_batch(c, tokens, i, room, &batch, &first);
    must(moe_model_logits(c->engine.model, &batch, got));
    for (int64_t b = 0; b < micro; b++) {
      const float *golden = expected + (first + b) % c->batch * row;
      note(c, LOGITS, relative(got + b * row, golden, row, NULL), "first step");
    }
  }
  free(got);
  free(expected);
}

static void compare_load(check *c, const double *load) {
  int64_t layers = c->engine.config.model.num_layers, experts = c->engine.config.model.num_experts;
  for (int64_t i = 0; i < layers * experts; i++) {
    double difference = fabs(load[i] - c->golden_load[i]);
    if (difference > 1e-9) c->flipped[i / experts] = true;
    char where[32];
    snprintf(where, sizeof where, "layer %lld", (long long)(i / experts));
    note(c, LOAD, difference, where);
  }
}

static void train(check *c) {
  moe_engine *e = &c->engine;
  int64_t t = e->config.train.micro_batch * c->seq;
  int32_t *tokens =
      read_all(c->file, "tokens", H5T_NATIVE_INT32, 4, c->steps * c->batch * (c->seq + 1));
  int32_t *room = malloc((size_t)(3 * t) * sizeof *room);
  static const char *const paths[] = {"steps/ce",   "steps/aux",       "steps/z",
                                      "steps/loss", "steps/grad_norm", "steps/lr"};
  double *expected[6];
  for (int q = 0; q < 6; q++)
    expected[q] = read_all(c->file, paths[q], H5T_NATIVE_DOUBLE, 8, c->steps);
  moe_schedule schedule = moe_schedule_of(&e->config);
  compare_logits(c, tokens, room);
  for (int64_t step = 0; step < c->steps; step++) {
    const int32_t *now = tokens + step * c->batch * (c->seq + 1);
    double lr = moe_schedule_lr(&schedule, step + 1), scale = e->loss_scale;
    must(moe_step_begin(e, lr, step + 1));
    for (int64_t i = 0; i < e->accumulation; i++) {
      moe_batch batch;
      int64_t first;
      make_batch(c, now, i, room, &batch, &first);
      must(moe_step_micro_batch(e, &batch));
    }
    moe_step_result r;
    must(moe_step_end(e, &r));
    if (step == 0) compare_load(c, r.losses.load);
    if (step == 0) compare_grads(c, scale);
    double got[6] = {r.losses.ce, r.losses.aux, r.losses.z, r.losses.loss, r.grad_norm, lr};
    for (int q = 0; q < 6; q++) note_step(c, CE + q, got[q], expected[q][step], step);
  }
  compare_final(c);
}

/* The worst of all ranks, printed and judged by rank 0. */
static bool report(check *c, bool fp32) {
  int ranks = moe_comm_size(c->engine.world);
  worst *all = calloc((size_t)ranks, sizeof c->worst);
  must(moe_comm_host_all_gather(c->engine.world, c->worst, (int64_t)sizeof c->worst, all));
  const double *allowed = fp32 ? allowed_fp32 : allowed_bf16;
  bool good = true;
  for (int q = 0; q < QUANTITIES; q++) {
    worst w = all[q];
    for (int r = 1; r < ranks; r++) {
      const worst *other = &all[r * QUANTITIES + q];
      if (other->value > w.value || isnan(other->value)) w = *other;
    }
    bool judged = allowed[q] >= 0.0 && (q != Z || c->engine.config.train.z_coef > 0.0);
    bool ok = !judged || w.value <= allowed[q];
    good = good && ok;
    if (moe_comm_rank(c->engine.world) != 0) continue;
    printf("%-20s %10.3e  ", names[q], w.value);
    if (judged) printf("allowed %8.1e  %s", allowed[q], ok ? "ok  " : "FAIL");
    printf("  %s\n", w.where);
  }
  free(all);
  return good;
}

int main(int argc, char **argv) {
  static const struct option options[] = {{"recompute", required_argument, NULL, 'r'},
                                          {"backend", required_argument, NULL, 'b'},
                                          {"dtype", required_argument, NULL, 'd'},
                                          {"set", required_argument, NULL, 's'},
                                          {NULL, 0, NULL, 0}};
  const char *recompute = "none", *backend = "cpu", *dtype = "fp32";
  char *sets[64];
  int set_count = 0, option;
  moe_cpu_choose_blas(argv);
  must(moe_comm_init(&argc, &argv));
  moe_grad_bucket = 1; /* each layer's gradients on their own: one summed too early would show */
  moe_log_init("golden_check", -1);
  while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
    if (option == 'r')
      recompute = optarg;
    else if (option == 'b')
      backend = optarg;
    else if (option == 'd')
      dtype = optarg;
    else if (option == 's' && set_count < 64)
      sets[set_count++] = optarg;
    else
      must(moe_fail(MOE_USAGE, "unknown option: see check.sh --help"));
  }
  if (optind != argc - 1) must(moe_fail(MOE_USAGE, "give one golden file: see check.sh --help"));
  check *c = calloc(1, sizeof *c);
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  c->file = H5Fopen(argv[optind], H5F_ACC_RDONLY, H5P_DEFAULT);
  if (c->file < 0) fatal("cannot open", argv[optind]);
  set_up(c, dtype, recompute, backend, sets, set_count);
  int64_t layers = c->engine.config.model.num_layers, experts = c->engine.config.model.num_experts;
  c->golden_load = read_all(c->file, "expert_load", H5T_NATIVE_DOUBLE, 8, layers * experts);
  c->flipped = calloc((size_t)layers, sizeof *c->flipped);
  load_weights(c);
  train(c);
  bool good = report(c, strcmp(dtype, "fp32") == 0);
  H5Fclose(c->file);
  moe_comm_finalize();
  return good ? 0 : 1;
}
