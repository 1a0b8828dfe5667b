/* One door to both kinds of tokenizer: ranges are checked and errors worded here. */
#include "data/tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/sentencepiece.h"
#include "data/sentencepiece_model.pb-c.h"

struct moe_tokenizer {
  char *name;
  moe_sentencepiece *model; /* NULL: bytes */
};

moe_status moe_token_list_append(moe_token_list *list, const int32_t *ids, int64_t count) {
  if (list->count + count > list->room) {
    int64_t room = 2 * (list->count + count) + 64;
    int32_t *bigger = realloc(list->ids, (size_t)room * sizeof *bigger);
    if (!bigger) return moe_fail(MOE_NO_MEMORY, "out of memory: %" PRId64 " token ids", room);
    list->ids = bigger;
    list->room = room;
  }
  if (count > 0) memcpy(list->ids + list->count, ids, (size_t)count * sizeof *ids);
  list->count += count;
  return MOE_OK;
}

/* ---- opening ---- */

static moe_tokenizer *tokenizer_new(const char *name) {
  moe_tokenizer *t = calloc(1, sizeof *t);
  if (t) t->name = strdup(name);
  if (t && t->name) return t;
  free(t);
  return NULL;
}

moe_status moe_tokenizer_parse(const void *model, int64_t size, const char *name,
                               moe_tokenizer **out) {
  *out = NULL;
  char error[MOE_SENTENCEPIECE_ERROR] = "";
  moe_tokenizer *t = tokenizer_new(name);
  if (!t) return moe_fail(MOE_NO_MEMORY, "out of memory: opening %s", name);
  t->model = moe_sentencepiece_load(model, size, error);
  if (t->model && moe_sentencepiece_size(t->model) > 0) {
    *out = t;
    return MOE_OK;
  }
  moe_tokenizer_close(t);
  return moe_fail(MOE_DAMAGED, "not a SentencePiece model: %s: %s", name,
                  *error ? error : "it has no pieces");
}

/* A whole model file; real ones have a few MB. */
static moe_status read_model(const char *path, void **data, int64_t *size) {
  enum { LIMIT = 1 << 30 };
  struct stat info;
  moe_status status = MOE_OK;
  char *memory = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || fstat(fd, &info) != 0) {
    status = moe_fail(MOE_IO, "cannot open tokenizer: %s: %s", path, strerror(errno));
  } else if (!S_ISREG(info.st_mode) || info.st_size > LIMIT) {
    status = moe_fail(MOE_DAMAGED, "not a SentencePiece model: %s: not a file below 1 GiB", path);
  } else if (!(memory = malloc((size_t)info.st_size + 1))) {
    status = moe_fail(MOE_NO_MEMORY, "out of memory: reading %s", path);
  } else {
    ssize_t got = read(fd, memory, (size_t)info.st_size);
    if (got != info.st_size)
      status = moe_fail(MOE_IO, "cannot read tokenizer: %s: %s", path,
                        got < 0 ? strerror(errno) : "it became shorter");
    *data = memory;
    *size = info.st_size;
  }
  if (fd >= 0) close(fd);
  if (status != MOE_OK) free(memory);
  return status;
}

moe_status moe_tokenizer_open(const char *name, moe_tokenizer **out) {
  *out = NULL;
  if (strcmp(name, "bytes") == 0) {
    *out = tokenizer_new(name);
    return *out ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: tokenizer");
  }
  void *model = NULL;
  int64_t size = 0;
  MOE_TRY(read_model(name, &model, &size));
  moe_status status = moe_tokenizer_parse(model, size, name, out);
  free(model);
  return status;
}

void moe_tokenizer_close(moe_tokenizer *t) {
  if (!t) return;
  moe_sentencepiece_free(t->model);
  free(t->name);
  free(t);
}

/* ---- bytes ---- */

static const char special_piece[][6] = {"<pad>", "<unk>", "<bos>", "<eos>"};

/* "<0x00>" ... "<0xFF>", as SentencePiece names its byte pieces. */
static const char byte_piece[256][7] = {
#define P(h, l) "<0x" #h #l ">"
#define ROW(h)                                                                              \
  P(h, 0), P(h, 1), P(h, 2), P(h, 3), P(h, 4), P(h, 5), P(h, 6), P(h, 7), P(h, 8), P(h, 9), \
      P(h, A), P(h, B), P(h, C), P(h, D), P(h, E), P(h, F)
    ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7), ROW(8),
    ROW(9), ROW(A), ROW(B), ROW(C), ROW(D), ROW(E), ROW(F)
#undef ROW
#undef P
};

static moe_status encode_bytes(const char *text, int64_t length, moe_token_list *out) {
  enum { CHUNK = 4096 };
  int32_t ids[CHUNK];
  for (int64_t done = 0; done < length;) {
    int64_t n = length - done < CHUNK ? length - done : CHUNK;
    for (int64_t i = 0; i < n; i++) ids[i] = MOE_BYTES_FIRST + (unsigned char)text[done + i];
    MOE_TRY(moe_token_list_append(out, ids, n));
    done += n;
  }
  return MOE_OK;
}

static char *decode_bytes(const int32_t *ids, int64_t count, int64_t *length) {
  char *text = malloc((size_t)count + 1);
  if (!text) return NULL;
  int64_t n = 0;
  for (int64_t i = 0; i < count; i++)
    if (ids[i] >= MOE_BYTES_FIRST) text[n++] = (char)(ids[i] - MOE_BYTES_FIRST);
  text[n] = 0;
  *length = n;
  return text;
}

/* ---- both ---- */

int64_t moe_tokenizer_vocab_size(const moe_tokenizer *t) {
  return t->model ? moe_sentencepiece_size(t->model) : MOE_BYTES_VOCAB;
}

