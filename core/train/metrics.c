/* Metrics: one record, three readers (terminal.c, metrics.jsonl, tfevents.c).
 *
 * After create nothing here fails a run: what cannot be written is warned about once. */
#include "core/train/metrics.h"

#include "core/base/log.h"
#include "core/train/append_file.h"
#include "core/train/metrics_log.h"
#include "core/train/terminal.h"
#include "core/train/tfevents.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SHARES_MAX = 64 }; /* metrics.jsonl holds every expert's share up to this many of them */

typedef struct {
  double min, max, cv;
} load_summary;

struct moe_metrics {
  int64_t layers, experts;
  double peak_tflops; /* all ranks; 0: not known */
  moe_append_file jsonl;
  moe_tfevents *events; /* NULL: not wanted */
  moe_terminal terminal;
  load_summary *load; /* [layers] of the record at hand */
};

static const char *const part_names[MOE_STEP_PARTS] = {
#define X(name, text) text,
    MOE_STEP_PART_MAP(X)
#undef X
};

static moe_status open_all(moe_metrics *m, const moe_config *c, int64_t first_step) {
  char path[MOE_CONFIG_TEXT + 32];
  snprintf(path, sizeof path, "%s/metrics.jsonl", c->run.dir);
  MOE_TRY(moe_metrics_log_cut(path, first_step));
  MOE_TRY(moe_append_open(&m->jsonl, path));
  if (!c->log.tensorboard) return MOE_OK;
  snprintf(path, sizeof path, "%s/tensorboard", c->run.dir);
  return moe_tfevents_create(path, first_step, &m->events);
}

moe_status moe_metrics_create(const moe_config *config, int rank, int ranks, int64_t layers,
                              int64_t experts, double peak_tflops, int64_t first_step,
                              moe_metrics **out) {
  *out = NULL;
  if (rank != 0) return MOE_OK;
  moe_metrics *m = calloc(1, sizeof *m);
  load_summary *load = calloc((size_t)layers, sizeof *load);
  if (m == NULL || load == NULL) {
    free(m);
    free(load);
    return moe_fail(MOE_NO_MEMORY, "out of memory: metrics of %lld layers", (long long)layers);
  }
  m->layers = layers;
  m->experts = experts;
  m->peak_tflops = peak_tflops * ranks;
  m->load = load;
  m->terminal = moe_terminal_of(stdout, first_step, config->train.steps, config->log.interval);
  moe_status status = open_all(m, config, first_step);
  if (status != MOE_OK) {
    moe_metrics_destroy(m);
    return status;
  }
  *out = m;
  return MOE_OK;
}

void moe_metrics_destroy(moe_metrics *m) {
  if (m == NULL) return;
  moe_terminal_end(&m->terminal);
  moe_append_close(&m->jsonl);
  moe_tfevents_destroy(m->events);
  free(m->load);
  free(m);
}

/* Smallest and largest share of n, and their coefficient of variation: deviation / mean. */
static load_summary summarise(const double *share, int64_t n) {
  load_summary s = {share[0], share[0], 0.0};
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < n; i++) {
    s.min = fmin(s.min, share[i]);
    s.max = fmax(s.max, share[i]);
    sum += share[i];
  }
  double mean = sum / (double)n;
  for (int64_t i = 0; i < n; i++) squares += (share[i] - mean) * (share[i] - mean);
  s.cv = mean > 0.0 ? sqrt(squares / (double)n) / mean : 0.0;
  return s;
}

static moe_step_rates rates_of(moe_metrics *m, const moe_step_record *r) {
  moe_step_rates rates = {.mfu = NAN, .load_cv = NAN};
  if (r->seconds > 0.0) {
    rates.tokens_per_s = (double)r->step_tokens / r->seconds;
    rates.tflops = r->flops / r->seconds / 1e12;
  }
  if (m->peak_tflops > 0.0) rates.mfu = rates.tflops / m->peak_tflops;
  if (r->expert_load == NULL) return rates;
  for (int64_t l = 0; l < m->layers; l++) {
    m->load[l] = summarise(r->expert_load + l * m->experts, m->experts);
    rates.load_cv = fmax(rates.load_cv, m->load[l].cv); /* fmax passes NaN over */
  }
  return rates;
}

/* ---- metrics.jsonl ------------------------------------------------------------------------- */

static void write_load(moe_metrics *m, moe_json *j, const double *share) {
  if (share == NULL) {
    moe_json_null(j, "expert_load");
    return;
  }
  moe_json_begin(j, "expert_load", '[');
  for (int64_t l = 0; l < m->layers; l++) {
    moe_json_begin(j, NULL, '{');
    moe_json_real(j, "min", m->load[l].min);
    moe_json_real(j, "max", m->load[l].max);
    moe_json_real(j, "cv", m->load[l].cv);
    if (m->layers * m->experts <= SHARES_MAX) {
      moe_json_begin(j, "shares", '[');
      for (int64_t e = 0; e < m->experts; e++) moe_json_real(j, NULL, share[l * m->experts + e]);
      moe_json_end(j, ']');
    }
    moe_json_end(j, '}');
  }
  moe_json_end(j, ']');
}

