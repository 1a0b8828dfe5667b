/* Comparing what was written with what was meant.
 *
 * All sources run the same prompts, side by side. On its way through the forward pass every tensor
 * of a source passes by, whole and in order, so the same pass hashes it: the logits say that the
 * model computes the same, the hashes that no tensor, however rarely an expert is chosen, was left
 * out, exchanged or cut. */
#include "checkpoint/proof.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/rng.h"
#include "data/progress.h"
#include "data/tokenizer.h"

enum {
  PROMPT = 32,
  FEW_PROMPTS = 8,         /* for any model */
  MANY_PROMPTS = 64,       /* for a small one whose experts are not all chosen by fewer */
  SMALL_MODEL = 100 << 20, /* parameters */
  MOST_LOGITS = 16 << 20
};

/* ---- comparing ---------------------------------------------------------------------------------
 */

typedef struct {
  const moe_proof_options *options;
  moe_proof_report *report;
  const moe_params *params; /* of all sources */
  int64_t batch, vocab;
  int32_t *tokens;
  float *original, *expected, *written; /* logits [tokens, V]; original may be expected */
  int64_t *used;
  moe_weights_seen *expected_seen, *written_seen; /* [params->count] */
  moe_progress progress;
  int64_t total; /* bytes of f32 values */
} proof;

static void free_prompts(proof *p) {
  if (p->original != p->expected) free(p->original);
  free(p->expected);
  free(p->written);
  free(p->tokens);
  p->original = p->expected = p->written = NULL;
  p->tokens = NULL;
}

/* p->batch prompts, <bos> first, and room for their logits. */
static moe_status draw_prompts(proof *p) {
  int64_t n = p->batch * PROMPT, logits = n * p->vocab;
  free_prompts(p);
  p->report->tokens = n;
  p->tokens = calloc((size_t)n, sizeof *p->tokens);
  p->expected = calloc((size_t)logits, sizeof *p->expected);
  p->written = calloc((size_t)logits, sizeof *p->written);
  p->original = p->options->original == p->options->expected
                    ? p->expected
                    : calloc((size_t)logits, sizeof *p->original);
  if (!p->tokens || !p->original || !p->expected || !p->written)
    return moe_fail(MOE_NO_MEMORY, "no memory for the logits of %" PRId64 " tokens", n);
  uint64_t stream = moe_rng_stream("proof", p->vocab, p->batch);
  for (int64_t i = 0; i < n; i++) {
    double u = moe_rng_uniform_f64(1, stream, (uint64_t)i);
    bool first = i % PROMPT == 0 && p->vocab > MOE_TOKEN_BOS;
    p->tokens[i] = first ? MOE_TOKEN_BOS : (int32_t)(u * (double)p->vocab);
  }
  return MOE_OK;
}

static moe_status check_same_model(const proof *p) {
  const moe_weights *a = p->options->expected, *b = p->options->written;
  if (memcmp(&a->dims, &b->dims, sizeof a->dims) != 0)
    return moe_fail(MOE_FAILED, "%s: has other sizes than %s", b->name, a->name);
  return hypot(moe_weights_theta(a) / moe_weights_theta(b) - 1.0, a->norm_eps / b->norm_eps - 1.0) <
                 1e-6
             ? MOE_OK
             : moe_fail(MOE_FAILED,
                        "%s: its rotary base is %.9g and its norms' epsilon %.9g, but %.9g and "
                        "%.9g were meant",
                        b->name, moe_weights_theta(b), b->norm_eps, moe_weights_theta(a),
                        a->norm_eps);
}

static void show(void *context, int64_t bytes) {
  proof *p = context;
  moe_progress_add(&p->progress, bytes, p->total);
}

/* The original goes before the expected, which may be made of it as it passes. */
static moe_status run_prompts(proof *p) {
  const moe_proof_options *o = p->options;
  moe_weights_pass pass[MOE_WEIGHTS_PASSES] = {{.weights = o->original, .logits = p->original}};
  int passes = o->original == o->expected ? 0 : 1;
  moe_weights_watch watch = {.passed = show, .context = p, .stop = o->stop};
  size_t seen = (size_t)p->params->count * sizeof(moe_weights_seen);
  memset(p->expected_seen, 0, seen);
  memset(p->written_seen, 0, seen);
  pass[passes++] = (moe_weights_pass){o->expected, p->expected, p->expected_seen, p->used};
  pass[passes++] = (moe_weights_pass){o->written, p->written, p->written_seen, NULL};
  p->total += passes * moe_dims_parameters(&p->params->dims) * (int64_t)sizeof(float);
  return moe_weights_logits(pass, passes, p->tokens, p->batch, PROMPT, &watch);
}

static int64_t count_used(const proof *p) {
  int64_t used = 0;
  for (int64_t i = 0; i < p->report->experts; i++) used += p->used[i] > 0;
  return used;
}

static moe_status make_room(proof *p) {
  size_t count = (size_t)p->params->count;
  p->used = calloc((size_t)p->report->experts, sizeof *p->used);
  p->expected_seen = calloc(count, sizeof *p->expected_seen);
  p->written_seen = calloc(count, sizeof *p->written_seen);
  if (p->used && p->expected_seen && p->written_seen) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "no memory for %d hashes", p->params->count);
}

/* Run prompts long enough in all that each expert of a layer can expect eight tokens. Where the
 * model is small, more, as long as experts are left out. */
