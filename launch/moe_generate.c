/* moe-generate: text from a checkpoint, or its loss on a token file. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/run_tokenizer.h"
#include "core/base/log.h"
#include "core/train/inference.h"
#include "core/train/perplexity.h"
#include "launch/generate_texts.h"
#include "launch/program.h"

typedef struct {
  moe_generate_request request;
  moe_inference inference;
  moe_tokenizer *tokenizer; /* NULL with --ids and --perplexity */
  moe_texts *texts;
  moe_token_file *file;
  int64_t limit; /* positions that the model reaches at this alpha */
} job;

/* ---- before the model --------------------------------------------------------------------------
 */

/* What the command line changes in the checkpoint's configuration. */
static moe_status configure(job *j) {
  const moe_generate_request *r = &j->request;
  moe_config *c = &j->inference.config;
  double trained = c->model.rope_alpha;
  if (r->alpha > 0.0) c->model.rope_alpha = r->alpha;
  if (r->dtype >= 0) c->precision.dtype = r->dtype;
  c->precision.grad_dtype = MOE_STATE_FP32; /* bf16 goes with dtype = bf16; here are none */
  c->run.backend = r->backend;
  c->run.threads = r->threads;
  c->run.memory_gib = r->memory_gib;
  double reach = (double)c->model.context * fmax(1.0, c->model.rope_alpha / trained);
  j->limit = (int64_t)fmin(reach, (double)(1 << 26));
  return moe_config_resolve(c, 0); /* alpha with the head size */
}

static moe_status open_tokenizer(job *j) {
  const moe_config *c = &j->inference.config;
  char name[MOE_PATH];
  MOE_TRY(moe_run_tokenizer(j->inference.path, NULL, j->request.tokenizer, name));
  if (!*name) snprintf(name, sizeof name, "%s", c->data.tokenizer);
  if (!*name)
    return moe_fail(MOE_USAGE, "no tokenizer: the run names none in data.tokenizer: give "
                               "--tokenizer MODEL, or --ids for token ids");
  moe_status status = moe_tokenizer_open(name, &j->tokenizer);
  if (status == MOE_IO) { /* not there: the command line's fault or the place it was given at */
    return moe_fail(MOE_USAGE, "%s: give --tokenizer MODEL, or start where the run was started",
                    moe_error_message());
  }
  MOE_TRY(status);
  int64_t size = moe_tokenizer_vocab_size(j->tokenizer);
  if (size <= c->model.vocab_size) return MOE_OK;
  return moe_fail(MOE_USAGE,
                  "%s has %" PRId64 " pieces and the model a vocabulary of %" PRId64
                  ": give the --tokenizer that the model was trained with",
                  name, size, c->model.vocab_size);
}

/* What is to be read, and the sizes that it asks of the generator. */
static moe_status prepare(job *j, bool show, moe_inference_options *o) {
  const moe_generate_request *r = &j->request;
  const moe_config *c = &j->inference.config;
  char limit[160];
  snprintf(limit, sizeof limit,
           "the model reaches %" PRId64 " (context %" PRId64
           ", alpha %g): shorten it, or raise --%s",
           j->limit, c->model.context, c->model.rope_alpha,
           r->context > 0 && r->context < j->limit ? "context" : "alpha");
  int64_t wanted = r->window ? r->window : c->data.sequence_length, texts = r->batch;
  if (r->perplexity) {
    moe_status status = moe_token_file_open(r->perplexity, &j->file);
    if (status == MOE_IO) return moe_fail(MOE_USAGE, "%s", moe_error_message());
    MOE_TRY(status);
  } else {
    if (!r->ids) MOE_TRY(open_tokenizer(j));
    MOE_TRY(moe_texts_create(r, j->tokenizer, c->model.vocab_size, show, &j->texts));
    wanted = r->context ? r->context : moe_texts_longest(j->texts) + r->max_new;
    if (!r->context && wanted > j->limit) wanted = j->limit;
    if (texts > moe_texts_count(j->texts)) texts = moe_texts_count(j->texts);
  }
  if (wanted > j->limit)
    return moe_fail(MOE_USAGE, "%" PRId64 " tokens at a time are too many: %s", wanted, limit);
  *o = (moe_inference_options){.batch = texts,
                               .room = wanted,
                               .chunk = r->chunk,
                               .sample = r->sample,
                               .eager = r->eager,
                               .plan_only = r->dry_run};
  return j->texts ? moe_texts_fit(j->texts, wanted, limit) : MOE_OK;
}

/* ---- with the model ----------------------------------------------------------------------------
 */

static double rate(int64_t n, double seconds) {
  return seconds > 0.0 ? (double)n / seconds : 0.0;
}

