/* Writing token files: tokens stream to PREFIX.bin's temporary file, lengths wait in memory for the
 * index, and both files get their names only when they are complete and on disk. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/token_file.h"

/* One of the pair: written as `temporary`, then renamed to `path`. */
typedef struct {
  char path[PATH_MAX], temporary[PATH_MAX];
  FILE *file;  /* NULL before creation and once closed */
  bool exists; /* the temporary file does */
} part;

struct moe_token_writer {
  part bin, idx;
  moe_token_type type;
  int64_t vocab_size;
  int64_t tokens, current; /* in all; in the current sequence */
  int32_t *lengths;        /* [sequences] */
  int64_t sequences, lengths_room;
  int64_t *first_sequence; /* [documents + 1] */
  int64_t documents, documents_room;
};

/* ---- the two files ---- */

static moe_status io_error(const char *what, const char *path) {
  return moe_fail(MOE_IO, "%s: %s: %s", what, path, strerror(errno));
}

static moe_status part_create(part *p, const char *prefix, const char *suffix) {
  int a = snprintf(p->path, sizeof p->path, "%s%s", prefix, suffix);
  int b =
      snprintf(p->temporary, sizeof p->temporary, "%s%s.tmp-%ld", prefix, suffix, (long)getpid());
  if (a < 0 || b < 0 || a >= PATH_MAX || b >= PATH_MAX)
    return moe_fail(MOE_USAGE, "path too long: %.64s...: choose a shorter output prefix", prefix);
  p->file = fopen(p->temporary, "wbe");
  if (!p->file) return io_error("cannot create", p->temporary);
  p->exists = true;
  setvbuf(p->file, NULL, _IOFBF, 1 << 20);
  return MOE_OK;
}

static moe_status part_write(part *p, const void *data, size_t size, int64_t count) {
  if (count > 0 && fwrite(data, size, (size_t)count, p->file) != (size_t)count)
    return io_error("cannot write", p->temporary);
  return MOE_OK;
}

/* Everything on disk, still under the temporary name. */
static moe_status part_close(part *p) {
  bool failed = fflush(p->file) != 0 || fsync(fileno(p->file)) != 0;
  int error = errno;
  failed = fclose(p->file) != 0 || failed;
  p->file = NULL;
  if (!failed) return MOE_OK;
  if (error) errno = error;
  return io_error("cannot write", p->temporary);
}

static moe_status part_publish(part *p) {
  if (rename(p->temporary, p->path) != 0) return io_error("cannot rename to", p->path);
  p->exists = false;
  return MOE_OK;
}

static void part_discard(part *p) {
  if (p->file) fclose(p->file);
  if (p->exists) unlink(p->temporary);
}

static moe_status sync_folder_of(const char *path) {
  char copy[PATH_MAX];
  snprintf(copy, sizeof copy, "%s", path);
  const char *folder = dirname(copy);
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return io_error("cannot open folder", folder);
  /* some network file systems cannot sync a folder and say EINVAL: nothing more can be done there
   */
  bool failed = fsync(fd) != 0 && errno != EINVAL;
  moe_status status = failed ? io_error("cannot sync folder", folder) : MOE_OK;
  close(fd);
  return status;
}

/* ---- the index in memory ---- */

/* The array with room for one element more; NULL when memory is out (the old array stays). */
static void *grown(void *array, int64_t *room, int64_t used, size_t size) {
  if (used < *room) return array;
  int64_t wanted = *room ? 2 * *room : 1024;
  void *bigger = realloc(array, (size_t)wanted * size);
  if (bigger)
    *room = wanted;
  else
    moe_fail(MOE_NO_MEMORY, "out of memory: index of %" PRId64 " documents", wanted);
  return bigger;
}

static moe_status end_sequence(moe_token_writer *w) {
  int32_t *lengths = grown(w->lengths, &w->lengths_room, w->sequences, sizeof *lengths);
  if (!lengths) return MOE_NO_MEMORY;
  w->lengths = lengths;
  w->lengths[w->sequences++] = (int32_t)w->current;
  w->current = 0;
  return MOE_OK;
}

/* The next document begins at the next sequence. */
static moe_status mark_document(moe_token_writer *w, int64_t document) {
  int64_t *first = grown(w->first_sequence, &w->documents_room, document, sizeof *first);
  if (!first) return MOE_NO_MEMORY;
  w->first_sequence = first;
  w->first_sequence[document] = w->sequences;
  w->documents = document;
  return MOE_OK;
}

