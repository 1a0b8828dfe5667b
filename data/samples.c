/* Global sample number -> tokens. */
#include "data/samples.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/base/rng.h"
#include "data/blend.h"
#include "data/token_file.h"

typedef struct {
  moe_token_file *file;
  int64_t begin, end; /* the split's tokens */
  int64_t samples;
} source;

struct moe_samples {
  moe_split split;
  int64_t seq, vocab_size;
  uint64_t seed;
  bool document_mask;
  moe_blend *blend;
  int sources;
  source source[MOE_BLEND_FILES];
};

/* ---- the split ---- */

/* Validation is the last `fraction` of the documents, rounded, at least one on each side. */
static moe_status split_documents(const moe_token_file *f, moe_split split, double fraction,
                                  int64_t *first, int64_t *end) {
  int64_t documents = moe_token_file_documents(f);
  if (documents < 2)
    return moe_fail(MOE_USAGE,
                    "cannot hold out documents for validation: %s has %" PRId64
                    ": name validation files in data.valid, or set data.valid_fraction=0",
                    moe_token_file_prefix(f), documents);
  int64_t held = (int64_t)llround(fraction * (double)documents);
  if (held < 1) held = 1;
  if (held > documents - 1) held = documents - 1;
  *first = split == MOE_SPLIT_TRAIN ? 0 : documents - held;
  *end = split == MOE_SPLIT_TRAIN ? documents - held : documents;
  return MOE_OK;
}

/* A file the configuration names and that cannot be opened is the configuration's fault. */
static moe_status refuse_missing(void) {
  char why[1024];
  snprintf(why, sizeof why, "%s", moe_error_message());
  return moe_fail(MOE_USAGE, "%s: mend data.train or data.valid, or make it with moe-data tokenize",
                  why);
}

static moe_status open_source(moe_samples *s, const char *prefix, double held_out) {
  source *from = &s->source[s->sources];
  moe_status opened = moe_token_file_open(prefix, &from->file);
  if (opened == MOE_IO) return refuse_missing();
  MOE_TRY(opened);
  s->sources++;
  int64_t first = 0, end = moe_token_file_documents(from->file);
  if (held_out > 0) MOE_TRY(split_documents(from->file, s->split, held_out, &first, &end));
  from->begin = moe_token_file_document_begin(from->file, first);
  from->end = moe_token_file_document_begin(from->file, end);
  from->samples = (from->end - from->begin - 1) / s->seq;
  if (from->samples > 0) return MOE_OK;
  return moe_fail(MOE_USAGE,
                  "too few tokens for one sample: %s: its %s split has %" PRId64
                  " tokens, a sample takes %" PRId64 " + 1: lower data.sequence_length%s",
                  moe_token_file_prefix(from->file),
                  s->split == MOE_SPLIT_TRAIN ? "training" : "validation", from->end - from->begin,
                  s->seq, held_out > 0 ? " or change data.valid_fraction" : "");
}

/* Which of the configuration's texts names the files, and what part of them is held out. */
static moe_status choose_files(const moe_config *config, moe_split split, const char **key,
                               const char **text, double *held_out) {
  bool own_files = config->data.valid[0] != 0;
  *key = split == MOE_SPLIT_VALID && own_files ? "valid" : "train";
  *text = split == MOE_SPLIT_VALID && own_files ? config->data.valid : config->data.train;
  *held_out = own_files ? 0 : config->data.valid_fraction;
  if (!**text)
    return moe_fail(MOE_USAGE, "no token files: data.train is empty: set it to a .bin/.idx prefix");
  if (split == MOE_SPLIT_VALID && !own_files && *held_out <= 0)
    return moe_fail(MOE_USAGE, "no validation data: data.valid is empty and data.valid_fraction is "
                               "0: set one, or train.eval_interval=0");
  return MOE_OK;
}

static moe_status open_blend(moe_samples *s, const moe_config *config) {
  const char *key, *text;
  double held_out;
  MOE_TRY(choose_files(config, s->split, &key, &text, &held_out));
  char where[2 * MOE_CONFIG_TEXT];
  snprintf(where, sizeof where, "data.%s (%s)", key, moe_config_origin(config, "data", key));
  moe_blend_spec spec;
  moe_status status = moe_blend_spec_parse(text, where, &spec);
  for (int i = 0; status == MOE_OK && i < spec.files; i++)
    status = open_source(s, spec.prefix[i], held_out);
  if (status == MOE_OK) status = moe_blend_create(spec.weight, spec.files, &s->blend);
  moe_blend_spec_clear(&spec);
  return status;
}

