/* Texts: prompts go through a generator's slots, any number of them, until each has ended. */
#ifndef MOE_CORE_MODEL_GENERATE_LOOP_H
#define MOE_CORE_MODEL_GENERATE_LOOP_H

#include "core/model/generate.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const int32_t *ids;
  int64_t count;   /* at least 1 */
  int64_t max_new; /* at least 1; count + max_new is at most the generator's room */
} moe_prompt;

/* Text `prompt` goes on with `token`. Sets *end to end it there; after max_new tokens it ends in
 * any case. Must decide the same on every rank. */
typedef moe_status (*moe_take_token)(void *context, int64_t prompt, int32_t token, bool *end);

typedef struct {
  int64_t prompt_tokens;    /* fed by prefill */
  int64_t tokens;           /* drawn, those that ended a text included */
  int64_t step_tokens;      /* of these, by steps (the others by prefill) */
  int64_t steps;            /* of all slots at once */
  double first_token_s;     /* from the start to the first token of the first text */
  double prefill_s, step_s; /* time spent */
} moe_generation_rates;

/* Continue prompts[0..n), `batch` at a time: as a text ends, the next prompt takes its slot. Text i
 * draws from stream i, so it is the same in any company. Collective over the generator's mesh. */
moe_status moe_generate(moe_generator *g, const moe_prompt *prompts, int64_t n, moe_take_token take,
                        void *context, moe_generation_rates *rates);

#ifdef __cplusplus
}
#endif
#endif
