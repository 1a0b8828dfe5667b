/* safetensors files: named tensors after a JSON header.
 *
 *   u64 little-endian   length of the header, at most MOE_SAFETENSORS_HEADER
 *   header              {"NAME": {"dtype": "BF16", "shape": [R, C], "data_offsets": [from, to]},
 *                        ..., "__metadata__": {"KEY": "text"}}, padded with blanks
 *   data                the tensors, little-endian, row-major, one after the other without gaps;
 *                       offsets count from here
 *
 * Writing and reading share nothing but this page, so that reading back proves something. All
 * functions are local. Source: https://github.com/huggingface/safetensors (format). */
#ifndef MOE_CHECKPOINT_SAFETENSORS_H
#define MOE_CHECKPOINT_SAFETENSORS_H

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_SAFETENSORS_HEADER = 16 << 20, MOE_SAFETENSORS_DIMS = 4 };

/* ---- writing -----------------------------------------------------------------------------------
 */

typedef struct {
  char name[96];
  moe_dtype dtype; /* f32, bf16 or f16 */
  int dims;
  int64_t shape[2];
} moe_safetensors_entry;

typedef struct {
  int fd;       /* -1: closed */
  int64_t data; /* where it begins in the file */
  int64_t size; /* its bytes */
  int64_t left; /* of them, still to come */
  char path[MOE_PATH];
} moe_safetensors_writer;

/* Make a new file that will hold these tensors in this order, set its room aside on the disk and
 * write the header. MOE_IO. */
moe_status moe_safetensors_create(const char *path, const moe_safetensors_entry *entries, int64_t n,
                                  moe_safetensors_writer *out);
/* Bytes [at, at + bytes) of the data. Any threads, each byte once. */
moe_status moe_safetensors_write(moe_safetensors_writer *w, int64_t at, int64_t bytes,
                                 const void *data);
/* All data was given: fsync and close. */
moe_status moe_safetensors_finish(moe_safetensors_writer *w);
/* Close a file that is given up; its removal is the caller's. Safe after finish. */
void moe_safetensors_abandon(moe_safetensors_writer *w);

/* ---- reading -----------------------------------------------------------------------------------
 */

typedef struct {
  char *name;
  bool readable; /* f32, bf16 or f16: dtype says which */
  moe_dtype dtype;
  int dims;
  int64_t shape[MOE_SAFETENSORS_DIMS];
  int64_t count;  /* elements */
  int64_t offset; /* of its bytes in the file */
} moe_safetensor;

typedef struct {
  int fd; /* -1: closed, or parsed from memory */
  char path[MOE_PATH];
  int64_t count;
  moe_safetensor *list; /* by name */
} moe_safetensors;

/* Open a file and check its whole header. MOE_DAMAGED names the tensor and what is wrong. */
moe_status moe_safetensors_open(const char *path, moe_safetensors *out);
/* The header alone, from memory; data_bytes follow it. For files and fuzzing. */
moe_status moe_safetensors_parse(const char *header, int64_t length, int64_t data_bytes,
                                 const char *where, moe_safetensors *out);
/* Safe on a zeroed one. */
void moe_safetensors_close(moe_safetensors *f);
/* NULL when there is none of this name. */
const moe_safetensor *moe_safetensors_find(const moe_safetensors *f, const char *name);
/* Elements [begin, begin + count) of a readable tensor as they lie in the file. */
moe_status moe_safetensors_read(const moe_safetensors *f, const moe_safetensor *t, int64_t begin,
                                int64_t count, void *out);

#ifdef __cplusplus
}
#endif
#endif
