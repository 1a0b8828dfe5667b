/* Tokenizers in the format of Hugging Face's tokenizers library.
 *
 * The library has the same two algorithms as SentencePiece. What has to be said is how text reaches
 * them (spaces become U+2581, nothing else changes), and, for bpe, the merges, which SentencePiece
 * keeps only as scores: every way to put a piece together from two others, in order of its score.
 * One trap: the library would take the nine characters <0x0A> for the byte piece of that name. */
#include "checkpoint/hf_tokenizer.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "core/base/log.h"

#define SPACE "\xe2\x96\x81" /* U+2581 */
enum { MODEL_LIMIT = 1 << 30 };

typedef struct {
  const moe_tokenizer *t;
  moe_tokenizer_spec spec;
  int64_t context;
} job;

static void put_text(FILE *out, const char *text) {
  fputc('"', out);
  for (const char *c = text; *c; c++) {
    if (*c == '"' || *c == '\\')
      fprintf(out, "\\%c", *c);
    else if ((unsigned char)*c < 0x20)
      fprintf(out, "\\u%04x", (unsigned)*c);
    else
      fputc(*c, out);
  }
  fputc('"', out);
}

/* ---- special tokens ----------------------------------------------------------------------------
 */

static const struct {
  const char *role;
  int which;
} specials[] = {{"pad_token", MOE_TOKEN_PAD},
                {"unk_token", MOE_TOKEN_UNK},
                {"bos_token", MOE_TOKEN_BOS},
                {"eos_token", MOE_TOKEN_EOS}};
enum { SPECIALS = sizeof specials / sizeof specials[0] };

#define FLAGS                                                                      \
  "\"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": " \
  "false, \"special\": true}"

static void put_roles(FILE *out, const moe_tokenizer *t) {
  bool first = true;
  for (int i = 0; i < SPECIALS; i++) {
    int32_t id = moe_tokenizer_special(t, specials[i].which);
    if (id < 0) continue;
    fprintf(out, "%s  \"%s\": ", first ? "" : ",\n", specials[i].role);
    put_text(out, moe_tokenizer_piece(t, id));
    first = false;
  }
}

static void print_specials(FILE *out, const void *context) {
  const job *j = context;
  fputs("{\n", out);
  put_roles(out, j->t);
  fputs("\n}\n", out);
}

static void print_config(FILE *out, const void *context) {
  const job *j = context;
  bool first = true;
  fputs("{\n  \"added_tokens_decoder\": {", out);
  for (int i = 0; i < SPECIALS; i++) {
    int32_t id = moe_tokenizer_special(j->t, specials[i].which);
    if (id < 0) continue;
    fprintf(out, "%s\n    \"%d\": {\"content\": ", first ? "" : ",", id);
    put_text(out, moe_tokenizer_piece(j->t, id));
    fputs(", " FLAGS, out);
    first = false;
  }
  fputs("\n  },\n", out);
  put_roles(out, j->t);
  fprintf(out,
          ",\n  \"add_bos_token\": false,\n  \"add_eos_token\": false,\n"
          "  \"clean_up_tokenization_spaces\": false,\n  \"model_max_length\": %lld,\n"
          "  \"tokenizer_class\": \"PreTrainedTokenizerFast\"\n}\n",
          (long long)j->context);
}

/* ---- tokenizer.json ----------------------------------------------------------------------------
 */

static void put_added(FILE *out, const moe_tokenizer *t) {
  bool first = true;
  fputs("  \"added_tokens\": [", out);
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(t); id++) {
    bool special = false;
    for (int i = 0; i < SPECIALS; i++)
      special = special || moe_tokenizer_special(t, specials[i].which) == id;
    if (!special) continue;
    fprintf(out, "%s\n    {\"id\": %d, \"content\": ", first ? "" : ",", id);
    put_text(out, moe_tokenizer_piece(t, id));
    fputs(", " FLAGS, out);
    first = false;
  }
  fputs("\n  ],\n", out);
}

