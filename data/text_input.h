/* Text input: files of text or JSON lines -> documents, in pieces.
 *
 * A document may be larger than memory, so it comes in pieces of at most MOE_TEXT_PIECE bytes, cut
 * before a newline where there is one. All text is checked to be UTF-8. */
#ifndef MOE_DATA_TEXT_INPUT_H
#define MOE_DATA_TEXT_INPUT_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_TEXT_PIECE = 1 << 18, MOE_TEXT_RECORD = 1 << 28 };

typedef enum { MOE_TEXT_AUTO, MOE_TEXT_PLAIN, MOE_TEXT_JSONL } moe_text_format;

/* What one document of a plain file is. */
typedef enum {
  MOE_DOCUMENT_FILE,       /* the file */
  MOE_DOCUMENT_BLANK_LINE, /* lines up to an empty one */
  MOE_DOCUMENT_LINE,       /* each line that is not empty */
  MOE_DOCUMENT_SEPARATOR   /* lines up to one that is the separator */
} moe_text_documents;

typedef struct {
  moe_text_format format; /* AUTO: JSON lines when the name ends in .jsonl, .ndjson or .json */
  moe_text_documents documents;
  const char *separator; /* MOE_DOCUMENT_SEPARATOR */
  const char *json_key;  /* the member that holds a record's text */
  bool skip_invalid;     /* leave out (and count) lines that are not UTF-8 or not such a record */
  const volatile sig_atomic_t *stop; /* may be NULL; non-zero: fail at the next read */
} moe_text_options;

typedef struct {
  const char *text; /* valid until the next call */
  int64_t length;   /* 0 only where a document ends after its last text */
  bool ends_document;
  const char *file; /* where it came from */
  int64_t offset;   /* bytes; of the line it begins in */
} moe_text_piece;

typedef struct {
  int64_t bytes;   /* read so far */
  int64_t total;   /* of all files, -1 when one is a pipe */
  int64_t skipped; /* lines left out for skip_invalid */
  int64_t empty;   /* records without text, left out */
} moe_text_counts;

typedef struct moe_text_input moe_text_input;

/* paths: files, "-" for standard input; kept by the caller, like what `options` points to. MOE_IO
 * when a file cannot be opened. Local. */
moe_status moe_text_open(const char *const *paths, int count, const moe_text_options *options,
                         moe_text_input **out);
void moe_text_close(moe_text_input *in);
/* The next piece, or *end. MOE_DAMAGED names file and byte offset of text that is not UTF-8, a NUL
 * byte, or a line that is no JSON record with the key. */
moe_status moe_text_next(moe_text_input *in, moe_text_piece *piece, bool *end);
moe_text_counts moe_text_progress(const moe_text_input *in);

#ifdef __cplusplus
}
#endif
#endif
