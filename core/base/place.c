/* Where this process is.
 *
 * The one thing that must hold: who sees a new phase or place also sees a new sign of life, lest
 * the time since an old sign be held against a new phase's limit. So a sign is given before what it
 * is a sign of, and read after it. */
#include "core/base/place.h"

#include <stdatomic.h>

static struct {
  _Atomic int phase;
  _Atomic int64_t step, layer, collectives;
  const char *_Atomic what, *_Atomic inside, *_Atomic collective;
  _Atomic uint64_t signs;
} now = {.layer = -1, .what = "", .inside = "", .collective = ""};

#define PUT(member, value) atomic_store_explicit(&now.member, (value), memory_order_release)
#define GET(member) atomic_load_explicit(&now.member, memory_order_acquire)

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

void moe_place_enter(moe_phase phase, int64_t step) {
  sign();
  PUT(phase, (int)phase);
  PUT(step, step);
  moe_place_label("", -1);
}

void moe_place_label(const char *what, int64_t layer) {
  sign();
  PUT(what, what);
  PUT(layer, layer);
}

void moe_place_collective(const char *name) {
  sign();
  PUT(collective, name);
  PUT(collectives, GET(collectives) + 1);
  moe_place_wait(name);
}

void moe_place_wait(const char *name) {
  sign();
  PUT(inside, name);
}

void moe_place_return(void) {
  sign();
  PUT(inside, "");
}

moe_place moe_place_read(void) {
  moe_place p = {.phase = (moe_phase)GET(phase),
                 .step = GET(step),
                 .what = GET(what),
                 .layer = GET(layer),
                 .inside = GET(inside),
                 .collective = GET(collective),
                 .collectives = GET(collectives)};
  p.signs = GET(signs);
  return p;
}
