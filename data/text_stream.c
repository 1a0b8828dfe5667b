/* Tokens to text, one at a time. */
#include "data/text_stream.h"

#include <stdlib.h>
#include <string.h>

#include "data/utf8.h"

enum {
  CONTEXT = 8, /* tokens of the prompt that may change how the next one reads */
  PATIENCE = 8 /* tokens after which an unfinished character is given up: none has more bytes */
};
static const char unknown[] = "\xEF\xBF\xBD"; /* U+FFFD */

/* Bytes that grow. */
typedef struct {
  char *data;
  int64_t length, room;
} buffer;

struct moe_text_stream {
  const moe_tokenizer *tokenizer;
  const char *const *stops;
  int stop_count;
  moe_token_list ids;
  int64_t begin; /* decoding starts at ids[begin]; */
  int64_t said;  /* ids[begin, said) are told, as `told` bytes */
  int64_t told;
  buffer held;  /* valid UTF-8 that may yet turn out to be a stop string */
  buffer ready; /* what the last call gave */
};

static moe_status append(buffer *b, const char *data, int64_t n) {
  if (b->length + n > b->room) {
    int64_t room = 2 * (b->length + n) + 64;
    char *grown = realloc(b->data, (size_t)room);
    if (!grown)
      return moe_fail(MOE_NO_MEMORY, "out of memory: text of %lld bytes", (long long)room);
    b->data = grown;
    b->room = room;
  }
  if (n > 0) memcpy(b->data + b->length, data, (size_t)n);
  b->length += n;
  return MOE_OK;
}

/* The text with U+FFFD for each byte that belongs to no character. */
static moe_status append_valid(buffer *b, const char *text, int64_t length) {
  while (length > 0) {
    int64_t good = moe_utf8_valid(text, length);
    MOE_TRY(append(b, text, good));
    if (good < length) MOE_TRY(append(b, unknown, (int64_t)sizeof unknown - 1));
    good += good < length;
    text += good;
    length -= good;
  }
  return MOE_OK;
}

moe_status moe_text_stream_create(const moe_tokenizer *t, const char *const *stops, int stop_count,
                                  const int32_t *context, int64_t n, moe_text_stream **out) {
  moe_text_stream *s = calloc(1, sizeof *s);
  *out = s;
  if (!s) return moe_fail(MOE_NO_MEMORY, "out of memory: text");
  *s = (moe_text_stream){.tokenizer = t, .stops = stops, .stop_count = stop_count};
  moe_status status = MOE_OK;
  for (int64_t i = n > CONTEXT ? n - CONTEXT : 0; i < n && status == MOE_OK; i++) {
    if (context[i] >= 0 && context[i] < moe_tokenizer_vocab_size(t))
      status = moe_token_list_append(&s->ids, &context[i], 1);
  }
  char *text = NULL;
  if (status == MOE_OK) status = moe_tokenizer_decode(t, s->ids.ids, s->ids.count, &text, &s->told);
  free(text);
  s->said = s->ids.count;
  if (status == MOE_OK) return MOE_OK;
  moe_text_stream_destroy(s);
  *out = NULL;
  return status;
}

void moe_text_stream_destroy(moe_text_stream *s) {
  if (!s) return;
  free(s->ids.ids);
  free(s->held.data);
  free(s->ready.data);
  free(s);
}

/* Does the text end within a character: in bytes that begin one, or as a decoder shows those? */
static bool is_unfinished(const char *text, int64_t length) {
  int64_t mark = (int64_t)sizeof unknown - 1;
  if (length >= mark && memcmp(text + length - mark, unknown, (size_t)mark) == 0) return true;
  for (int64_t back = 1; back <= 3 && back <= length; back++) {
    unsigned char c = (unsigned char)text[length - back];
    if (c < 0x80) return false;
    if (c >= 0xC0) return back < (c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2);
  }
  return false;
}

/* Move what the tokens since `said` have made certain to `held`; all of it at the end. */
static moe_status decode_new(moe_text_stream *s, bool at_end) {
  char *text = NULL;
  int64_t length = 0, count = s->ids.count;
  if (count == s->said) return MOE_OK;
  MOE_TRY(
      moe_tokenizer_decode(s->tokenizer, s->ids.ids + s->begin, count - s->begin, &text, &length));
  bool wait = is_unfinished(text, length) && count - s->said < PATIENCE && !at_end;
  moe_status status = MOE_OK;
  if (!wait && length > s->told) status = append_valid(&s->held, text + s->told, length - s->told);
  free(text);
  if (wait || status != MOE_OK) return status;
  s->begin = s->said; /* the tokens just told are the next ones' context */
  s->said = count;
  MOE_TRY(
      moe_tokenizer_decode(s->tokenizer, s->ids.ids + s->begin, count - s->begin, &text, &s->told));
  free(text);
  return MOE_OK;
}

/* Where the first stop string begins in what is held, or -1. */
static int64_t find_stop(const moe_text_stream *s) {
  int64_t first = -1;
  for (int i = 0; i < s->stop_count && s->held.length > 0; i++) {
    size_t n = strlen(s->stops[i]);
    const char *at = memmem(s->held.data, (size_t)s->held.length, s->stops[i], n);
    if (at && (first < 0 || at - s->held.data < first)) first = at - s->held.data;
  }
  return first;
}

/* The longest end of what is held that is the beginning of a stop string. */
static int64_t maybe_stop(const moe_text_stream *s) {
  int64_t longest = 0;
  for (int i = 0; i < s->stop_count; i++) {
    int64_t n = (int64_t)strlen(s->stops[i]) - 1;
    for (n = n < s->held.length ? n : s->held.length; n > longest; n--) {
      const char *end = s->held.data + s->held.length - n;
      if (memcmp(end, s->stops[i], (size_t)n) == 0) longest = n;
    }
  }
  return longest;
}

/* Give the first n held bytes and forget `skip` of them. */
static moe_status give(moe_text_stream *s, int64_t n, int64_t skip, const char **text,
                       int64_t *length) {
  s->ready.length = 0;
  MOE_TRY(append(&s->ready, s->held.data, n));
  if (s->held.length > skip)
    memmove(s->held.data, s->held.data + skip, (size_t)(s->held.length - skip));
  s->held.length -= skip;
  *text = s->ready.data ? s->ready.data : "";
  *length = n;
  return MOE_OK;
}

moe_status moe_text_stream_add(moe_text_stream *s, int32_t id, const char **text, int64_t *length,
                               bool *stopped) {
  *stopped = false;
  if (id >= 0 && id < moe_tokenizer_vocab_size(s->tokenizer))
    MOE_TRY(moe_token_list_append(&s->ids, &id, 1));
  MOE_TRY(decode_new(s, false));
  int64_t stop = find_stop(s);
  *stopped = stop >= 0;
  if (*stopped) return give(s, stop, s->held.length, text, length);
  int64_t n = s->held.length - maybe_stop(s);
  return give(s, n, n, text, length);
}

moe_status moe_text_stream_end(moe_text_stream *s, const char **text, int64_t *length) {
  MOE_TRY(decode_new(s, true));
  int64_t stop = find_stop(s);
  return give(s, stop >= 0 ? stop : s->held.length, s->held.length, text, length);
}
