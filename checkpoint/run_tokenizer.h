/* Which tokenizer belongs to a checkpoint. */
#ifndef MOE_CHECKPOINT_RUN_TOKENIZER_H
#define MOE_CHECKPOINT_RUN_TOKENIZER_H

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

/* For moe_tokenizer_open: a path or "bytes"; "" when there is none. In this order: `chosen` (an
 * option; "none" for none; NULL: not given), RUN/tokenizer.model, data.tokenizer of `config` (the
 * INI text of the run, or NULL). MOE_USAGE when what is named is not there. Local. */
moe_status moe_run_tokenizer(const char *step_folder, const char *config, const char *chosen,
                             char name[MOE_PATH]);

#ifdef __cplusplus
}
#endif
#endif
