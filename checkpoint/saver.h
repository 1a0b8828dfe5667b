/* Saves in the background.
 *
 * A save begins with a copy to host memory at a step boundary; a thread writes, hashes and verifies
 * while training goes on. What ranks must agree on between the phases of a save (checkpoint/save.h)
 * is done by the main thread, in moe_saver_poll at later step boundaries: so MPI is called from one
 * thread only, and no step waits for a disk. Without memory for a copy everything happens in
 * moe_saver_begin. */
#ifndef MOE_CHECKPOINT_SAVER_H
#define MOE_CHECKPOINT_SAVER_H

#include "checkpoint/save.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_saver moe_saver;

/* What became of a save. */
typedef struct {
  bool news;         /* one has ended; otherwise nothing below is set */
  moe_status status; /* MOE_OK: it is there, and verified */
  const char *message;
  int64_t step, bytes;
  double seconds; /* from begin until it was verified, with what ranks waited between phases */
  double write_s, verify_s; /* of it: until all was on the disk, and reading it back */
  double held_s;            /* how long training waited in moe_saver_begin */
} moe_saved;

/* Collective. memory: bytes of host memory to copy to on this rank, or 0 on all ranks: saves then
 * hold training until they are done. run_dir must stay. */
moe_status moe_saver_create(moe_comm *world, moe_device *dev, const char *run_dir, moe_keep keep,
                            int64_t memory, moe_saver **out);
/* Local. Waits for the thread; a save that was not polled to its end stays invisible. */
void moe_saver_destroy(moe_saver *s);

/* Collective. Begin to save what the pieces hold now; afterwards they may change. An error means
 * that nothing was begun; how the save itself went, moe_saver_poll tells. MOE_INVALID while one is
 * going on. */
moe_status moe_saver_begin(moe_saver *s, const moe_run_state *state, const moe_piece *pieces,
                           int n);
/* Collective. Bring a save forward as far as it goes without waiting for a disk, or with `wait` to
 * its end; all ranks get the same news. An error is one of communication. */
moe_status moe_saver_poll(moe_saver *s, bool wait, moe_saved *out);
/* Local. Is a save going on? The same on all ranks. */
bool moe_saver_busy(const moe_saver *s);

#ifdef __cplusplus
}
#endif
#endif
