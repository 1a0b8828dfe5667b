/* Lines out of one growing buffer. */
#include "data/line_reader.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/utf8.h"

enum { FIRST_ROOM = 1 << 20 };

moe_status moe_line_reader_open(moe_line_reader *r, const char *path) {
  bool standard_input = strcmp(path, "-") == 0;
  r->name = standard_input ? "standard input" : path;
  r->fd = standard_input ? dup(STDIN_FILENO) : open(path, O_RDONLY | O_CLOEXEC);
  r->at_end = r->inside = false;
  r->begin = r->end = r->offset = 0;
  if (!r->buffer) {
    r->buffer = malloc(FIRST_ROOM);
    r->room = FIRST_ROOM;
  }
  if (!r->buffer) return moe_fail(MOE_NO_MEMORY, "out of memory: reading %s", r->name);
  if (r->fd >= 0) return MOE_OK;
  return moe_fail(MOE_IO, "cannot open: %s: %s", r->name, strerror(errno));
}

void moe_line_reader_close(moe_line_reader *r) {
  if (r->fd >= 0) close(r->fd);
  r->fd = -1;
}

void moe_line_reader_free(moe_line_reader *r) {
  moe_line_reader_close(r);
  free(r->buffer);
  r->buffer = NULL;
}

/* Make room behind the unread bytes: move them to the front, and grow when they fill the buffer. */
static moe_status make_room(moe_line_reader *r) {
  if (r->begin > 0) {
    memmove(r->buffer, r->buffer + r->begin, (size_t)(r->end - r->begin));
    r->end -= r->begin;
    r->begin = 0;
  }
  if (r->end < r->room) return MOE_OK;
  int64_t room = 2 * r->room;
  char *bigger = realloc(r->buffer, (size_t)room);
  if (!bigger)
    return moe_fail(MOE_NO_MEMORY, "out of memory: line of %" PRId64 " bytes: %s, byte %" PRId64,
                    r->room, r->name, r->offset);
  r->buffer = bigger;
  r->room = room;
  return MOE_OK;
}

static moe_status read_more(moe_line_reader *r) {
  MOE_TRY(make_room(r));
  for (;;) {
    if (r->stop && *r->stop) return moe_fail(MOE_FAILED, "interrupted: %s", r->name);
    ssize_t got = read(r->fd, r->buffer + r->end, (size_t)(r->room - r->end));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return moe_fail(MOE_IO, "cannot read: %s: %s", r->name, strerror(errno));
    r->end += got;
    r->at_end = got == 0;
    return MOE_OK;
  }
}

/* Hand out `length` bytes and step over them and `newline` more. */
static void take(moe_line_reader *r, int64_t length, bool ends, bool newline, moe_line *line) {
  *line = (moe_line){r->buffer + r->begin, length, r->offset, !r->inside, ends, newline};
  r->begin += length + newline;
  r->offset += length + newline;
  r->inside = !ends;
}

moe_status moe_line_next(moe_line_reader *r, int64_t limit, moe_line *line, bool *end) {
  *end = false;
  for (int64_t seen = 0;;) {
    const char *text = r->buffer + r->begin;
    int64_t length = r->end - r->begin;
    const char *newline = length > seen ? memchr(text + seen, '\n', (size_t)(length - seen)) : NULL;
    int64_t line_length = newline ? newline - text : length;
    if (line_length > limit) {
      take(r, moe_utf8_cut(text, line_length, limit), false, false, line);
      return MOE_OK;
    }
    if (newline || (r->at_end && (length > 0 || r->inside))) {
      take(r, line_length, true, newline != NULL, line);
      return MOE_OK;
    }
    if (r->at_end) {
      *end = true;
      return MOE_OK;
    }
    seen = length;
    MOE_TRY(read_more(r));
  }
}
