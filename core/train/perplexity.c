/* Windows of a token file through a generator, as many at a time as it has slots. */
#include "core/train/perplexity.h"

#include <stdlib.h>

#include "core/base/integers.h"
#include "core/base/log.h"
#include "data/progress.h"

typedef struct {
  moe_generator *g;
  const moe_token_file *file;
  moe_perplexity_options options;
  int64_t total;             /* tokens of the stream */
  int64_t windows, vocab;    /* how many; V */
  int32_t *tokens, *targets; /* [batch, S] */
  int32_t *read;             /* [S + 1] */
  moe_progress progress;
  moe_perplexity_result *out;
} task;

/* Fill row `row` with window w: beyond the end of the file token 0 without a target. */
static moe_status load_window(task *t, int64_t w, int64_t row) {
  int64_t s = t->options.window, start = w * t->options.stride;
  int64_t inputs = moe_min64(s, t->total - 1 - start);
  int64_t counted = w == 0 ? 0 : s - t->options.stride; /* by the window before */
  MOE_TRY(moe_token_file_read(t->file, start, inputs + 1, t->vocab, t->read));
  for (int64_t i = 0; i < s; i++) {
    bool inside = i < inputs;
    t->tokens[row * s + i] = inside ? t->read[i] : 0;
    t->targets[row * s + i] = inside && i >= counted ? t->read[i + 1] : -1;
  }
  t->out->fed += inputs;
  return MOE_OK;
}

static void show(task *t, int64_t done, const double loss[2]) {
  if (!t->options.show || !moe_progress_due(&t->progress)) return;
  double elapsed = moe_clock_s() - t->progress.started_s;
  char rate[MOE_TEXT], left[MOE_TEXT];
  double seconds = elapsed * (double)(t->windows - done) / (double)done;
  moe_progress_say(
      &t->progress, "%.0f %%, %.4f nats/token, %s tokens/s, ETA %s",
      100.0 * (double)done / (double)t->windows, loss[1] > 0.0 ? loss[0] / loss[1] : 0.0,
      moe_text_count(rate, (double)t->out->fed / elapsed), moe_text_seconds(left, seconds));
}

static moe_status run(task *t) {
  int64_t batch = moe_generator_batch(t->g), s = t->options.window;
  double loss[2] = {0.0, 0.0};
  moe_progress_start(&t->progress, "perplexity");
  for (int64_t w = 0; w < t->windows; w += batch) {
    int64_t n = moe_min64(batch, t->windows - w);
    for (int64_t row = 0; row < n; row++) MOE_TRY(load_window(t, w + row, row));
    MOE_TRY(moe_generator_clear(t->g, 0, n));
    MOE_TRY(moe_generator_score(t->g, 0, n, t->tokens, t->targets, s, loss));
    show(t, w + n, loss);
  }
  t->out->seconds = moe_progress_end(&t->progress);
  t->out->tokens = (int64_t)loss[1];
  t->out->nats = loss[0] / loss[1];
  return MOE_OK;
}

moe_status moe_perplexity(moe_generator *g, const moe_token_file *file, moe_perplexity_options o,
                          moe_perplexity_result *out) {
  int64_t s = o.window, batch = moe_generator_batch(g), tokens = moe_token_file_tokens(file);
  if (s < 1 || o.stride < 1 || o.stride > s)
    return moe_fail(MOE_USAGE, "a stride of %lld with windows of %lld: --stride: 1 to the window",
                    (long long)o.stride, (long long)s);
  *out = (moe_perplexity_result){0};
  task t = {.g = g, .file = file, .options = o, .out = out};
  t.total = o.limit > 0 ? moe_min64(o.limit, tokens) : tokens;
  t.vocab = moe_generator_params(g)->dims.vocab;
  if (t.total < 2)
    return moe_fail(MOE_USAGE, "%s: %lld tokens, where 2 are the least to predict one",
                    moe_token_file_prefix(file), (long long)t.total);
  int64_t after_first = t.total - 1 > s ? t.total - 1 - s : 0;
  t.windows = 1 + (after_first + o.stride - 1) / o.stride;
  t.tokens = malloc((size_t)(2 * batch * s + s + 1) * sizeof *t.tokens);
  if (!t.tokens) return moe_fail(MOE_NO_MEMORY, "out of memory: %lld windows", (long long)batch);
  t.targets = t.tokens + batch * s;
  t.read = t.targets + batch * s;
  moe_status status = run(&t);
  free(t.tokens);
  return status;
}
