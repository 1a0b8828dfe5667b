/* A checkpoint's tensors, streamed: whoever wants tensors whole and in order (inspect, diff,
 * reshard, weights) reads it here, whatever slices and files it lies in.
 *
 * Bytes are hashed as they pass, and the end of each slice is where its hash is checked: what was
 * read before may be wrong until then. All functions are local. */
#ifndef MOE_CHECKPOINT_TENSORS_H
#define MOE_CHECKPOINT_TENSORS_H

#include "checkpoint/manifest.h"

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

/* Elements [begin, begin + count) of the tensor whose first slice is `first`, in the checkpoint's
 * type. Whoever reads a tensor in order, in as many calls as it likes, reads each byte once;
 * reading elsewhere in it begins anew. Any threads, up to MOE_TENSORS_READ tensors at a time.
 * MOE_DAMAGED, MOE_IO. */
enum { MOE_TENSORS_READ = 64 };
moe_status moe_tensors_read(moe_tensors *t, int64_t first, int64_t begin, int64_t count, void *out);

#ifdef __cplusplus
}
#endif
#endif