static moe_status write_index(moe_token_writer *w) {
  uint8_t header[MOE_TOKEN_HEADER_BYTES] = "MMIDIDX";
  const int64_t version = 1, entries = w->documents + 1;
  memcpy(header + 9, &version, 8);
  header[17] = (uint8_t)w->type;
  memcpy(header + 18, &w->sequences, 8);
  memcpy(header + 26, &entries, 8);
  MOE_TRY(part_write(&w->idx, header, 1, sizeof header));
  MOE_TRY(part_write(&w->idx, w->lengths, sizeof *w->lengths, w->sequences));
  int64_t pointer = 0;
  for (int64_t i = 0; i < w->sequences; i++) {
    MOE_TRY(part_write(&w->idx, &pointer, sizeof pointer, 1));
    pointer += w->lengths[i] * moe_token_type_size(w->type);
  }
  return part_write(&w->idx, w->first_sequence, sizeof *w->first_sequence, entries);
}

/* ---- the writer ---- */

moe_status moe_token_writer_create(const char *prefix, int64_t vocab_size, moe_token_writer **out) {
  *out = NULL;
  if (vocab_size < 1 || vocab_size > INT32_MAX)
    return moe_fail(MOE_INVALID, "vocabulary of %" PRId64 " ids", vocab_size);
  moe_token_writer *w = calloc(1, sizeof *w);
  if (!w) return moe_fail(MOE_NO_MEMORY, "out of memory: writing %s", prefix);
  w->vocab_size = vocab_size;
  w->type = moe_token_type_for(vocab_size);
  moe_status status;
  MOE_TRY_OR(status, failed, mark_document(w, 0));
  MOE_TRY_OR(status, failed, part_create(&w->bin, prefix, ".bin"));
  MOE_TRY_OR(status, failed, part_create(&w->idx, prefix, ".idx"));
  *out = w;
  return MOE_OK;
failed:
  moe_token_writer_destroy(w);
  return status;
}

static moe_status write_chunk(moe_token_writer *w, const int32_t *ids, int64_t count) {
  enum { CHUNK = 4096 };
  uint16_t narrow[CHUNK];
  for (int64_t done = 0; done < count;) {
    int64_t n = count - done < CHUNK ? count - done : CHUNK;
    for (int64_t i = 0; i < n; i++) {
      int32_t id = ids[done + i];
      if (id < 0 || id >= w->vocab_size)
        return moe_fail(MOE_INVALID, "token id %d outside the vocabulary of %" PRId64 ": %s", id,
                        w->vocab_size, w->bin.path);
      narrow[i] = (uint16_t)id;
    }
    if (w->type == MOE_TOKENS_U16)
      MOE_TRY(part_write(&w->bin, narrow, 2, n));
    else
      MOE_TRY(part_write(&w->bin, ids + done, 4, n));
    done += n;
  }
  return MOE_OK;
}

moe_status moe_token_writer_append(moe_token_writer *w, const int32_t *ids, int64_t count) {
  while (count > 0) {
    /* the format counts a sequence's tokens in an int32: a longer document gets several */
    int64_t room = INT32_MAX - w->current, n = count < room ? count : room;
    MOE_TRY(write_chunk(w, ids, n));
    w->current += n;
    w->tokens += n;
    ids += n;
    count -= n;
    if (w->current == INT32_MAX) MOE_TRY(end_sequence(w));
  }
  return MOE_OK;
}

moe_status moe_token_writer_end_document(moe_token_writer *w) {
  if (w->current > 0) MOE_TRY(end_sequence(w));
  if (w->first_sequence[w->documents] == w->sequences) return MOE_OK;
  return mark_document(w, w->documents + 1);
}

int64_t moe_token_writer_tokens(const moe_token_writer *w) {
  return w->tokens;
}

int64_t moe_token_writer_documents(const moe_token_writer *w) {
  return w->documents;
}

moe_status moe_token_writer_finish(moe_token_writer *w) {
  MOE_TRY(moe_token_writer_end_document(w));
  MOE_TRY(write_index(w));
  MOE_TRY(part_close(&w->bin));
  MOE_TRY(part_close(&w->idx));
  if (unlink(w->idx.path) != 0 && errno != ENOENT) return io_error("cannot replace", w->idx.path);
  MOE_TRY(part_publish(&w->bin));
  MOE_TRY(part_publish(&w->idx));
  return sync_folder_of(w->idx.path);
}

void moe_token_writer_destroy(moe_token_writer *w) {
  if (!w) return;
  part_discard(&w->bin);
  part_discard(&w->idx);
  free(w->lengths);
  free(w->first_sequence);
  free(w);
}
