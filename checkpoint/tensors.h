/* A checkpoint's tensors, streamed: whoever wants tensors whole and in order (inspect, diff,
 * reshard, weights) reads it here, whatever slices and files it lies in.
 *
 * Bytes are hashed as they pass, and the end of each slice is where its hash is checked: what was
 * read before may be wrong until then. All functions are local. */
#ifndef MOE_CHECKPOINT_TENSORS_H
#define MOE_CHECKPOINT_TENSORS_H

#include "checkpoint/shard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_tensors moe_tensors;

/* Open a step folder: its manifest, and that its model is whole. MOE_DAMAGED, MOE_IO. */
moe_status moe_tensors_open(const char *step_folder, moe_tensors **out);
void moe_tensors_close(moe_tensors *t);
const moe_manifest *moe_tensors_manifest(const moe_tensors *t);
/* Index of the slice after the tensor that begins with slice `first`. */
int64_t moe_tensors_end(const moe_tensors *t, int64_t first);

/* Where reading is. An open checkpoint has any number of readers, up to MOE_TENSOR_READERS of them
 * in the middle of something, in any threads. */
enum { MOE_TENSOR_READERS = 64 };
typedef struct {
  moe_tensors *from;
  int64_t slice, end; /* the one being read, and the end of the tensor's */
  int64_t done;       /* elements of that slice that were read */
  int place;          /* of the open file */
  bool open;
  moe_dataset dataset;
  XXH3_state_t *hash;
} moe_tensor_reader;

/* At the beginning of the tensor whose first slice is `first`. */
moe_status moe_tensor_reader_open(moe_tensors *t, int64_t first, moe_tensor_reader *out);
/* The next `count` elements, in the type of the checkpoint; the tensor has as many left. */
moe_status moe_tensor_reader_next(moe_tensor_reader *r, int64_t count, void *out);
void moe_tensor_reader_close(moe_tensor_reader *r);

#ifdef __cplusplus
}
#endif
#endif
