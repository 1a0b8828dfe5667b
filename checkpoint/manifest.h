/* The manifest: what a checkpoint holds and where, as JSON (manifest.json).
 *
 * The idea: a checkpoint is a set of slices, element ranges of global tensors, each one dataset of
 * one shard file. The manifest lists them all with a hash, so whoever knows the manifest can fetch
 * any range of any tensor without asking who wrote it. Its numbers are not trusted: a manifest that
 * moe_manifest_check accepted is consistent in itself (every tensor whole, no two slices over the
 * same elements or bytes, nothing beyond its file). All functions are local. */
#ifndef MOE_CHECKPOINT_MANIFEST_H
#define MOE_CHECKPOINT_MANIFEST_H

#include <xxhash.h>

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MOE_SCHEMA_MAJOR = 1, /* differs: this program cannot read it */
  MOE_SCHEMA_MINOR = 0, /* higher: fields were added that may be ignored */
  MOE_SHARD_NAME = 64,
  MOE_DATASET_PATH = 160,
  MOE_HASH_TEXT = 33,
  MOE_MANIFEST_LIMIT = 64 << 20 /* bytes; about 300 per slice */
};

/* Elements [begin, begin + count) of a global tensor, as one dataset of a shard file. */
typedef struct {
  char name[96];
  moe_role role;
  moe_dtype dtype;
  int dims;
  int64_t shape[2]; /* of the whole tensor */
  int64_t begin, count;
  int file;       /* index into moe_manifest.file */
  int64_t offset; /* of its bytes in that file */
  XXH128_hash_t hash;
} moe_slice;

typedef struct {
  char name[MOE_SHARD_NAME]; /* in the checkpoint's folder */
  int64_t size;
  XXH128_hash_t metadata; /* of all bytes that belong to no dataset */
} moe_shard_file;

typedef struct {
  moe_run_state state;
  int ranks; /* that wrote it */
  int files;
  moe_shard_file *file;
  int64_t slices;
  moe_slice *slice; /* by role, name, begin */
  /* made by moe_manifest_check: slices by file, then offset; those of file i are
   * by_offset[first[i]] up to first[i + 1] */
  const moe_slice **by_offset;
  int64_t *first;
} moe_manifest;

const char *moe_role_name(moe_role role);
/* 32 hexadecimal digits, as xxhsum -H2 prints them. Returns `text`. */
const char *moe_hash_text(XXH128_hash_t hash, char text[MOE_HASH_TEXT]);
/* Elements of the whole tensor; -1 when the shape is not usable (dims not 1 or 2, an extent below
 * 1, more than INT64_MAX bytes). */
int64_t moe_slice_total(const moe_slice *s);
int64_t moe_slice_bytes(const moe_slice *s);
/* "/ROLE/NAME", and "/ROLE/NAME@BEGIN" when the slice is only a part. Returns `path`. */
const char *moe_slice_dataset(const moe_slice *s, char path[MOE_DATASET_PATH]);

/* Sort the slices, check everything, and build the index by file. `where` opens messages.
 * MOE_DAMAGED names the tensor or file and what is wrong. */
moe_status moe_manifest_check(moe_manifest *m, const char *where);
/* Index of the first slice of a tensor, or -1; its slices follow each other up to the total. */
int64_t moe_manifest_find(const moe_manifest *m, moe_role role, const char *name);
bool moe_manifest_has_role(const moe_manifest *m, moe_role role);
/* Releases what the manifest holds, state included. */
void moe_manifest_clear(moe_manifest *m);

/* Write DIR/manifest.json (a new file) and fsync it. MOE_IO. */
moe_status moe_manifest_write(const moe_manifest *m, const char *dir);
/* Read and check DIR/manifest.json. MOE_DAMAGED, MOE_IO or MOE_NO_MEMORY; then *out is empty. */
moe_status moe_manifest_read(const char *dir, moe_manifest *out);
/* The same from memory. */
moe_status moe_manifest_parse(const char *text, int64_t length, const char *where,
                              moe_manifest *out);

#ifdef __cplusplus
}
#endif
#endif