static void tell_rates(const job *j, const moe_inference_options *o,
                       const moe_generation_rates *r) {
  const moe_inference *f = &j->inference;
  int64_t planned = moe_inference_planned_bytes(f), held = moe_inference_held_bytes(f);
  char plan_text[MOE_TEXT], held_text[MOE_TEXT];
  if (j->request.json) {
    fprintf(stderr,
            "{\"device\": \"%s\", \"ranks\": %d, \"dtype\": \"%s\", \"batch\": %" PRId64
            ", \"prompt_tokens\": %" PRId64
            ", \"prefill_s\": %.6g, \"prefill_tokens_per_s\": %.6g, \"first_token_s\": %.6g, "
            "\"decode_tokens\": %" PRId64 ", \"decode_steps\": %" PRId64
            ", \"decode_s\": %.6g, \"decode_tokens_per_s\": %.6g, \"memory_bytes\": %" PRId64
            ", \"held_bytes\": %" PRId64 "}\n",
            moe_device_name(f->dev), moe_comm_size(f->world),
            moe_dtype_name(moe_config_compute_dtype(&f->config)), o->batch, r->prompt_tokens,
            r->prefill_s, rate(r->prompt_tokens, r->prefill_s), r->first_token_s, r->step_tokens,
            r->steps, r->step_s, rate(r->step_tokens, r->step_s), planned, held);
    return;
  }
  moe_info("prompts: %" PRId64 " tokens in %.3g s (%.4g tokens/s), first token after %.3g s",
           r->prompt_tokens, r->prefill_s, rate(r->prompt_tokens, r->prefill_s), r->first_token_s);
  moe_info("texts: %" PRId64 " tokens in %" PRId64 " steps of %" PRId64
           ", %.3g s (%.4g tokens/s, %.3g ms a step)",
           r->step_tokens, r->steps, o->batch, r->step_s, rate(r->step_tokens, r->step_s),
           r->steps > 0 ? 1e3 * r->step_s / (double)r->steps : 0.0);
  moe_info("memory: %s planned, %s held", moe_text_bytes(plan_text, (double)planned),
           moe_text_bytes(held_text, (double)held));
}

static moe_status continue_texts(job *j, const moe_inference_options *o) {
  moe_generation_rates rates = {0};
  MOE_TRY(moe_generate(j->inference.generator, moe_texts_prompts(j->texts),
                       moe_texts_count(j->texts), moe_texts_take, j->texts, &rates));
  if (moe_comm_rank(j->inference.world) == 0) tell_rates(j, o, &rates);
  return MOE_OK;
}

static moe_status measure_perplexity(job *j, const moe_inference_options *o) {
  const moe_generate_request *r = &j->request;
  bool show = moe_comm_rank(j->inference.world) == 0;
  moe_perplexity_options options = {.window = o->room,
                                    .stride = r->stride ? r->stride : o->room,
                                    .limit = r->limit,
                                    .show = show};
  moe_perplexity_result p = {0};
  MOE_TRY(moe_perplexity(j->inference.generator, j->file, options, &p));
  if (!show) return MOE_OK;
  if (r->json)
    printf("{\"nats_per_token\": %.9g, \"perplexity\": %.9g, \"tokens\": %" PRId64
           ", \"window\": %" PRId64 ", \"stride\": %" PRId64
           ", \"seconds\": %.6g, \"tokens_per_s\": %.6g}\n",
           p.nats, exp(p.nats), p.tokens, options.window, options.stride, p.seconds,
           rate(p.fed, p.seconds));
  else
    printf("nats/token   %.6f\nperplexity   %.4f\ntokens       %" PRId64 " (windows of %" PRId64
           ", stride %" PRId64 ")\nrate         %.4g tokens/s\n",
           p.nats, exp(p.nats), p.tokens, options.window, options.stride, rate(p.fed, p.seconds));
  return MOE_OK;
}

static moe_status work(job *j, moe_comm *world) {
  moe_inference_options options = {0};
  MOE_TRY(moe_inference_find(world, j->request.checkpoint, &j->inference));
  moe_status status = configure(j);
  if (status == MOE_OK) status = prepare(j, moe_comm_rank(world) == 0, &options);
  MOE_TRY(moe_agree(world, status));
  MOE_TRY(moe_inference_create(&j->inference, &options));
  if (j->request.dry_run) return moe_inference_print_plan(&j->inference, stdout);
  status = j->file ? measure_perplexity(j, &options) : continue_texts(j, &options);
  if (status == MOE_OK && fflush(stdout) != 0)
    status = moe_fail(MOE_IO, "cannot write: standard output: %s", strerror(errno));
  /* A rank that fails amid a pass cannot meet the others, who wait for it there. */
  if (status != MOE_OK && moe_comm_size(world) > 1) moe_abort(status);
  return status;
}

static moe_status run(int argc, char **argv, moe_comm *world) {
  static job j; /* large */
  moe_status status = moe_agree(world, moe_generate_parse(argc, argv, &j.request));
  bool answers = j.request.help || j.request.version;
  if (status == MOE_OK && !answers) status = work(&j, world);
  if (status == MOE_OK && answers && moe_comm_rank(world) == 0) {
    if (j.request.help) moe_generate_print_help(stdout);
    if (j.request.version) printf("moe-generate " MOE_VERSION "\n");
  }
  moe_texts_destroy(j.texts);
  moe_tokenizer_close(j.tokenizer);
  moe_token_file_close(j.file);
  moe_inference_destroy(&j.inference);
  moe_generate_request_free(&j.request);
  return status;
}

int main(int argc, char **argv) {
  return moe_program_run("moe-generate", argc, argv, run);
}
