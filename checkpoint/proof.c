/* Comparing what was written with what was meant.
 *
 * Each source runs the same prompts once. On its way through the forward pass every tensor of the
 * source passes by, whole and in order, so the same pass hashes it: the logits say that the model
 * computes the same, the hashes that no tensor, however rarely an expert is chosen, was left out,
 * exchanged or cut. */
#include "checkpoint/proof.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/manifest.h"
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

/* ---- hashing what passes -----------------------------------------------------------------------
 */

typedef struct {
  const moe_params *params;
  XXH128_hash_t *hash; /* [params->count] */
  bool *whole;         /* [params->count] */
  XXH3_state_t *state;
  int64_t at; /* elements of the current tensor hashed so far */
} hasher;

static moe_status hash_part(hasher *h, const moe_param *p, int64_t begin, int64_t count,
                            const float *values) {
  int64_t i = p - h->params->list;
  if (begin == 0) {
    XXH3_128bits_reset(h->state);
    h->at = 0;
  }
  if (begin != h->at || h->whole[i])
    return moe_fail(MOE_INVALID, "%s was not read once, from its beginning to its end", p->name);
  XXH3_128bits_update(h->state, values, (size_t)count * sizeof *values);
  h->at += count;
  if (h->at < p->count) return MOE_OK;
  h->hash[i] = XXH3_128bits_digest(h->state);
  h->whole[i] = true;
  return MOE_OK;
}

static moe_status hasher_create(const moe_params *params, hasher *h) {
  h->params = params;
  h->hash = calloc((size_t)params->count, sizeof *h->hash);
  h->whole = calloc((size_t)params->count, sizeof *h->whole);
  h->state = XXH3_createState();
  if (h->hash && h->whole && h->state) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "no memory for %d hashes", params->count);
}

static void hasher_destroy(hasher *h) {
  free(h->hash);
  free(h->whole);
  XXH3_freeState(h->state);
  *h = (hasher){0};
}

/* ---- comparing ---------------------------------------------------------------------------------
 */

