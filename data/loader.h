/* The loader: token files -> micro-batches, prepared ahead by a thread.
 *
 * The global sample sequence g = 0, 1, 2, ... is a pure function of (seed, blend, files): sample g
 * belongs to one file of the blend, and within it to place permute(seed, epoch, index). Ranks only
 * divide it: step s, micro-batch i, rank r, row b reads
 *     g = s * global_batch + i * (micro_batch * world) + r * micro_batch + b
 * so any number of ranks sees the same tokens and resume is exact. */
#ifndef MOE_DATA_LOADER_H
#define MOE_DATA_LOADER_H

#include "core/base/config.h"
#include "core/base/status.h"
#include "core/base/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_loader moe_loader;
typedef enum { MOE_SPLIT_TRAIN, MOE_SPLIT_VALID } moe_split;

/* Host arrays, valid until the next call of moe_loader_next. T = micro_batch * S. */
typedef struct {
  int64_t batch, seq;
  const int32_t *tokens;       /* [T] */
  const int32_t *targets;      /* [T] the next token */
  const int32_t *positions;    /* [T] for RoPE: from 0 in each sequence (document_mask: document) */
  const int32_t *doc_start;    /* [T] first visible position in the sequence; NULL: no mask */
  const int64_t *sample_index; /* [batch] g of each row */
} moe_batch;

/* Local. Opens and checks the files of config.data for `split`. rank, world: this rank's share.
 * MOE_USAGE when the blend is malformed or too short for one sample; MOE_DAMAGED names the file and
 * offset when a token file is bad. */
moe_status moe_loader_create(const moe_config *config, moe_split split, int rank, int world,
                             moe_loader **out);
void moe_loader_destroy(moe_loader *l);
/* Continue at the first sample of this step (training). Drops what was prefetched. */
moe_status moe_loader_seek(moe_loader *l, int64_t step);
/* Local. Waits for the prefetch thread. MOE_DAMAGED names file and offset of a token id outside
 * the vocabulary. */
moe_status moe_loader_next(moe_loader *l, moe_batch *out);
/* Samples per epoch (of the blend's largest relative demand: one pass over the first file to run
 * out), tokens in the split. */
int64_t moe_loader_epoch_samples(const moe_loader *l);
int64_t moe_loader_tokens(const moe_loader *l);
/* A hash of the files' identity (sizes and index contents), kept in checkpoints. */
uint64_t moe_loader_fingerprint(const moe_loader *l);

#ifdef __cplusplus
}
#endif
#endif
