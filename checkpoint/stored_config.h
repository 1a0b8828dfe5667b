/* The configuration that a checkpoint carries. */
#ifndef MOE_CHECKPOINT_STORED_CONFIG_H
#define MOE_CHECKPOINT_STORED_CONFIG_H

#include "core/base/config.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Read `text` (moe_run_state.config) and resolve it; the caller frees *out. Nobody wrote it by
 * hand, so whatever is wrong with it is MOE_DAMAGED, as is its absence; the message says so when it
 * has a key that a newer version must have written. `where` opens messages. Local. */
moe_status moe_stored_config(const char *text, const char *where, moe_config **out);

#ifdef __cplusplus
}
#endif
#endif