moe_status moe_samples_open(const moe_config *config, moe_split split, moe_samples **out) {
  *out = NULL;
  if (config->data.sequence_length < 1 || config->model.vocab_size < 1)
    return moe_fail(MOE_INVALID,
                    "the configuration is not resolved: sequence_length %" PRId64
                    ", vocab_size %" PRId64,
                    config->data.sequence_length, config->model.vocab_size);
  moe_samples *s = calloc(1, sizeof *s);
  if (!s) return moe_fail(MOE_NO_MEMORY, "out of memory: opening the data");
  s->split = split;
  s->seq = config->data.sequence_length;
  s->vocab_size = config->model.vocab_size;
  s->seed = (uint64_t)config->train.seed;
  s->document_mask = config->data.document_mask;
  moe_status status = open_blend(s, config);
  if (status != MOE_OK) {
    moe_samples_close(s);
    return status;
  }
  *out = s;
  return MOE_OK;
}

void moe_samples_close(moe_samples *s) {
  if (!s) return;
  for (int i = 0; i < s->sources; i++) moe_token_file_close(s->source[i].file);
  moe_blend_destroy(s->blend);
  free(s);
}

/* ---- one sample ---- */

/* Training is shuffled anew each epoch. Validation has one order for ever, the same for every seed,
 * so that runs compare; it is shuffled too, for an evaluation reads only its first samples. */
static int64_t window_of(const moe_samples *s, int file, int64_t index) {
  int64_t n = s->source[file].samples;
  bool training = s->split == MOE_SPLIT_TRAIN;
  uint64_t stream =
      moe_rng_stream(training ? "data.train" : "data.valid", file, training ? index / n : 0);
  return moe_rng_permute(training ? s->seed : 0, stream, n, index % n);
}

/* Positions and mask of the window that begins at token `begin`: both count from the start of the
 * document, or of the window when the document began before it. */
static void mark_documents(const moe_token_file *f, int64_t begin, int64_t seq,
                           moe_sample_row row) {
  int64_t document = moe_token_file_document_of(f, begin);
  for (int64_t at = 0; at < seq; document++) {
    int64_t end = moe_token_file_document_begin(f, document + 1) - begin;
    if (end > seq) end = seq;
    for (int64_t start = at; at < end; at++) {
      row.doc_start[at] = (int32_t)start;
      row.positions[at] = (int32_t)(at - start);
    }
  }
}

moe_status moe_samples_read(const moe_samples *s, int64_t g, int32_t *window, moe_sample_row row) {
  int file;
  int64_t index;
  moe_blend_place(s->blend, g, &file, &index);
  const source *from = &s->source[file];
  int64_t begin = from->begin + window_of(s, file, index) * s->seq;
  MOE_TRY(moe_token_file_read(from->file, begin, s->seq + 1, s->vocab_size, window));
  memcpy(row.tokens, window, (size_t)s->seq * sizeof *window);
  memcpy(row.targets, window + 1, (size_t)s->seq * sizeof *window);
  if (s->document_mask)
    mark_documents(from->file, begin, s->seq, row);
  else
    for (int64_t i = 0; i < s->seq; i++) row.positions[i] = (int32_t)i;
  return MOE_OK;
}

/* ---- about the whole ---- */

int64_t moe_samples_sequence_length(const moe_samples *s) {
  return s->seq;
}

int64_t moe_samples_epoch(const moe_samples *s) {
  int64_t shortest = INT64_MAX;
  for (int i = 0; i < s->sources; i++) {
    int64_t repeats_at = moe_blend_sample(s->blend, i, s->source[i].samples);
    if (repeats_at < shortest) shortest = repeats_at;
  }
  return shortest;
}

int64_t moe_samples_tokens(const moe_samples *s) {
  int64_t tokens = 0;
  for (int i = 0; i < s->sources; i++) tokens += s->source[i].end - s->source[i].begin;
  return tokens;
}

uint64_t moe_samples_fingerprint(const moe_samples *s) {
  uint64_t hash = 0;
  for (int i = 0; i < s->sources; i++) {
    uint64_t next = moe_token_file_fingerprint(s->source[i].file);
    hash = XXH3_64bits_withSeed(&next, sizeof next, hash);
  }
  return hash;
}