static moe_status run_all(proof *p) {
  const moe_dims *d = &p->params->dims;
  bool small = moe_dims_parameters(d) <= SMALL_MODEL;
  p->vocab = d->vocab;
  p->report->experts = d->layers * d->experts;
  MOE_TRY(make_room(p));
  p->batch = 1 + 8 * d->experts / (PROMPT * d->top_k);
  if (p->batch > FEW_PROMPTS) p->batch = FEW_PROMPTS;
  for (;; p->batch *= 2) {
    MOE_TRY(draw_prompts(p));
    MOE_TRY(run_prompts(p));
    p->report->experts_used = count_used(p);
    if (!small || p->report->experts_used == p->report->experts || 2 * p->batch > MANY_PROMPTS ||
        2 * p->batch * PROMPT * p->vocab > MOST_LOGITS)
      return MOE_OK;
  }
}

/* Both lists are the table's, of the same sizes, so number i is the same tensor. */
static moe_status compare_hashes(proof *p) {
  const char *name = p->options->written->name;
  const moe_params *params = p->params;
  XXH3_state_t *all = XXH3_createState();
  if (!all) return moe_fail(MOE_NO_MEMORY, "no memory for a hash");
  moe_status status = MOE_OK;
  XXH3_128bits_reset(all);
  for (int i = 0; i < params->count && status == MOE_OK; i++) {
    const moe_param *t = &params->list[i];
    const moe_weights_seen *a = &p->expected_seen[i], *b = &p->written_seen[i];
    if (a->count != t->count || b->count != t->count)
      status = moe_fail(MOE_FAILED, "%s: %s was not read once, whole", name, t->name);
    else if (!XXH128_isEqual(a->hash, b->hash))
      status =
          moe_fail(MOE_FAILED, "%s: %s does not read back as it was to be written", name, t->name);
    XXH3_128bits_update(all, &a->hash, sizeof a->hash);
    p->report->tensors++;
    p->report->expert_tensors += t->expert >= 0;
  }
  moe_hash_text(XXH3_128bits_digest(all), p->report->hash);
  XXH3_freeState(all);
  const moe_dims *d = &params->dims;
  if (status != MOE_OK || p->report->expert_tensors == 3 * d->layers * d->experts) return status;
  return moe_fail(MOE_FAILED,
                  "%s: has %" PRId64 " tensors of experts, not 3 * %" PRId64 " * %" PRId64, name,
                  p->report->expert_tensors, d->layers, d->experts);
}

/* Largest |a - b|; infinite when anything is not finite. */
static double largest_difference(const float *a, const float *b, int64_t n) {
  double most = 0.0;
  for (int64_t i = 0; i < n; i++) {
    double difference = fabs((double)a[i] - (double)b[i]);
    if (!isfinite(difference)) return HUGE_VAL;
    if (difference > most) most = difference;
  }
  return most;
}

static int64_t best(const float *logits, int64_t n) {
  int64_t at = 0;
  for (int64_t i = 1; i < n; i++)
    if (logits[i] > logits[at]) at = i;
  return at;
}

static moe_status compare_logits(proof *p) {
  moe_proof_report *r = p->report;
  const moe_proof_options *o = p->options;
  int64_t n = r->tokens * p->vocab;
  double tolerance = o->tolerance > 0.0 ? o->tolerance : 1e-5;
  for (int64_t i = 0; i < n; i++) r->scale = fmax(r->scale, fabs((double)p->expected[i]));
  double unit = r->scale > 0.0 ? r->scale : 1.0; /* a head of zeros */
  r->difference = largest_difference(p->expected, p->written, n) / unit;
  r->rounding = largest_difference(p->original, p->written, n) / unit;
  for (int64_t t = 0; t < r->tokens; t++)
    r->agreement +=
        best(p->original + t * p->vocab, p->vocab) == best(p->written + t * p->vocab, p->vocab);
  r->agreement /= (double)r->tokens;
  if (!(r->difference <= tolerance))
    return moe_fail(MOE_FAILED,
                    "%s: its logits are %.3g of the largest away from what was to be "
                    "written: at most %.3g is accepted",
                    o->written->name, r->difference, tolerance);
  if (o->rounding_tolerance > 0.0 && !(r->rounding <= o->rounding_tolerance))
    return moe_fail(MOE_FAILED,
                    "%s: its logits are %.3g of the largest away from the "
                    "checkpoint's: at most %.3g is accepted: choose a wider type",
                    o->written->name, r->rounding, o->rounding_tolerance);
  return MOE_OK;
}

moe_status moe_proof(const moe_proof_options *options, moe_proof_report *out) {
  proof p = {.options = options, .report = out, .params = &options->expected->params};
  moe_status status;
  *out = (moe_proof_report){0};
  MOE_TRY_OR(status, done, check_same_model(&p));
  moe_progress_start(&p.progress, "proving");
  status = run_all(&p);
  out->seconds = moe_progress_end(&p.progress);
  out->bytes = (double)p.progress.done;
  if (status != MOE_OK) goto done;
  MOE_TRY_OR(status, done, compare_hashes(&p));
  status = compare_logits(&p);
done:
  free_prompts(&p);
  free(p.expected_seen);
  free(p.written_seen);
  free(p.used);
  return status;
}

void moe_proof_print(const moe_proof_report *r) {
  char time[MOE_TEXT], bytes[MOE_TEXT];
  moe_info("proof: all %" PRId64 " tensors, %" PRId64 " of them experts', read back as written "
           "(XXH3-128 %s); logits of %" PRId64 " tokens through %" PRId64 " of %" PRId64
           " experts: %.2g of the largest away, %.2g from the unrounded weights', the same best "
           "token at %.1f %%; %s of values in %s (%.2f GB/s)",
           r->tensors, r->expert_tensors, r->hash, r->tokens, r->experts_used, r->experts,
           r->difference, r->rounding, 100.0 * r->agreement, moe_text_bytes(bytes, r->bytes),
           moe_text_seconds(time, r->seconds), 1e-9 * r->bytes / (r->seconds + 1e-9));
}