static void write_step(moe_metrics *m, const moe_step_record *r, const moe_step_rates *rates) {
  moe_json j = moe_json_line(&m->jsonl);
  moe_json_begin(&j, NULL, '{');
  moe_json_int(&j, "step", r->step);
  moe_json_int(&j, "tokens", r->tokens);
  moe_json_real(&j, "loss", r->loss);
  moe_json_real(&j, "ce", r->ce);
  moe_json_real(&j, "aux", r->aux);
  moe_json_real(&j, "z", r->z);
  moe_json_real(&j, "lr", r->lr);
  moe_json_real(&j, "grad_norm", r->grad_norm);
  moe_json_bool(&j, "skipped", r->skipped);
  moe_json_real(&j, "ms", 1e3 * r->seconds);
  moe_json_begin(&j, "ms_by_part", '{');
  for (int p = 0; p < MOE_STEP_PARTS; p++)
    moe_json_real(&j, part_names[p], 1e3 * r->part_seconds[p]);
  moe_json_end(&j, '}');
  moe_json_real(&j, "tokens_per_s", rates->tokens_per_s);
  moe_json_real(&j, "tflops", rates->tflops);
  moe_json_real(&j, "mfu", rates->mfu);
  moe_json_int(&j, "memory_bytes", r->memory_bytes);
  write_load(m, &j, r->expert_load);
  moe_json_real(&j, "dropped", r->dropped);
  moe_json_end(&j, '}');
  moe_json_line_end(&j);
}

/* ---- TensorBoard --------------------------------------------------------------------------- */

static void write_events(moe_metrics *m, const moe_step_record *r, const moe_step_rates *rates) {
  moe_tfevents *w = m->events;
  if (w == NULL) return;
  moe_tfevents_scalar(w, r->loss, "loss/total");
  moe_tfevents_scalar(w, r->ce, "loss/ce");
  moe_tfevents_scalar(w, r->aux, "loss/aux");
  moe_tfevents_scalar(w, r->z, "loss/z");
  moe_tfevents_scalar(w, r->lr, "optim/lr");
  moe_tfevents_scalar(w, r->grad_norm, "optim/grad_norm");
  moe_tfevents_scalar(w, r->skipped ? 1.0 : 0.0, "optim/skipped");
  moe_tfevents_scalar(w, 1e3 * r->seconds, "speed/ms");
  for (int p = 0; p < MOE_STEP_PARTS; p++)
    moe_tfevents_scalar(w, 1e3 * r->part_seconds[p], "speed/ms_%s", part_names[p]);
  moe_tfevents_scalar(w, rates->tokens_per_s, "speed/tokens_per_s");
  moe_tfevents_scalar(w, rates->tflops, "speed/tflops");
  if (isfinite(rates->mfu)) moe_tfevents_scalar(w, rates->mfu, "speed/mfu");
  moe_tfevents_scalar(w, (double)r->memory_bytes, "memory/bytes");
  moe_tfevents_scalar(w, r->dropped, "experts/dropped");
  for (int64_t l = 0; r->expert_load != NULL && l < m->layers; l++) {
    moe_tfevents_scalar(w, m->load[l].min, "experts/load_min/%03lld", (long long)l);
    moe_tfevents_scalar(w, m->load[l].max, "experts/load_max/%03lld", (long long)l);
    moe_tfevents_scalar(w, m->load[l].cv, "experts/load_cv/%03lld", (long long)l);
  }
  moe_tfevents_commit(w, r->step);
}

/* ---- records ------------------------------------------------------------------------------- */

moe_status moe_metrics_record(moe_metrics *m, const moe_step_record *r) {
  if (m == NULL) return MOE_OK;
  moe_step_rates rates = rates_of(m, r);
  write_step(m, r, &rates);
  write_events(m, r, &rates);
  moe_terminal_step(&m->terminal, r, &rates);
  return MOE_OK;
}

moe_status moe_metrics_eval(moe_metrics *m, const moe_eval_record *r) {
  if (m == NULL) return MOE_OK;
  moe_json j = moe_json_line(&m->jsonl);
  moe_json_begin(&j, NULL, '{');
  moe_json_int(&j, "step", r->step);
  moe_json_real(&j, "eval_ce", r->ce);
  moe_json_real(&j, "eval_perplexity", r->perplexity);
  moe_json_int(&j, "eval_tokens", r->tokens);
  moe_json_real(&j, "eval_ms", 1e3 * r->seconds);
  moe_json_end(&j, '}');
  moe_json_line_end(&j);
  if (m->events != NULL) {
    moe_tfevents_scalar(m->events, r->ce, "eval/ce");
    moe_tfevents_scalar(m->events, r->perplexity, "eval/perplexity");
    moe_tfevents_commit(m->events, r->step);
  }
  moe_terminal_eval(&m->terminal, r);
  return MOE_OK;
}
