/* Shards: writing one rank's pieces to a file, and checking a file against the manifest.
 *
 * No function here communicates, and moe_shard_write touches nothing but its arguments: a thread
 * may call it on a snapshot of host memory. All are local. */
#ifndef MOE_CHECKPOINT_SHARD_H
#define MOE_CHECKPOINT_SHARD_H

#include "checkpoint/hdf5_file.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes fetched, hashed and written at a time: what is copied in stays in the processor's cache
 * until it is copied out. All fetches of a piece but the last are for as many elements. */
enum { MOE_SHARD_PART = 1 << 20 };
static inline int64_t moe_shard_step(const moe_piece *p) {
  return MOE_SHARD_PART / moe_dtype_size(p->dtype);
}

/* Write pieces[0..n) (those with elements) to the new file `path`, fsynced. slices[0..n) receive
 * one entry per written piece, *written how many, *file the size and metadata hash (the names and
 * numbers of files are the caller's). Piece data is memory of `dev`; NULL: host memory. When all of
 * them are any_thread's, they are shared out over the processors.
 * MOE_IO leaves the file to be deleted by the caller. */
moe_status moe_shard_write(const char *path, moe_device *dev, const moe_piece *pieces, int n,
                           moe_slice *slices, int64_t *written, moe_shard_file *file);
/* Open file number i of the checkpoint in folder `dir` after checking its kind, size and the hash
 * of its metadata. MOE_DAMAGED names the file. */
moe_status moe_shard_open(const char *dir, const moe_manifest *m, int i, moe_hdf5 *out);
/* Read the whole file: metadata, structure and every dataset's hash. Uses a few threads. */
moe_status moe_shard_verify(const char *dir, const moe_manifest *m, int i);
/* MOE_DAMAGED naming the dataset unless both hashes are equal. */
moe_status moe_shard_compare_hash(const moe_hdf5 *f, const moe_slice *s, XXH128_hash_t got);

#ifdef __cplusplus
}
#endif
#endif
