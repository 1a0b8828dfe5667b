/* One save, phase by phase (the commit protocol).
 *
 * A phase is work that each rank does alone, moe_save_work, and then an agreement,
 * moe_save_advance. The work touches only the disk and the save itself, so a thread may do it; the
 * agreement is short and needs no disk. moe_checkpoint_save does one after the other;
 * checkpoint/saver.h lets training go on meanwhile. */
#ifndef MOE_CHECKPOINT_SAVE_H
#define MOE_CHECKPOINT_SAVE_H

#include "checkpoint/commit.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  MOE_SAVE_WRITE,   /* every rank: its shard, on the disk */
  MOE_SAVE_PUBLISH, /* rank 0: the manifest, then the name */
  MOE_SAVE_VERIFY,  /* every rank: read its share back and compare hashes */
  MOE_SAVE_TIDY,    /* rank 0: `latest` and pruning; after a failure, undo all */
  MOE_SAVE_DONE
} moe_save_phase;

typedef struct {
  moe_comm *world;
  moe_device *dev; /* of the pieces; NULL: host memory */
  moe_run_state state;
  moe_piece *pieces;
  int n;
  moe_keep keep;
  moe_save_phase phase;
  moe_commit commit;
  /* what this rank wrote, as it is sent to rank 0: one moe_shard_file, then the slices */
  char *report;
  int64_t slices;
  /* rank 0: everyone's reports, one after the other */
  void *reports;
  int64_t *lengths;
  int64_t bytes;                    /* of all ranks' pieces */
  double started;                   /* moe_clock_s */
  double work_s[MOE_SAVE_DONE + 1]; /* how long the work of each phase took this rank */
  /* agreed by all ranks when TIDY begins */
  moe_status outcome;
  char message[1100];
  double seconds;
  double write_s, verify_s; /* the work of those phases, on the slowest rank */
} moe_save;

/* Collective. Prepare a save; state (with what it points to) and the list of pieces are copied, the
 * pieces' data is not. MOE_IO when the disk has no room for all ranks' pieces: that is seen now,
 * while none of them writes. On an error nothing is held. */
moe_status moe_save_open(moe_comm *world, moe_device *dev, const char *run_dir,
                         const moe_run_state *state, const moe_piece *pieces, int n, moe_keep keep,
                         moe_save *out);
/* Local. The work of the present phase. */
moe_status moe_save_work(moe_save *s);
/* Collective. `mine` is what this rank's work came to, with its message in moe_error_message. Goes
 * on to the next phase. An error is one of communication; those of the save are in `outcome`. */
moe_status moe_save_advance(moe_save *s, moe_status mine);
/* Local. Releases everything; a zeroed save is fine. */
void moe_save_close(moe_save *s);

#ifdef __cplusplus
}
#endif
#endif