int32_t moe_tokenizer_special(const moe_tokenizer *t, int which) {
  if (t->model) return moe_sentencepiece_special(t->model, which);
  return which >= MOE_TOKEN_PAD && which <= MOE_TOKEN_EOS ? which : -1;
}

moe_status moe_tokenizer_encode(const moe_tokenizer *t, const char *text, int64_t length,
                                moe_token_list *out) {
  if (!t->model) return encode_bytes(text, length, out);
  char error[MOE_SENTENCEPIECE_ERROR] = "";
  if (moe_sentencepiece_encode(t->model, text, length, out, error)) return MOE_OK;
  if (!*error) return MOE_NO_MEMORY; /* moe_token_list_append has said so */
  return moe_fail(MOE_FAILED, "cannot encode a text of %" PRId64 " bytes: %s: %s", length, t->name,
                  error);
}

moe_status moe_tokenizer_decode(const moe_tokenizer *t, const int32_t *ids, int64_t count,
                                char **text, int64_t *length) {
  int64_t unused;
  char error[MOE_SENTENCEPIECE_ERROR] = "out of memory";
  *text = NULL;
  for (int64_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= moe_tokenizer_vocab_size(t))
      return moe_fail(MOE_INVALID,
                      "token id %d is outside the vocabulary of %" PRId64 ": %s: is it "
                      "the right tokenizer?",
                      ids[i], moe_tokenizer_vocab_size(t), t->name);
  if (!length) length = &unused;
  *text = t->model ? moe_sentencepiece_decode(t->model, ids, count, length, error)
                   : decode_bytes(ids, count, length);
  if (*text) return MOE_OK;
  return moe_fail(MOE_FAILED, "cannot decode %" PRId64 " tokens: %s: %s", count, t->name, error);
}

const char *moe_tokenizer_piece(const moe_tokenizer *t, int32_t id) {
  if (id < 0 || id >= moe_tokenizer_vocab_size(t)) return NULL;
  if (t->model) return moe_sentencepiece_piece(t->model, id);
  return id < MOE_BYTES_FIRST ? special_piece[id] : byte_piece[id - MOE_BYTES_FIRST];
}

int32_t moe_tokenizer_id(const moe_tokenizer *t, const char *piece) {
  if (t->model) return moe_sentencepiece_id(t->model, piece);
  for (int32_t id = 0; id < MOE_BYTES_VOCAB; id++)
    if (strcmp(moe_tokenizer_piece(t, id), piece) == 0) return id;
  return -1;
}

/* ---- what it is made of ---- */

static void describe_model(const Moe__Spm__ModelProto *model, moe_tokenizer_spec *out) {
  const Moe__Spm__TrainerSpec *t = model->trainer_spec;
  const Moe__Spm__NormalizerSpec *n = model->normalizer_spec;
  out->type = (moe_tokenizer_type)t->model_type; /* ours are numbered like theirs, from 1 */
  out->byte_fallback = t->byte_fallback;
  out->dummy_prefix = n->add_dummy_prefix;
  out->verbatim = n->precompiled_charsmap.len == 0 && n->escape_whitespaces &&
                  !n->remove_extra_whitespaces && !t->treat_whitespace_as_suffix;
  for (size_t i = 0; i < model->n_pieces; i++) out->user_defined += model->pieces[i]->type == 4;
}

moe_status moe_tokenizer_describe(const moe_tokenizer *t, moe_tokenizer_spec *out) {
  char error[MOE_SENTENCEPIECE_ERROR] = "";
  int64_t size = 0;
  *out = (moe_tokenizer_spec){.byte_fallback = true, .verbatim = true};
  if (!t->model) return MOE_OK;
  char *bytes = moe_sentencepiece_serialize(t->model, &size, error);
  if (!bytes) return moe_fail(MOE_NO_MEMORY, "cannot describe tokenizer: %s: %s", t->name, error);
  Moe__Spm__ModelProto *model =
      moe__spm__model_proto__unpack(NULL, (size_t)size, (const uint8_t *)bytes);
  free(bytes);
  bool known = model && model->trainer_spec && model->normalizer_spec &&
               model->trainer_spec->model_type >= MOE_TOKENIZER_UNIGRAM &&
               model->trainer_spec->model_type <= MOE_TOKENIZER_CHAR;
  if (known) describe_model(model, out);
  moe__spm__model_proto__free_unpacked(model, NULL);
  if (known) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "cannot describe tokenizer: %s: it does not say how it was made",
                  t->name);
}

moe_piece_kind moe_tokenizer_piece_kind(const moe_tokenizer *t, int32_t id) {
  if (t->model) return moe_sentencepiece_kind(t->model, id);
  return id >= MOE_BYTES_FIRST ? MOE_PIECE_BYTE
         : id == MOE_TOKEN_UNK ? MOE_PIECE_UNKNOWN
                               : MOE_PIECE_CONTROL;
}

float moe_tokenizer_piece_score(const moe_tokenizer *t, int32_t id) {
  return t->model ? moe_sentencepiece_score(t->model, id) : 0.0f;
}

/* ---- training ---- */

moe_status moe_tokenizer_train(const moe_tokenizer_training *options, moe_next_sentence next,
                               void *context, char **model, int64_t *size) {
  char error[MOE_SENTENCEPIECE_ERROR] = "";
  moe_status input_status;
  *model = moe_sentencepiece_train(options, next, context, size, &input_status, error);
  if (*model) return MOE_OK;
  if (input_status != MOE_OK) return input_status;
  return moe_fail(MOE_USAGE,
                  "cannot train a %s tokenizer of %" PRId64
                  " pieces: %s: choose another --vocab-size, or give more text",
                  options->model_type, options->vocab_size, error);
}
