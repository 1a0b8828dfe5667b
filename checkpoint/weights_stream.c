/* Tensors on their way through forward passes. */
#include "checkpoint/weights_stream.h"

moe_status moe_weights_stream_begin(const moe_weights_gate *gate, moe_weights_stream *s,
                                    const char *pattern, int64_t layer, int64_t expert) {
  const moe_weights *w = gate->pass[0].weights;
  s->param = moe_params_at(&w->params, pattern, layer, expert);
  if (!s->param) return moe_fail(MOE_INVALID, "%s: no parameter %s", w->name, pattern);
  for (int i = 0; i < gate->passes; i++) {
    s->at[i] = 0;
    if (!gate->pass[i].seen) continue;
    if (!s->hash[i]) s->hash[i] = XXH3_createState();
    if (!s->hash[i]) return moe_fail(MOE_NO_MEMORY, "%s: no memory for a hash", w->name);
    XXH3_128bits_reset(s->hash[i]);
  }
  return MOE_OK;
}

moe_status moe_weights_stream_next(const moe_weights_gate *gate, moe_weights_stream *s, int i,
                                   int64_t count, float *values) {
  const moe_weights_pass *pass = &gate->pass[i];
  const moe_weights_watch *watch = gate->watch;
  moe_weights *w = pass->weights;
  int64_t index = s->param - gate->pass[0].weights->params.list;
  const moe_param *p = &w->params.list[index]; /* the source's own: found without a search */
  if (watch && watch->stop && *watch->stop)
    return moe_fail(MOE_STOPPED, "%s: stopped on request", w->name);
  if (i > 0 && w->exact && w->exact == pass[-1].weights)
    w->kind->round(w, p, count, values);
  else
    MOE_TRY(moe_weights_read(w, p, s->at[i], count, values));
  s->at[i] += count;
  if (watch && watch->passed) watch->passed(watch->context, count * (int64_t)sizeof *values);
  if (!pass->seen) return MOE_OK;
  XXH3_128bits_update(s->hash[i], values, (size_t)count * sizeof *values);
  if (s->at[i] < p->count) return MOE_OK;
  moe_weights_seen *seen = &pass->seen[index];
  seen->hash = XXH3_128bits_digest(s->hash[i]);
  seen->count += s->at[i];
  return MOE_OK;
}

void moe_weights_stream_release(moe_weights_stream *s) {
  for (int i = 0; i < MOE_WEIGHTS_PASSES; i++) XXH3_freeState(s->hash[i]);
}
