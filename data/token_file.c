/* Reading token files.
 *
 * The one idea: after the index has been checked once (every pointer is the sum of the lengths
 * before it, and the last ends where .bin ends), the file is a plain stream of tokens. The index is
 * mapped, so that ranks of a node share it; .bin is read with pread, because a disk error or a file
 * that shrinks then gives an error message instead of a SIGBUS in the prefetch thread. */
#include "data/token_file.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little-endian");

struct moe_token_file {
  char *prefix;
  const uint8_t *index; /* the whole .idx */
  int64_t index_size;
  void *mapping;      /* what to unmap, NULL when the caller keeps the memory */
  const uint8_t *bin; /* the whole .bin in memory, or NULL: read bin_fd */
  int bin_fd;
  int64_t bin_size;
  moe_token_type type;
  int64_t token_size, tokens, sequences, documents;
  const uint8_t *lengths, *pointers, *first_sequence; /* in the index; not aligned */
  uint64_t fingerprint;
};

/* The index's arrays begin at byte 34: every load goes through memcpy. */
static int32_t load_i32(const uint8_t *at, int64_t i) {
  int32_t value;
  memcpy(&value, at + 4 * i, sizeof value);
  return value;
}

static int64_t load_i64(const uint8_t *at, int64_t i) {
  int64_t value;
  memcpy(&value, at + 8 * i, sizeof value);
  return value;
}

