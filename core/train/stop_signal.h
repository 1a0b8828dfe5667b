/* Stopping on request: TERM, INT and USR2 ask for a save and an end at the next step boundary. */
#ifndef MOE_CORE_TRAIN_STOP_SIGNAL_H
#define MOE_CORE_TRAIN_STOP_SIGNAL_H

#include <stdbool.h>

/* Install the handlers. A second INT ends the process at once. */
void moe_stop_listen(void);
bool moe_stop_requested(void);

#endif
