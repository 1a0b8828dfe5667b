/* Token files: Megatron-Core's indexed dataset, a pair PREFIX.bin and PREFIX.idx (little-endian).
 *
 *     PREFIX.bin   the tokens of all documents, one after another, uint16 or int32
 *     PREFIX.idx   byte  0   char[9]   "MMIDIDX\0\0"
 *                        9   u64       version, 1
 *                       17   u8        token type: 8 uint16, 4 int32 (others are refused)
 *                       18   u64       sequences S
 *                       26   u64       documents + 1
 *                       34   i32[S]    length of each sequence, tokens
 *                            i64[S]    where it begins in .bin, bytes
 *                            i64[]     first sequence of each document, then S
 *
 * A document is a range of sequences; we write one sequence per document (more only beyond 2^31-1
 * tokens). Sequences must lie in .bin without gaps, as Megatron's writer always lays them, so the
 * file is one stream of tokens and a document a range of it.
 * Source: megatron/core/datasets/indexed_dataset.py. */
#ifndef MOE_DATA_TOKEN_FILE_H
#define MOE_DATA_TOKEN_FILE_H

#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The format's codes of the token types we read. */
typedef enum { MOE_TOKENS_I32 = 4, MOE_TOKENS_U16 = 8 } moe_token_type;

enum { MOE_TOKEN_HEADER_BYTES = 34 };

typedef struct moe_token_file moe_token_file;

/* Open PREFIX.bin and PREFIX.idx (either name is understood as the prefix) and check the whole
 * index against itself and the size of .bin: nothing later depends on an unchecked number.
 * Local; a file may be read by several threads. MOE_IO when a file cannot be opened; MOE_DAMAGED
 * names file and byte offset. */
moe_status moe_token_file_open(const char *prefix, moe_token_file **out);
/* The same over memory the caller keeps; `name` stands for the prefix in messages. */
moe_status moe_token_file_parse(const void *index, int64_t index_size, const void *bin,
                                int64_t bin_size, const char *name, moe_token_file **out);
void moe_token_file_close(moe_token_file *f);

const char *moe_token_file_prefix(const moe_token_file *f);
moe_token_type moe_token_file_type(const moe_token_file *f);
int64_t moe_token_file_tokens(const moe_token_file *f);
int64_t moe_token_file_documents(const moe_token_file *f);
int64_t moe_token_file_sequences(const moe_token_file *f);
int64_t moe_token_file_bytes(const moe_token_file *f); /* both files */
/* A hash of the index and the size of .bin: which file this is. */
uint64_t moe_token_file_fingerprint(const moe_token_file *f);

/* First token of document d, 0 <= d <= documents; of `documents`: the number of tokens. */
int64_t moe_token_file_document_begin(const moe_token_file *f, int64_t d);
/* The document that holds a token, 0 <= token < tokens. O(log documents). */
int64_t moe_token_file_document_of(const moe_token_file *f, int64_t token);

/* out[i] = token begin + i, i < count. MOE_INVALID outside the file; MOE_DAMAGED names .bin and the
 * byte offset of an id outside [0, vocab_size); MOE_IO when reading fails. */
moe_status moe_token_file_read(const moe_token_file *f, int64_t begin, int64_t count,
                               int64_t vocab_size, int32_t *out);

const char *moe_token_type_name(moe_token_type type);
int64_t moe_token_type_size(moe_token_type type);
/* The smaller type that holds every id of a vocabulary. */
moe_token_type moe_token_type_for(int64_t vocab_size);

/* ---- writing ---- */

typedef struct moe_token_writer moe_token_writer;

/* Start PREFIX.bin and .idx under temporary names in the same folder. The pair appears only when
 * moe_token_writer_finish succeeds. MOE_USAGE when the names are too long; MOE_IO. */
moe_status moe_token_writer_create(const char *prefix, int64_t vocab_size, moe_token_writer **out);
/* Append tokens to the current document. MOE_INVALID names an id outside the vocabulary. */
moe_status moe_token_writer_append(moe_token_writer *w, const int32_t *ids, int64_t count);
/* The current document is complete. One without tokens is left out. */
moe_status moe_token_writer_end_document(moe_token_writer *w);
int64_t moe_token_writer_tokens(const moe_token_writer *w);
int64_t moe_token_writer_documents(const moe_token_writer *w);
/* Write the index, bring both files to disk and give them their names, replacing an older pair: its
 * .idx goes first, so that a crash at any instant leaves a complete pair or none. */
moe_status moe_token_writer_finish(moe_token_writer *w);
/* Without a finish: removes the temporary files. Accepts NULL. */
void moe_token_writer_destroy(moe_token_writer *w);

#ifdef __cplusplus
}
#endif
#endif
