/* GGUF, the file llama.cpp loads: the format, and its element types.
 *
 *   "GGUF" | u32 version 3 | u64 tensors | u64 keys                                little-endian
 *   each key:     string name | u32 type | value      array: u32 type of elements | u64 count | ...
 *   each tensor:  string name | u32 dims | u64 ne[dims] | u32 type | u64 offset
 *   zeros up to a multiple of the alignment (32, or the key general.alignment)
 *   each tensor's data at its offset from here, zeros up to the alignment again
 *
 *   string: u64 length | bytes. ne[0] is the innermost extent: our [rows, columns] is ne =
 * {columns, rows}, and the experts of a layer are one tensor {columns, rows, E}.
 *
 * Writing (gguf_write.c) and reading (gguf_read.c) share nothing but these declarations, so that an
 * export is proven by code that does not know how it was made. All functions are local.
 * Source: ggml's docs/gguf.md and gguf.h. */
#ifndef MOE_CHECKPOINT_GGUF_H
#define MOE_CHECKPOINT_GGUF_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_GGUF_VERSION = 3, MOE_GGUF_ALIGNMENT = 32, MOE_GGUF_DIMS = 4, MOE_GGUF_NAME = 64 };

/* Types of values, by their numbers in the file. */
typedef enum {
  MOE_GGUF_U8,
  MOE_GGUF_I8,
  MOE_GGUF_U16,
  MOE_GGUF_I16,
  MOE_GGUF_U32,
  MOE_GGUF_I32,
  MOE_GGUF_F32,
  MOE_GGUF_BOOL,
  MOE_GGUF_STRING,
  MOE_GGUF_ARRAY,
  MOE_GGUF_U64,
  MOE_GGUF_I64,
  MOE_GGUF_F64,
  MOE_GGUF_VALUES
} moe_gguf_value;

/* Types of elements that are written and read here: number, name, elements and bytes of a block.
 * A block of Q8_0 is a float16 scale d and 32 bytes q: x = d q. */
#define MOE_GGML_MAP(X)      \
  X(F32, 0, "F32", 1, 4)     \
  X(F16, 1, "F16", 1, 2)     \
  X(Q8_0, 8, "Q8_0", 32, 34) \
  X(BF16, 30, "BF16", 1, 2)

typedef enum {
#define X(id, number, name, elements, bytes) MOE_GGML_##id = number,
  MOE_GGML_MAP(X)
#undef X
} moe_ggml_type;

/* NULL for a number that is none of the above. */
const char *moe_ggml_name(int64_t type);
/* Elements per block, and bytes of `elements` (whole blocks) of them. */
int64_t moe_ggml_block(moe_ggml_type type);
int64_t moe_ggml_bytes(moe_ggml_type type, int64_t elements);
/* n elements (whole blocks) to their stored form, round to nearest. In gguf_write.c. */
void moe_ggml_encode(moe_ggml_type type, const float *x, int64_t n, void *out);
/* The other way. In gguf_read.c. */
void moe_ggml_decode(moe_ggml_type type, const void *data, int64_t n, float *out);

/* ---- writing: first all keys and tensors, then all data */

typedef struct moe_gguf_writer moe_gguf_writer;

moe_status moe_gguf_writer_create(moe_gguf_writer **out);
/* Releases; an unfinished file stays, for the caller to delete. NULL is fine. */
void moe_gguf_writer_destroy(moe_gguf_writer *w);
/* Keys. Memory that runs out is told by moe_gguf_writer_open. */
void moe_gguf_put_u32(moe_gguf_writer *w, const char *key, uint32_t value);
void moe_gguf_put_f32(moe_gguf_writer *w, const char *key, float value);
void moe_gguf_put_bool(moe_gguf_writer *w, const char *key, bool value);
void moe_gguf_put_string(moe_gguf_writer *w, const char *key, const char *value);
void moe_gguf_put_strings(moe_gguf_writer *w, const char *key, const char *const *values,
                          int64_t n);
void moe_gguf_put_f32s(moe_gguf_writer *w, const char *key, const float *values, int64_t n);
void moe_gguf_put_i32s(moe_gguf_writer *w, const char *key, const int32_t *values, int64_t n);
/* A tensor; its innermost extent is a multiple of the type's block. Returns where its data is to be
 * in the file's data. */
int64_t moe_gguf_put_tensor(moe_gguf_writer *w, const char *name, moe_ggml_type type, int dims,
                            const int64_t *ne);
/* Bytes of the whole file. */
int64_t moe_gguf_writer_size(const moe_gguf_writer *w);
/* Make the file (new), set its room aside and write everything but the data. MOE_IO, MOE_NO_MEMORY.
 */
moe_status moe_gguf_writer_open(moe_gguf_writer *w, const char *path);
/* Bytes [at, at + bytes) of the data, of a tensor. Any threads, each byte once. */
moe_status moe_gguf_writer_write(moe_gguf_writer *w, int64_t at, int64_t bytes, const void *data);
/* Everything is there: fsync and close. */
moe_status moe_gguf_writer_finish(moe_gguf_writer *w);

/* ---- reading: nothing in the file is trusted */

typedef struct {
  moe_gguf_value type;
  moe_gguf_value element; /* of an array */
  int64_t count;          /* of an array; bytes of a string; else 1 */
  const void *data;       /* in the file, unaligned; strings of an array with their lengths */
} moe_gguf_entry;

typedef struct {
  char name[MOE_GGUF_NAME];
  moe_ggml_type type;
  int dims;
  int64_t ne[MOE_GGUF_DIMS];       /* 1 beyond dims */
  int64_t elements, bytes, offset; /* offset in the file */
} moe_gguf_tensor;

typedef struct moe_gguf moe_gguf;

/* Open a regular file and check all of it but the data: every length against the size of the file
 * before anything is allocated, no key or tensor twice, no tensor beyond the end or over another.
 * MOE_DAMAGED names the byte. */
moe_status moe_gguf_open(const char *path, moe_gguf **out);
/* The same from memory, which must outlive it. (Fuzzed.) */
moe_status moe_gguf_parse(const void *data, int64_t size, const char *name, moe_gguf **out);
void moe_gguf_close(moe_gguf *g);

/* False when there is no such key. */
bool moe_gguf_find(const moe_gguf *g, const char *key, moe_gguf_entry *out);
/* An integer of any type, a number, a string (malloc'd) under `key`. MOE_DAMAGED when it is missing
 * or of another kind; integers must be from 0 to INT64_MAX. */
moe_status moe_gguf_int(const moe_gguf *g, const char *key, int64_t *out);
moe_status moe_gguf_number(const moe_gguf *g, const char *key, double *out);
moe_status moe_gguf_text(const moe_gguf *g, const char *key, char **out);
/* NULL when there is none. */
const moe_gguf_tensor *moe_gguf_tensor_find(const moe_gguf *g, const char *name);
int64_t moe_gguf_tensors(const moe_gguf *g);
/* Elements [begin, begin + count), whole blocks, as they are stored. MOE_IO, MOE_DAMAGED. */
moe_status moe_gguf_read(const moe_gguf *g, const moe_gguf_tensor *t, int64_t begin, int64_t count,
                         void *out);

#ifdef __cplusplus
}
#endif
#endif
