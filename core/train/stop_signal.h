/* Stopping before the end: because a signal asked for it, or because time runs out. What a rank
 * finds here is its own; the trainer makes all ranks agree. Local, all of it. */
#ifndef MOE_CORE_TRAIN_STOP_SIGNAL_H
#define MOE_CORE_TRAIN_STOP_SIGNAL_H

#include <stdbool.h>

/* From here on TERM, INT and USR2 ask for a save and an end at the next step boundary; a second INT
 * ends the process at once. To be called first thing in main; later calls change nothing. */
void moe_stop_listen(void);
/* For what cannot be stopped that way: the signals do again what they did, and one that came
 * meanwhile does it now. */
void moe_stop_unlisten(void);
bool moe_stop_requested(void);

/* Time since moe_stop_listen against a limit. What is left must be enough for what comes before the
 * end: two stretches from one step boundary to the next and two saves (one may be going on), each
 * as long as the longest so far. */
typedef struct {
  double limit_s;   /* 0: none */
  double stretch_s; /* longest so far */
  double save_s;    /* likewise, or what one is expected to take */
  double last_s;    /* boundary */
} moe_wall_clock;

moe_wall_clock moe_wall_clock_start(double limit_s, double expected_save_s);
/* A save took this long. */
void moe_wall_clock_saved(moe_wall_clock *w, double seconds);
/* A step boundary. True: stop here. */
bool moe_wall_clock_is_up(moe_wall_clock *w);

#endif
