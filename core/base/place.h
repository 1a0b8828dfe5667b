/* Place: where this process is, told by the thread that trains, read by the one that watches.
 *
 * The trainer says which phase it enters, the device what runs next, the communication which
 * collective it is in. Each of these is a sign of life; moe_place.signs counts them, so a reader
 * that finds it unchanged knows how long nothing has happened without the writer reading a clock.
 * Writing costs a few stores. One thread writes; any may read. Texts must live for ever. */
#ifndef MOE_CORE_BASE_PLACE_H
#define MOE_CORE_BASE_PLACE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* name, what a person calls it, setting that limits it */
#define MOE_PHASE_MAP(X)                                   \
  X(START, "start", "run.watchdog_start_s")                \
  X(STEP, "step", "run.watchdog_step_s")                   \
  X(SAVE, "save", "run.watchdog_save_s")                   \
  X(EVALUATION, "evaluation", "run.watchdog_evaluation_s") \
  X(END, "end", "run.watchdog_start_s")

typedef enum {
#define X(name, text, setting) MOE_PHASE_##name,
  MOE_PHASE_MAP(X)
#undef X
      MOE_PHASES
} moe_phase;

const char *moe_phase_name(moe_phase phase);
const char *moe_phase_setting(moe_phase phase);

/* Begin a phase of step `step` (1 for the first; 0 before it). */
void moe_place_enter(moe_phase phase, int64_t step);
/* What runs next, and in which layer (-1: none). */
void moe_place_label(const char *what, int64_t layer);
/* Around a call that waits for other ranks. All ranks make the same calls in the same order. */
void moe_place_collective(const char *name);
/* Around a call that waits for something else. */
void moe_place_wait(const char *name);
/* The end of either. */
void moe_place_return(void);

typedef struct {
  moe_phase phase;
  int64_t step;
  const char *what; /* "experts forward", or "" */
  int64_t layer;
  const char *inside;     /* the call it is in, or "" */
  const char *collective; /* the last one begun, or "" */
  int64_t collectives;    /* begun so far */
  uint64_t signs;         /* of life so far */
} moe_place;

/* A new place is never read without its sign; the sign may come an instant before the place. */
moe_place moe_place_read(void);

#ifdef __cplusplus
}
#endif
#endif
