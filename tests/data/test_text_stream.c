/* Text as it comes: whole characters, stop strings, nothing lost. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/text_stream.h"
#include "data/utf8.h"

static moe_tokenizer *open_bytes(void) {
  moe_tokenizer *t;
  cr_assert_eq(moe_tokenizer_open("bytes", &t), MOE_OK);
  return t;
}

typedef struct {
  char text[4096];
  int64_t length;
  int64_t parts; /* calls that gave something */
  bool stopped;
} told;

static void hear(told *out, const char *text, int64_t length) {
  cr_assert_eq(moe_utf8_valid(text, length), length, "a part of a character was told");
  cr_assert(out->length + length < (int64_t)sizeof out->text);
  memcpy(out->text + out->length, text, (size_t)length);
  out->length += length;
  out->text[out->length] = 0;
  out->parts += length > 0;
}

/* Stream ids until they end or a stop string comes. */
static told stream(const moe_tokenizer *t, const char *const *stops, int stop_count,
                   const int32_t *context, int64_t n, const int32_t *ids, int64_t count) {
  told out = {.length = 0};
  moe_text_stream *s;
  const char *text;
  int64_t length;
  cr_assert_eq(moe_text_stream_create(t, stops, stop_count, context, n, &s), MOE_OK);
  for (int64_t i = 0; i < count && !out.stopped; i++) {
    cr_assert_eq(moe_text_stream_add(s, ids[i], &text, &length, &out.stopped), MOE_OK);
    hear(&out, text, length);
  }
  if (!out.stopped) {
    cr_assert_eq(moe_text_stream_end(s, &text, &length), MOE_OK);
    hear(&out, text, length);
  }
  moe_text_stream_destroy(s);
  return out;
}

static told stream_bytes(const char *text, const char *const *stops, int stop_count) {
  moe_tokenizer *t = open_bytes();
  moe_token_list ids = {0};
  cr_assert_eq(moe_tokenizer_encode(t, text, (int64_t)strlen(text), &ids), MOE_OK);
  told out = stream(t, stops, stop_count, NULL, 0, ids.ids, ids.count);
  free(ids.ids);
  moe_tokenizer_close(t);
  return out;
}

Test(text_stream, tells_each_character_when_its_last_byte_comes) {
  const char *text = "caf\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80!";
  told out = stream_bytes(text, NULL, 0);
  cr_assert_str_eq(out.text, text);
  cr_assert_eq(out.parts, 9);
}

Test(text_stream, shows_bytes_that_are_no_character_as_u_fffd) {
  told out = stream_bytes("a\xFF\xC3(b\xE2\x82", NULL, 0);
  cr_assert_str_eq(out.text, "a\xEF\xBF\xBD\xEF\xBF\xBD(b\xEF\xBF\xBD\xEF\xBF\xBD");
}

Test(text_stream, ends_before_a_stop_string) {
  const char *const stops[] = {"END", "\n\n"};
  told out = stream_bytes("one\ntwo EN three END four", stops, 2);
  cr_assert(out.stopped);
  cr_assert_str_eq(out.text, "one\ntwo EN three ");
  out = stream_bytes("one\n\ntwo", stops, 2);
  cr_assert_str_eq(out.text, "one");
  out = stream_bytes("no stop EN", stops, 2);
  cr_assert(!out.stopped);
  cr_assert_str_eq(out.text, "no stop EN");
}

Test(text_stream, takes_the_first_of_overlapping_stop_strings) {
  const char *const stops[] = {"abac", "ab"};
  told out = stream_bytes("xxabacus", stops, 2);
  cr_assert_str_eq(out.text, "xx");
  const char *const again[] = {"aab"};
  out = stream_bytes("caaab", again, 1);
  cr_assert_str_eq(out.text, "ca");
}

Test(text_stream, leaves_out_special_and_foreign_ids) {
  moe_tokenizer *t = open_bytes();
  const int32_t ids[] = {MOE_TOKEN_BOS, 4 + 'h', 300, 4 + 'i', 100000, MOE_TOKEN_EOS, -5};
  told out = stream(t, NULL, 0, NULL, 0, ids, 7);
  cr_assert_str_eq(out.text, "hi");
  moe_tokenizer_close(t);
}

/* ---- a SentencePiece model ------------------------------------------------------------------- */

typedef struct {
  int at;
  char line[64];
} lines;

static moe_status next_line(void *context, const char **text, int64_t *length, bool *end) {
  static const char *const words[] = {"the", " dog", " sees", " a", " caf\xC3\xA9", " and", " cat"};
  lines *l = context;
  *end = l->at == 400;
  snprintf(l->line, sizeof l->line, "%s%s%s%s %d", words[l->at % 7], words[l->at / 3 % 7],
           words[l->at / 5 % 7], words[l->at / 11 % 7], l->at);
  *text = l->line;
  *length = (int64_t)strlen(l->line);
  l->at++;
  return MOE_OK;
}

/* However a text is cut into prompt and continuation, what is told is the rest of the text. */
Test(text_stream, goes_on_from_any_token_of_a_prompt) {
  const moe_tokenizer_training training = {"unigram", 290, 0.98, 1000, 1};
  const char *text = "the dog sees a caf\xC3\xA9 and  two \xE2\x82\xAC\xF0\x9F\x98\x80 cats\n99";
  char *model;
  int64_t size;
  lines l = {0};
  moe_tokenizer *t;
  moe_token_list ids = {0};
  cr_assert_eq(moe_tokenizer_train(&training, next_line, &l, &model, &size), MOE_OK, "%s",
               moe_error_message());
  cr_assert_eq(moe_tokenizer_parse(model, size, "test", &t), MOE_OK);
  cr_assert_eq(moe_tokenizer_encode(t, text, (int64_t)strlen(text), &ids), MOE_OK);
  for (int64_t cut = 0; cut <= ids.count; cut++) {
    char *before;
    int64_t length;
    cr_assert_eq(moe_tokenizer_decode(t, ids.ids, cut, &before, &length), MOE_OK);
    told out = stream(t, NULL, 0, ids.ids, cut, ids.ids + cut, ids.count - cut);
    bool whole =
        strncmp(before, text, (size_t)length) == 0 && moe_utf8_valid(text, length) == length;
    if (whole) cr_assert_str_eq(out.text, text + length, "cut at %lld", (long long)cut);
    free(before);
  }
  free(ids.ids);
  free(model);
  moe_tokenizer_close(t);
}
