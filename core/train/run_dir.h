/* The run's folder: what stands in it beside checkpoints and curves.
 *
 *   RUN/config.ini          the configuration as resolved, of the latest start
 *   RUN/tokenizer.model     a copy of data.tokenizer, when that is a file
 *   RUN/provenance.jsonl    one line per start: when, what program, where, on what
 *
 * docs/formats.md lists the keys. */
#ifndef MOE_CORE_TRAIN_RUN_DIR_H
#define MOE_CORE_TRAIN_RUN_DIR_H

#include "core/train/engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Room for checkpoints on the run's disk. */
typedef struct {
  int64_t free; /* bytes */
  int64_t each; /* bytes of a checkpoint */
  int64_t more; /* checkpoints that come before anything is pruned: keep + 1, less what is there */
} moe_run_disk;
/* Local. MOE_IO when the folder of checkpoints cannot be read. */
moe_status moe_run_disk_of(const moe_config *config, moe_run_disk *out);
/* Local, for one rank. MOE_IO when a run that saves has no room for a single checkpoint; a warning
 * when it has too little for all that it will keep. */
moe_status moe_run_dir_check_disk(const moe_config *config);

/* Local, for one rank: write config.ini. */
moe_status moe_run_dir_write_config(const moe_config *config);
/* Local, for one rank: keep data.tokenizer with the run, so that text can be generated wherever the
 * folder goes. Training needs none: what cannot be copied is a warning. */
void moe_run_dir_keep_tokenizer(const moe_config *config);
/* Collective: append this start to provenance.jsonl; `step` is where it begins, `from` the
 * checkpoint or "". What cannot be written is a warning. */
moe_status moe_run_dir_record_start(const moe_engine *e, int64_t step, const char *from);

#ifdef __cplusplus
}
#endif
#endif