typedef struct {
  const moe_proof_options *options;
  moe_proof_report *report;
  int64_t batch, vocab;
  int32_t *tokens;
  float *original, *expected, *written; /* logits [tokens, V]; original may be expected */
  int64_t *used;
  hasher expected_hash, written_hash;
  moe_progress progress;
  int64_t done, total; /* bytes of f32 values */
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

typedef struct {
  proof *p;
  hasher *hash; /* or NULL */
} passer;

static moe_status see(void *context, const moe_param *t, int64_t begin, int64_t count,
                      const float *values) {
  passer *at = context;
  at->p->done += count * (int64_t)sizeof *values;
  moe_progress_show(&at->p->progress, at->p->done, at->p->total, "");
  return at->hash ? hash_part(at->hash, t, begin, count, values) : MOE_OK;
}

static moe_status logits_of(proof *p, moe_weights *w, hasher *hash, int64_t *used, float *out) {
  passer passing = {p, hash};
  moe_weights_watch watch = {.seen = see, .context = &passing, .stop = p->options->stop};
  watch.used = used;
  if (hash) MOE_TRY(hasher_create(&w->params, hash));
  return moe_weights_logits(w, p->tokens, p->batch, PROMPT, &watch, out);
}

static int64_t count_used(const proof *p) {
  int64_t used = 0;
  for (int64_t i = 0; i < p->report->experts; i++) used += p->used[i] > 0;
  return used;
}

/* Run the expected weights on prompts long enough in all that each expert of a layer can expect
 * eight tokens. Where the model is small, on more, as long as experts are left out. */
static moe_status run_expected(proof *p) {
  const moe_dims *d = &p->options->expected->dims;
  bool small = moe_dims_parameters(d) <= SMALL_MODEL;
  p->vocab = d->vocab;
  p->report->experts = d->layers * d->experts;
  p->used = calloc((size_t)p->report->experts, sizeof *p->used);
  if (!p->used) return moe_fail(MOE_NO_MEMORY, "no memory to count experts");
  p->batch = 1 + 8 * d->experts / (PROMPT * d->top_k);
  if (p->batch > FEW_PROMPTS) p->batch = FEW_PROMPTS;
  int64_t pass = moe_dims_parameters(d) * (int64_t)sizeof(float);
  p->total = p->options->original == p->options->expected ? pass : 2 * pass; /* after this one */
  for (;; p->batch *= 2) {
    p->total += pass;
    MOE_TRY(draw_prompts(p));
    hasher_destroy(&p->expected_hash);
    MOE_TRY(logits_of(p, p->options->expected, &p->expected_hash, p->used, p->expected));
    p->report->experts_used = count_used(p);
    if (!small || p->report->experts_used == p->report->experts || 2 * p->batch > MANY_PROMPTS ||
        2 * p->batch * PROMPT * p->vocab > MOST_LOGITS)
      return MOE_OK;
  }
}

static moe_status run_all(proof *p) {
  const moe_proof_options *o = p->options;
  MOE_TRY(run_expected(p));
  MOE_TRY(logits_of(p, o->written, &p->written_hash, NULL, p->written));
  if (o->original == o->expected) return MOE_OK;
  return logits_of(p, o->original, NULL, NULL, p->original);
}

/* Both lists are the table's, of the same sizes, so number i is the same tensor. */
static moe_status compare_hashes(proof *p) {
  const moe_params *params = p->expected_hash.params;
  for (int i = 0; i < params->count; i++) {
    const moe_param *t = &params->list[i];
    const hasher *a = &p->expected_hash, *b = &p->written_hash;
    if (!a->whole[i] || !b->whole[i])
      return moe_fail(MOE_FAILED, "%s: %s was not read", p->options->written->name, t->name);
    if (!XXH128_isEqual(a->hash[i], b->hash[i]))
      return moe_fail(MOE_FAILED, "%s: %s does not read back as it was to be written",
                      p->options->written->name, t->name);
    p->report->tensors++;
    p->report->expert_tensors += t->expert >= 0;
  }
  const moe_dims *d = &params->dims;
  if (p->report->expert_tensors != 3 * d->layers * d->experts)
    return moe_fail(MOE_FAILED,
                    "%s: has %" PRId64 " tensors of experts, not 3 * %" PRId64 " * %" PRId64,
                    p->options->written->name, p->report->expert_tensors, d->layers, d->experts);
  XXH128_hash_t all =
      XXH3_128bits(p->expected_hash.hash, (size_t)params->count * sizeof(XXH128_hash_t));
  moe_hash_text(all, p->report->hash);
  return MOE_OK;
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
  proof p = {.options = options, .report = out};
  moe_status status;
  *out = (moe_proof_report){0};
  MOE_TRY_OR(status, done, check_same_model(&p));
  moe_progress_start(&p.progress, "proving");
  status = run_all(&p);
  moe_progress_end(&p.progress);
  if (status != MOE_OK) goto done;
  MOE_TRY_OR(status, done, compare_hashes(&p));
  status = compare_logits(&p);
done:
  hasher_destroy(&p.expected_hash);
  hasher_destroy(&p.written_hash);
  free_prompts(&p);
  free(p.used);
  return status;
}

void moe_proof_print(const moe_proof_report *r) {
  moe_info("proof: all %" PRId64 " tensors, %" PRId64 " of them experts', read back as written "
           "(XXH3-128 %s); logits of %" PRId64 " tokens through %" PRId64 " of %" PRId64
           " experts: %.2g of the largest away, %.2g from the unrounded weights', the same best "
           "token at %.1f %%",
           r->tensors, r->expert_tensors, r->hash, r->tokens, r->experts_used, r->experts,
           r->difference, r->rounding, 100.0 * r->agreement);
}
