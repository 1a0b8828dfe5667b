/* Continuous batching: a slot whose text has ended takes the next prompt.
 *
 * On a GPU a step runs while the host looks at the tokens of the step before. So a text's end is
 * noticed one step late, and that step's token for its slot is nobody's: `owner` remembers whose
 * each kept step's tokens are. */
#include "core/model/generate_loop.h"

#include <stdlib.h>

#include "core/base/log.h"

enum { KEPT = 2, NOBODY = -1 };

typedef struct {
  moe_generator *g;
  const moe_prompt *prompts;
  int64_t prompt_count, batch;
  int64_t next;         /* prompt to start */
  int64_t running;      /* slots with a text */
  int64_t *text;        /* [batch] the slot's prompt, or NOBODY */
  int64_t *drawn;       /* [batch] tokens of the slot's text so far */
  int64_t *owner[KEPT]; /* [batch] `text` when a step was queued, by step number */
  moe_take_token take;
  void *context;
  double started_s;
  moe_generation_rates *rates;
} loop;

/* Hand a token to its text, and free the slot when the text ends. */
static moe_status deliver(loop *l, int64_t slot, int32_t token) {
  int64_t text = l->text[slot];
  bool end = false;
  MOE_TRY(l->take(l->context, text, token, &end));
  l->rates->tokens++;
  if (++l->drawn[slot] < l->prompts[text].max_new && !end) return MOE_OK;
  l->text[slot] = NOBODY;
  l->running--;
  return moe_generator_clear(l->g, slot, 1);
}

static moe_status start_text(loop *l, int64_t slot) {
  const moe_prompt *p = &l->prompts[l->next];
  moe_generation_rates *r = l->rates;
  double begin = moe_clock_s();
  int32_t first;
  MOE_TRY(moe_generator_start(l->g, slot, p->ids, p->count, (int32_t)l->next, &first));
  double end = moe_clock_s();
  r->prefill_s += end - begin;
  r->prompt_tokens += p->count;
  if (l->next == 0) r->first_token_s = end - l->started_s;
  l->text[slot] = l->next++;
  l->drawn[slot] = 0;
  l->running++;
  return deliver(l, slot, first);
}

/* A text may end with its first token, so a slot may take several prompts. */
static moe_status fill_slots(loop *l) {
  for (int64_t slot = 0; slot < l->batch; slot++) {
    while (l->text[slot] == NOBODY && l->next < l->prompt_count) MOE_TRY(start_text(l, slot));
  }
  return MOE_OK;
}

/* The tokens of the step `age` steps ago go to the texts that were in its slots and still are. */
static moe_status collect(loop *l, int age) {
  const int32_t *tokens;
  const int64_t *owner = l->owner[(l->rates->steps - 1 - age) % KEPT];
  MOE_TRY(moe_generator_tokens(l->g, age, &tokens));
  for (int64_t slot = 0; slot < l->batch; slot++) {
    if (owner[slot] == NOBODY || owner[slot] != l->text[slot]) continue;
    l->rates->step_tokens++;
    MOE_TRY(deliver(l, slot, tokens[slot]));
  }
  return MOE_OK;
}

static moe_status step(loop *l, int age) {
  double begin = moe_clock_s();
  int64_t *owner = l->owner[l->rates->steps++ % KEPT];
  for (int64_t slot = 0; slot < l->batch; slot++) owner[slot] = l->text[slot];
  MOE_TRY(moe_generator_step(l->g));
  if (l->rates->steps > age) MOE_TRY(collect(l, age));
  l->rates->step_s += moe_clock_s() - begin;
  return MOE_OK;
}

static moe_status run(loop *l) {
  int age = moe_generator_is_ahead(l->g) ? 1 : 0;
  l->started_s = moe_clock_s();
  for (;;) {
    MOE_TRY(fill_slots(l));
    if (l->running == 0) return MOE_OK;
    MOE_TRY(step(l, age));
  }
}

moe_status moe_generate(moe_generator *g, const moe_prompt *prompts, int64_t n, moe_take_token take,
                        void *context, moe_generation_rates *rates) {
  int64_t batch = moe_generator_batch(g);
  int64_t *memory = malloc((size_t)((KEPT + 2) * batch) * sizeof *memory);
  *rates = (moe_generation_rates){0};
  if (!memory) return moe_fail(MOE_NO_MEMORY, "out of memory: %lld slots", (long long)batch);
  loop l = {.g = g,
            .prompts = prompts,
            .prompt_count = n,
            .batch = batch,
            .text = memory,
            .drawn = memory + batch,
            .owner = {memory + 2 * batch, memory + 3 * batch},
            .take = take,
            .context = context,
            .rates = rates};
  for (int64_t slot = 0; slot < batch; slot++) l.text[slot] = NOBODY;
  moe_status status = moe_generator_clear(g, 0, batch);
  if (status == MOE_OK) status = run(&l);
  free(memory);
  return status;
}
