/* Lines of a file or pipe, with their byte offsets; a long one in parts. Used by text_input.c. */
#ifndef MOE_DATA_LINE_READER_H
#define MOE_DATA_LINE_READER_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char *name; /* for messages */
  int fd;
  bool at_end; /* of the file; the buffer may hold more */
  const volatile sig_atomic_t *stop;
  char *buffer;
  int64_t room, begin, end; /* unread bytes are buffer[begin, end) */
  int64_t offset;           /* of buffer[begin] in the file */
  bool inside;              /* the last part did not end its line */
} moe_line_reader;

typedef struct {
  const char *text; /* without the newline; valid until the next call */
  int64_t length, offset;
  bool begins, ends; /* the line begins or ends with this part */
  bool newline;      /* it ended in a newline, not at the end of the file */
} moe_line;

/* Keeps the buffer from file to file. "-": standard input. */
moe_status moe_line_reader_open(moe_line_reader *r, const char *path);
void moe_line_reader_close(moe_line_reader *r);
void moe_line_reader_free(moe_line_reader *r);
/* The next line, or its next part when it is longer than `limit`; *end at the end of the file. */
moe_status moe_line_next(moe_line_reader *r, int64_t limit, moe_line *line, bool *end);

#ifdef __cplusplus
}
#endif
#endif
