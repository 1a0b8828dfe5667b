/* Where this process is, in relaxed atomics: each is right on its own, and nothing is done with
 * them that needs two to be of the same instant. */
#include "core/base/progress.h"

#include <stdatomic.h>

static struct {
  _Atomic int phase;
  _Atomic int64_t step, layer, collectives;
  const char *_Atomic what, *_Atomic inside, *_Atomic collective;
  _Atomic uint64_t signs;
} now = {.layer = -1, .what = "", .inside = "", .collective = ""};

#define PUT(member, value) atomic_store_explicit(&now.member, (value), memory_order_relaxed)
#define GET(member) atomic_load_explicit(&now.member, memory_order_relaxed)

const char *moe_phase_name(moe_phase phase) {
  static const char *const names[] = {
#define X(name, text, setting) text,
      MOE_PHASE_MAP(X)
#undef X
  };
  return phase < MOE_PHASES ? names[phase] : "unknown phase";
}

const char *moe_phase_setting(moe_phase phase) {
  static const char *const settings[] = {
#define X(name, text, setting) setting,
      MOE_PHASE_MAP(X)
#undef X
  };
  return phase < MOE_PHASES ? settings[phase] : "";
}

/* There is one writer, so no addition is lost. */
static void sign(void) {
  PUT(signs, GET(signs) + 1);
}

void moe_progress_enter(moe_phase phase, int64_t step) {
  PUT(phase, (int)phase);
  PUT(step, step);
  moe_progress_label("", -1);
}

void moe_progress_label(const char *what, int64_t layer) {
  PUT(what, what);
  PUT(layer, layer);
  sign();
}

void moe_progress_collective(const char *name) {
  PUT(collective, name);
  PUT(collectives, GET(collectives) + 1);
  moe_progress_wait(name);
}

void moe_progress_wait(const char *name) {
  PUT(inside, name);
  sign();
}

void moe_progress_return(void) {
  PUT(inside, "");
  sign();
}

moe_place moe_progress_read(void) {
  moe_place p = {.phase = (moe_phase)GET(phase),
                 .step = GET(step),
                 .what = GET(what),
                 .layer = GET(layer),
                 .inside = GET(inside),
                 .collective = GET(collective),
                 .collectives = GET(collectives),
                 .signs = GET(signs)};
  return p;
}
