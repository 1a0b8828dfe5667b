/* The sample sequence: what tokens global sample g = 0, 1, 2, ... has. No state, no threads.
 *
 * A split of a file is a range of its documents, and so of its tokens [begin, end). Its samples are
 * windows of S+1 tokens at stride S (the last token of a window is the first of the next: every
 * token is predicted once); what is left at the end, less than a window, is not read. Sample g is
 * number `index` of one file (blend.h); with n samples in that file it is window
 * permute(seed, epoch index / n, index % n). */
#ifndef MOE_DATA_SAMPLES_H
#define MOE_DATA_SAMPLES_H

#include "core/base/config.h"
#include "core/base/status.h"
#include "data/loader.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_samples moe_samples;

/* One row of a micro-batch, [S] each; doc_start may be NULL: no document mask. */
typedef struct {
  int32_t *tokens, *targets, *positions, *doc_start;
} moe_sample_row;

/* Local. Errors as moe_loader_create. */
moe_status moe_samples_open(const moe_config *config, moe_split split, moe_samples **out);
void moe_samples_close(moe_samples *s);
/* Local; may be called by several threads. window [S+1] is room to work in. */
moe_status moe_samples_read(const moe_samples *s, int64_t g, int32_t *window, moe_sample_row row);

int64_t moe_samples_sequence_length(const moe_samples *s);
int64_t moe_samples_epoch(const moe_samples *s);  /* samples until a file repeats one */
int64_t moe_samples_tokens(const moe_samples *s); /* in the split, all files */
uint64_t moe_samples_fingerprint(const moe_samples *s);

#ifdef __cplusplus
}
#endif
#endif