static uint64_t load_u64(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

const char *moe_token_type_name(moe_token_type type) {
  return type == MOE_TOKENS_U16 ? "uint16" : "int32";
}

int64_t moe_token_type_size(moe_token_type type) {
  return type == MOE_TOKENS_U16 ? 2 : 4;
}

moe_token_type moe_token_type_for(int64_t vocab_size) {
  return vocab_size <= 65536 ? MOE_TOKENS_U16 : MOE_TOKENS_I32;
}

/* ---- checking the index ---- */

static moe_status damaged(const moe_token_file *f, int64_t offset, const char *format, ...)
    __attribute__((format(printf, 3, 4), cold));

static moe_status damaged(const moe_token_file *f, int64_t offset, const char *format, ...) {
  char what[256];
  va_list args;
  va_start(args, format);
  vsnprintf(what, sizeof what, format, args);
  va_end(args);
  return moe_fail(MOE_DAMAGED, "%s: %s.idx, byte %" PRId64 ": make the token file again", what,
                  f->prefix, offset);
}

/* Codes of the format that hold no token ids we can train on, for a clear refusal. */
static const char *foreign_type_name(int code) {
  static const char *const names[] = {NULL, "uint8", "int8",    "int16",
                                      NULL, "int64", "float64", "float32"};
  return code > 0 && code < (int)(sizeof names / sizeof names[0]) ? names[code] : NULL;
}

static moe_status check_header(moe_token_file *f) {
  static const char magic[9] = "MMIDIDX\0";
  if (f->index_size < MOE_TOKEN_HEADER_BYTES)
    return damaged(f, f->index_size, "index ends inside its %d-byte header",
                   MOE_TOKEN_HEADER_BYTES);
  if (memcmp(f->index, magic, sizeof magic) != 0)
    return damaged(f, 0, "not a Megatron index (it does not begin with MMIDIDX)");
  uint64_t version = load_u64(f->index + 9);
  if (version != 1) return damaged(f, 9, "index version %" PRIu64 ", only 1 is known", version);
  int code = f->index[17];
  if (code != MOE_TOKENS_U16 && code != MOE_TOKENS_I32) {
    const char *name = foreign_type_name(code);
    if (name) return damaged(f, 17, "tokens of type %s; only uint16 and int32 are read", name);
    return damaged(f, 17, "unknown token type code %d", code);
  }
  f->type = (moe_token_type)code;
  f->token_size = moe_token_type_size(f->type);
  return MOE_OK;
}

/* The counts must explain the index's size exactly, so no array can leave it. */
static moe_status check_counts(moe_token_file *f) {
  uint64_t room = (uint64_t)(f->index_size - MOE_TOKEN_HEADER_BYTES);
  uint64_t sequences = load_u64(f->index + 18), entries = load_u64(f->index + 26);
  if (sequences > room / 12)
    return damaged(f, 18, "%" PRIu64 " sequences do not fit in an index of %" PRId64 " bytes",
                   sequences, f->index_size);
  room -= 12 * sequences;
  if (entries < 1 || entries > room / 8)
    return damaged(f, 26,
                   "%" PRIu64 " document entries do not fit in an index of %" PRId64 " bytes",
                   entries, f->index_size);
  room -= 8 * entries;
  if (room != 0 && room == sequences)
    return damaged(f, f->index_size - (int64_t)room, "a multimodal dataset; only text is read");
  if (room != 0)
    return damaged(f, f->index_size - (int64_t)room, "%" PRIu64 " bytes too many at the end", room);
  f->sequences = (int64_t)sequences;
  f->documents = (int64_t)entries - 1;
  f->lengths = f->index + MOE_TOKEN_HEADER_BYTES;
  f->pointers = f->lengths + 4 * f->sequences;
  f->first_sequence = f->pointers + 8 * f->sequences;
  return MOE_OK;
}

static moe_status check_sequences(moe_token_file *f) {
  int64_t end = 0; /* of the sequences so far, in bytes; never beyond bin_size + 2^33 */
  for (int64_t i = 0; i < f->sequences; i++) {
    int32_t length = load_i32(f->lengths, i);
    int64_t pointer = load_i64(f->pointers, i);
    int64_t length_at = f->lengths + 4 * i - f->index;
    if (length < 0) return damaged(f, length_at, "sequence %" PRId64 " has length %d", i, length);
    if (pointer != end)
      return damaged(f, f->pointers + 8 * i - f->index,
                     "sequence %" PRId64 " begins at %" PRId64
                     ", but the one before ends at %" PRId64,
                     i, pointer, end);
    end += length * f->token_size;
    if (end > f->bin_size)
      return damaged(f, length_at,
                     "sequence %" PRId64 " ends at %" PRId64 ", but .bin has %" PRId64 " bytes", i,
                     end, f->bin_size);
  }
  if (end != f->bin_size)
    return damaged(f, 18,
                   "the index describes %" PRId64 " bytes of tokens, .bin has %" PRId64
                   ": truncated, or the files of two pairs",
                   end, f->bin_size);
  f->tokens = end / moe_token_type_size(f->type);
  return MOE_OK;
}

static moe_status check_documents(const moe_token_file *f) {
  int64_t before = 0;
  for (int64_t d = 0; d <= f->documents; d++) {
    int64_t first = load_i64(f->first_sequence, d);
    int64_t at = f->first_sequence + 8 * d - f->index;
    if (d == 0 && first != 0)
      return damaged(f, at, "the first document begins at sequence %" PRId64 ", not 0", first);
    if (first < before || first > f->sequences)
      return damaged(f, at,
                     "document %" PRId64 " begins at sequence %" PRId64 ", outside [%" PRId64
                     ", %" PRId64 "]",
                     d, first, before, f->sequences);
    before = first;
  }
  if (before != f->sequences)
    return damaged(f, f->index_size - 8, "the documents end at sequence %" PRId64 " of %" PRId64,
                   before, f->sequences);
  return MOE_OK;
}

static moe_status check_index(moe_token_file *f) {
  MOE_TRY(check_header(f));
  MOE_TRY(check_counts(f));
  MOE_TRY(check_sequences(f));
  MOE_TRY(check_documents(f));
  f->fingerprint = XXH3_64bits_withSeed(f->index, (size_t)f->index_size, (XXH64_hash_t)f->bin_size);
  return MOE_OK;
}

/* ---- opening ---- */

/* A file without its data; understands PREFIX.bin and PREFIX.idx as PREFIX. */
static moe_token_file *token_file_new(const char *prefix) {
  moe_token_file *f = calloc(1, sizeof *f);
  char *name = strdup(prefix);
  if (!f || !name) {
    free(f);
    free(name);
    return NULL;
  }
  size_t length = strlen(name);
  if (length > 4 && (!strcmp(name + length - 4, ".bin") || !strcmp(name + length - 4, ".idx")))
    name[length - 4] = 0;
  f->prefix = name;
  f->index = (const uint8_t *)""; /* an empty file cannot be mapped */
  f->bin_fd = -1;
  return f;
}

/* Open PREFIX + suffix; its size must be a regular file's. */
static moe_status open_part(const moe_token_file *f, const char *suffix, int *fd, int64_t *size) {
  char *path = NULL;
  if (asprintf(&path, "%s%s", f->prefix, suffix) < 0)
    return moe_fail(MOE_NO_MEMORY, "out of memory: opening %s", f->prefix);
  moe_status status = MOE_OK;
  struct stat info;
  *fd = open(path, O_RDONLY | O_CLOEXEC);
  if (*fd < 0)
    status = moe_fail(MOE_IO, "cannot open token file: %s: %s", path, strerror(errno));
  else if (fstat(*fd, &info) != 0)
    status = moe_fail(MOE_IO, "cannot look at token file: %s: %s", path, strerror(errno));
  else if (!S_ISREG(info.st_mode))
    status = moe_fail(MOE_DAMAGED, "not a regular file: %s: name a .bin/.idx pair", path);
  else
    *size = info.st_size;
  free(path);
  return status;
}

static moe_status map_index(moe_token_file *f) {
  int fd = -1;
  moe_status status = open_part(f, ".idx", &fd, &f->index_size);
  if (status == MOE_OK && f->index_size > 0) {
    void *mapping = mmap(NULL, (size_t)f->index_size, PROT_READ, MAP_SHARED, fd, 0);
    if (mapping == MAP_FAILED) {
      status = moe_fail(MOE_IO, "cannot map: %s.idx: %s", f->prefix, strerror(errno));
    } else {
      f->mapping = mapping;
      f->index = mapping;
    }
  }
  if (fd >= 0) close(fd);
  return status;
}

moe_status moe_token_file_open(const char *prefix, moe_token_file **out) {
  *out = NULL;
  moe_token_file *f = token_file_new(prefix);
  if (!f) return moe_fail(MOE_NO_MEMORY, "out of memory: opening %s", prefix);
  moe_status status;
  MOE_TRY_OR(status, failed, map_index(f));
  MOE_TRY_OR(status, failed, open_part(f, ".bin", &f->bin_fd, &f->bin_size));
  MOE_TRY_OR(status, failed, check_index(f));
  *out = f;
  return MOE_OK;
failed:
  moe_token_file_close(f);
  return status;
}

moe_status moe_token_file_parse(const void *index, int64_t index_size, const void *bin,
                                int64_t bin_size, const char *name, moe_token_file **out) {
  *out = NULL;
  moe_token_file *f = token_file_new(name);
  if (!f) return moe_fail(MOE_NO_MEMORY, "out of memory: opening %s", name);
  if (index_size > 0) f->index = index;
  f->index_size = index_size;
  f->bin = bin;
  f->bin_size = bin_size;
  moe_status status;
  MOE_TRY_OR(status, failed, check_index(f));
  *out = f;
  return MOE_OK;
failed:
  moe_token_file_close(f);
  return status;
}

void moe_token_file_close(moe_token_file *f) {
  if (!f) return;
  if (f->mapping) munmap(f->mapping, (size_t)f->index_size);
  if (f->bin_fd >= 0) close(f->bin_fd);
  free(f->prefix);
  free(f);
}

/* ---- reading ---- */

const char *moe_token_file_prefix(const moe_token_file *f) {
  return f->prefix;
}

moe_token_type moe_token_file_type(const moe_token_file *f) {
  return f->type;
}

int64_t moe_token_file_tokens(const moe_token_file *f) {
  return f->tokens;
}

int64_t moe_token_file_documents(const moe_token_file *f) {
  return f->documents;
}

int64_t moe_token_file_sequences(const moe_token_file *f) {
  return f->sequences;
}

int64_t moe_token_file_bytes(const moe_token_file *f) {
  return f->index_size + f->bin_size;
}

uint64_t moe_token_file_fingerprint(const moe_token_file *f) {
  return f->fingerprint;
}

int64_t moe_token_file_document_begin(const moe_token_file *f, int64_t d) {
  int64_t sequence = load_i64(f->first_sequence, d);
  return sequence == f->sequences ? f->tokens : load_i64(f->pointers, sequence) / f->token_size;
}

int64_t moe_token_file_document_of(const moe_token_file *f, int64_t token) {
  /* begin(low) <= token < begin(high): so among empty documents at one place the full one wins */
  int64_t low = 0, high = f->documents;
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    if (moe_token_file_document_begin(f, middle) <= token)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* Bytes [offset, offset + size) of .bin. */
static moe_status read_bytes(const moe_token_file *f, int64_t offset, int64_t size, void *out) {
  if (f->bin) {
    memcpy(out, f->bin + offset, (size_t)size);
    return MOE_OK;
  }
  for (char *to = out; size > 0;) {
    ssize_t got = pread(f->bin_fd, to, (size_t)size, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      return moe_fail(MOE_IO, "cannot read: %s.bin, byte %" PRId64 ": %s", f->prefix, offset,
                      strerror(errno));
    if (got == 0)
      return moe_fail(MOE_DAMAGED,
                      "file became shorter while in use: %s.bin, byte %" PRId64
                      ": do not replace token files of a running job",
                      f->prefix, offset);
    to += got;
    offset += got;
    size -= got;
  }
  return MOE_OK;
}

moe_status moe_token_file_read(const moe_token_file *f, int64_t begin, int64_t count,
                               int64_t vocab_size, int32_t *out) {
  if (begin < 0 || count < 0 || begin > f->tokens || count > f->tokens - begin)
    return moe_fail(MOE_INVALID, "tokens [%" PRId64 ", +%" PRId64 ") of %" PRId64 ": %s.bin", begin,
                    count, f->tokens, f->prefix);
  enum { CHUNK = 8192 };
  union {
    uint16_t u16[CHUNK];
    int32_t i32[CHUNK];
  } chunk = {{0}};
  for (int64_t done = 0; done < count;) {
    int64_t n = count - done < CHUNK ? count - done : CHUNK;
    MOE_TRY(read_bytes(f, (begin + done) * f->token_size, n * f->token_size, &chunk));
    for (int64_t i = 0; i < n; i++) {
      int32_t id = f->type == MOE_TOKENS_U16 ? chunk.u16[i] : chunk.i32[i];
      if (id < 0 || id >= vocab_size)
        return moe_fail(MOE_DAMAGED,
                        "token id %d is outside the vocabulary of %" PRId64
                        ": %s.bin, byte %" PRId64
                        ": use the tokenizer's vocabulary size, or tokenize again",
                        id, vocab_size, f->prefix, (begin + done + i) * f->token_size);
      out[done + i] = id;
    }
    done += n;
  }
  return MOE_OK;
}