static void put_unigram(FILE *out, const job *j) {
  fprintf(out,
          "  \"model\": {\"type\": \"Unigram\", \"unk_id\": %d, \"byte_fallback\": %s,\n"
          "    \"vocab\": [",
          moe_tokenizer_special(j->t, MOE_TOKEN_UNK), j->spec.byte_fallback ? "true" : "false");
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(j->t); id++) {
    fputs(id ? ",\n      [" : "\n      [", out);
    put_text(out, moe_tokenizer_piece(j->t, id));
    fprintf(out, ", %.17g]", (double)moe_tokenizer_piece_score(j->t, id));
  }
  fputs("\n    ]}\n", out);
}

typedef struct {
  int32_t left, right;
  float score; /* of what they make */
} merge;

typedef struct {
  merge *list;
  int64_t count, room;
  bool failed; /* no memory */
} merges;

static int by_score(const void *pa, const void *pb) {
  const merge *a = pa, *b = pb;
  if (a->score != b->score) return a->score > b->score ? -1 : 1;
  return a->left != b->left ? a->left - b->left : a->right - b->right;
}

static void add_merge(merges *m, merge one) {
  if (m->count == m->room) {
    int64_t room = 2 * m->room + 1024;
    merge *list = realloc(m->list, (size_t)room * sizeof *list);
    m->failed = m->failed || !list;
    if (!list) return;
    m->list = list;
    m->room = room;
  }
  m->list[m->count++] = one;
}

static int32_t normal_id(const moe_tokenizer *t, const char *piece) {
  int32_t id = moe_tokenizer_id(t, piece);
  return id >= 0 && moe_tokenizer_piece_kind(t, id) == MOE_PIECE_NORMAL ? id : -1;
}

/* All ways to make piece `id` of two others. */
static void split_piece(const moe_tokenizer *t, int32_t id, merges *out) {
  const char *piece = moe_tokenizer_piece(t, id);
  char *left = strdup(piece);
  out->failed = out->failed || !left;
  for (size_t i = strlen(piece); left && i-- > 1;) {
    if (((unsigned char)piece[i] & 0xc0) == 0x80) continue; /* inside a character */
    left[i] = 0;
    merge m = {normal_id(t, left), normal_id(t, piece + i), moe_tokenizer_piece_score(t, id)};
    if (m.left >= 0 && m.right >= 0) add_merge(out, m);
  }
  free(left);
}

static merges find_merges(const moe_tokenizer *t) {
  merges m = {0};
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(t); id++)
    if (moe_tokenizer_piece_kind(t, id) == MOE_PIECE_NORMAL) split_piece(t, id, &m);
  if (m.count > 0) qsort(m.list, (size_t)m.count, sizeof *m.list, by_score);
  return m;
}

static void put_bpe(FILE *out, const job *j, const merges *m) {
  fputs("  \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": ", out);
  put_text(out, moe_tokenizer_piece(j->t, moe_tokenizer_special(j->t, MOE_TOKEN_UNK)));
  fprintf(out,
          ", \"continuing_subword_prefix\": null, \"end_of_word_suffix\": null,\n"
          "    \"fuse_unk\": true, \"byte_fallback\": %s, \"ignore_merges\": false,\n"
          "    \"vocab\": {",
          j->spec.byte_fallback ? "true" : "false");
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(j->t); id++) {
    fputs(id ? ",\n      " : "\n      ", out);
    put_text(out, moe_tokenizer_piece(j->t, id));
    fprintf(out, ": %d", id);
  }
  fputs("\n    },\n    \"merges\": [", out);
  for (int64_t i = 0; i < m->count; i++) {
    fputs(i ? ",\n      [" : "\n      [", out);
    put_text(out, moe_tokenizer_piece(j->t, m->list[i].left));
    fputs(", ", out);
    put_text(out, moe_tokenizer_piece(j->t, m->list[i].right));
    fputc(']', out);
  }
  fputs("\n    ]}\n", out);
}

typedef struct {
  job job;
  merges merges;
} tokenizer_json;

static void print_tokenizer(FILE *out, const void *context) {
  const tokenizer_json *k = context;
  const job *j = &k->job;
  bool spaces = j->spec.type != MOE_TOKENIZER_BYTES;
  fputs("{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n", out);
  put_added(out, j->t);
  fputs(spaces ? "  \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, "
                 "\"content\": \"" SPACE "\"},\n"
               : "  \"normalizer\": null,\n",
        out);
  /* Cut <0x0A> after its first character, where no piece reaches across: digits stand alone. */
  fputs(j->spec.type == MOE_TOKENIZER_UNIGRAM
            ? "  \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": "
              "\"(?<=<)(?=0x[0-9A-F]{2}>)\"}, \"behavior\": \"Isolated\", \"invert\": false},\n"
            : "  \"pre_tokenizer\": null,\n",
        out);
  fputs("  \"post_processor\": null,\n  \"decoder\": {\"type\": \"Sequence\", \"decoders\": [\n",
        out);
  if (spaces)
    fputs("    {\"type\": \"Replace\", \"pattern\": {\"String\": \"" SPACE
          "\"}, \"content\": \" \"},\n",
          out);
  fputs("    {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]},\n", out);
  if (j->spec.type == MOE_TOKENIZER_UNIGRAM)
    put_unigram(out, j);
  else
    put_bpe(out, j, &k->merges);
  fputs("}\n", out);
}

/* Why tokenizer.json could not be faithful, or NULL. */
static const char *obstacle(const job *j) {
  if (j->spec.type == MOE_TOKENIZER_WORD || j->spec.type == MOE_TOKENIZER_CHAR)
    return "it is neither unigram nor bpe";
  if (!j->spec.verbatim || j->spec.dummy_prefix) return "it changes its text";
  if (j->spec.user_defined > 0) return "it has user-defined pieces";
  if (moe_tokenizer_special(j->t, MOE_TOKEN_UNK) < 0) return "it has no <unk>";
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(j->t); id++)
    if (moe_tokenizer_piece_kind(j->t, id) == MOE_PIECE_UNUSED) return "it has unused pieces";
  return NULL;
}

static moe_status write_tokenizer(const job *j, const char *path) {
  tokenizer_json k = {.job = *j};
  if (j->spec.type == MOE_TOKENIZER_BPE) k.merges = find_merges(j->t);
  moe_status status = k.merges.failed ? moe_fail(MOE_NO_MEMORY, "%s: no memory for merges", path)
                                      : moe_files_print_new(path, print_tokenizer, &k);
  free(k.merges.list);
  return status;
}

static moe_status copy_model(const char *model, const char *path) {
  char real[PATH_MAX], *bytes;
  int64_t size;
  if (!realpath(model, real)) return moe_fail(MOE_USAGE, "%s: no such tokenizer", model);
  MOE_TRY(moe_files_read(real, MODEL_LIMIT, &bytes, &size));
  moe_status status = moe_files_write_new(path, bytes, size);
  free(bytes);
  return status;
}

moe_status moe_hf_tokenizer_write(const moe_tokenizer *t, const char *model, int64_t context,
                                  const char *folder) {
  job j = {.t = t, .context = context};
  char path[MOE_PATH + 32];
  MOE_TRY(moe_tokenizer_describe(t, &j.spec));
  snprintf(path, sizeof path, "%s/tokenizer.model", folder);
  if (model) MOE_TRY(copy_model(model, path));
  const char *why = obstacle(&j);
  if (why)
    moe_warn("%s: no tokenizer.json is written, since %s: tokenizer.model is there", model, why);
  snprintf(path, sizeof path, "%s/tokenizer.json", folder);
  if (!why) MOE_TRY(write_tokenizer(&j, path));
  snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
  if (!why) MOE_TRY(moe_files_print_new(path, print_config, &j));
  snprintf(path, sizeof path, "%s/special_tokens_map.json", folder);
  return why ? MOE_OK : moe_files_print_new(path, print_specials, &j);
}
