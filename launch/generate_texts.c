/* Texts are printed in the order of their prompts: the first that is not finished as its tokens
 * come, those behind it when it is their turn. */
#include "launch/generate_texts.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "data/utf8.h"

typedef enum { GOES_ON, EOS, STOP, LENGTH, CONTEXT } ending;
static const char *const ending_names[] = {"", "eos", "stop", "length", "context"};

typedef struct {
  char *prompt; /* as given */
  moe_token_list prompt_ids, ids;
  moe_text_stream *stream; /* while it goes on; NULL with --ids */
  FILE *memory;            /* the text so far, into: */
  char *text;
  size_t length;
  ending end;
} text;

struct moe_texts {
  const moe_generate_request *request;
  const moe_tokenizer *tokenizer;
  int64_t vocab_size;
  int32_t eos; /* -1: none */
  bool show;
  text *list;
  moe_prompt *prompts;
  int64_t count, room;
  int64_t turn; /* the text being printed */
  bool begun;   /* its prompt is printed */
};

/* ---- reading prompts ---------------------------------------------------------------------------
 */

static moe_status add_prompt(moe_texts *t, const char *prompt, int64_t length) {
  if (t->count == t->room) {
    int64_t room = 2 * t->room + 16;
    text *list = realloc(t->list, (size_t)room * sizeof *list);
    if (list) t->list = list;
    if (!list) return moe_fail(MOE_NO_MEMORY, "out of memory: %lld prompts", (long long)room);
    t->room = room;
  }
  text *x = &t->list[t->count];
  *x = (text){.prompt = strndup(prompt, (size_t)length)};
  if (!x->prompt) return moe_fail(MOE_NO_MEMORY, "out of memory: prompt");
  t->count++;
  return MOE_OK;
}

static moe_status check_utf8(const char *where, int64_t line, const char *prompt, int64_t length) {
  int64_t good = moe_utf8_valid(prompt, length);
  if (good == length) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "not UTF-8 text: %s, line %lld, byte %lld: convert it with iconv",
                  where, (long long)line, (long long)good);
}

static moe_status read_lines(moe_texts *t, FILE *file, const char *path) {
  char *line = NULL;
  size_t room = 0;
  moe_status status = MOE_OK;
  int64_t number = 0;
  for (ssize_t n; status == MOE_OK && (n = getline(&line, &room, file)) >= 0;) {
    while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r')) n--;
    number++;
    status = check_utf8(path, number, line, n);
    if (status == MOE_OK && n > 0) status = add_prompt(t, line, n);
  }
  if (status == MOE_OK && ferror(file))
    status = moe_fail(MOE_IO, "cannot read prompts: %s: %s", path, strerror(errno));
  free(line);
  return status;
}

static moe_status read_file(moe_texts *t, const char *path) {
  FILE *file = fopen(path, "r");
  if (!file)
    return moe_fail(MOE_USAGE, "cannot open prompts: %s: %s: check --prompt-file", path,
                    strerror(errno));
  moe_status status = read_lines(t, file, path);
  fclose(file);
  if (status == MOE_OK && t->count == 0)
    status = moe_fail(MOE_USAGE, "no prompt: %s: give one per line", path);
  return status;
}

/* Numbers with spaces or commas between. */
static moe_status parse_ids(const moe_texts *t, const char *prompt, moe_token_list *out) {
  for (const char *at = prompt + strspn(prompt, " ,\t"); *at; at += strspn(at, " ,\t")) {
    char *end;
    errno = 0;
    long long value = strtoll(at, &end, 10);
    if (end == at || errno || value < 0 || value >= t->vocab_size)
      return moe_fail(MOE_USAGE, "not a token id below %lld: --ids: prompt at \"%.20s\"",
                      (long long)t->vocab_size, at);
    int32_t id = (int32_t)value;
    MOE_TRY(moe_token_list_append(out, &id, 1));
    at = end;
  }
  return MOE_OK;
}

/* A prompt without a token begins as a document in training does: after the <eos> of another. */
static moe_status encode(moe_texts *t, text *x) {
  moe_token_list *out = &x->prompt_ids;
  if (t->request->ids) {
    MOE_TRY(parse_ids(t, x->prompt, out));
    if (out->count == 0) return moe_fail(MOE_USAGE, "a prompt without token ids: command line");
    return MOE_OK;
  }
  int32_t bos = moe_tokenizer_special(t->tokenizer, MOE_TOKEN_BOS);
  if (t->request->bos && bos < 0)
    return moe_fail(MOE_USAGE, "--bos: the tokenizer has no <bos>: leave it out");
  if (t->request->bos) MOE_TRY(moe_token_list_append(out, &bos, 1));
  MOE_TRY(moe_tokenizer_encode(t->tokenizer, x->prompt, (int64_t)strlen(x->prompt), out));
  if (out->count == 0 && t->eos >= 0) MOE_TRY(moe_token_list_append(out, &t->eos, 1));
  if (out->count > 0) return MOE_OK;
  return moe_fail(MOE_USAGE, "an empty prompt, and the tokenizer has no <eos> to begin with: "
                             "command line: give --prompt a text");
}

static moe_status begin(moe_texts *t, text *x) {
  const moe_generate_request *r = t->request;
  MOE_TRY(encode(t, x));
  x->memory = open_memstream(&x->text, &x->length);
  if (!x->memory) return moe_fail(MOE_NO_MEMORY, "out of memory: text");
  if (r->ids) return MOE_OK;
  return moe_text_stream_create(t->tokenizer, r->stops.list, r->stops.count, x->prompt_ids.ids,
                                x->prompt_ids.count, &x->stream);
}

static moe_status create(moe_texts *t) {
  const moe_generate_request *r = t->request;
  if (t->tokenizer) t->eos = moe_tokenizer_special(t->tokenizer, MOE_TOKEN_EOS);
  for (int i = 0; i < r->prompts.count; i++) {
    int64_t length = (int64_t)strlen(r->prompts.list[i]);
    MOE_TRY(check_utf8("--prompt", i + 1, r->prompts.list[i], length));
    MOE_TRY(add_prompt(t, r->prompts.list[i], length));
  }
  if (r->prompt_file) MOE_TRY(read_file(t, r->prompt_file));
  t->prompts = calloc((size_t)t->count, sizeof *t->prompts);
  if (!t->prompts) return moe_fail(MOE_NO_MEMORY, "out of memory: prompts");
  for (int64_t i = 0; i < t->count; i++) {
    MOE_TRY(begin(t, &t->list[i]));
    t->prompts[i] =
        (moe_prompt){t->list[i].prompt_ids.ids, t->list[i].prompt_ids.count, r->max_new};
  }
  return MOE_OK;
}

moe_status moe_texts_create(const moe_generate_request *r, const moe_tokenizer *tokenizer,
                            int64_t vocab_size, bool show, moe_texts **out) {
  moe_texts *t = calloc(1, sizeof *t);
  *out = t;
  if (!t) return moe_fail(MOE_NO_MEMORY, "out of memory: texts");
  *t = (moe_texts){.request = r, .tokenizer = tokenizer, .vocab_size = vocab_size, .show = show};
  t->eos = -1;
  return create(t);
}

void moe_texts_destroy(moe_texts *t) {
  if (!t) return;
  for (int64_t i = 0; i < t->count; i++) {
    text *x = &t->list[i];
    if (x->memory) fclose(x->memory);
    moe_text_stream_destroy(x->stream);
    free(x->text);
    free(x->prompt);
    free(x->prompt_ids.ids);
    free(x->ids.ids);
  }
  free(t->list);
  free(t->prompts);
  free(t);
}

int64_t moe_texts_count(const moe_texts *t) {
  return t->count;
}

int64_t moe_texts_longest(const moe_texts *t) {
  int64_t longest = 0;
  for (int64_t i = 0; i < t->count; i++)
    if (t->prompts[i].count > longest) longest = t->prompts[i].count;
  return longest;
}

moe_status moe_texts_fit(moe_texts *t, int64_t room, const char *limit) {
  for (int64_t i = 0; i < t->count; i++) {
    moe_prompt *p = &t->prompts[i];
    if (p->count >= room)
      return moe_fail(MOE_USAGE, "prompt %lld has %lld tokens and a text has room for %lld: %s",
                      (long long)i + 1, (long long)p->count, (long long)room, limit);
    if (p->max_new > room - p->count) p->max_new = room - p->count;
  }
  return MOE_OK;
}

const moe_prompt *moe_texts_prompts(const moe_texts *t) {
  return t->prompts;
}

/* ---- printing ----------------------------------------------------------------------------------
 */

static void print_ids(const moe_token_list *ids) {
  for (int64_t i = 0; i < ids->count; i++) printf("%d ", ids->ids[i]);
}

static void print_prompt(const moe_texts *t, const text *x) {
  if (t->request->no_echo) return;
  if (t->request->ids)
    print_ids(&x->prompt_ids);
  else
    fputs(x->prompt, stdout);
}

static cJSON *json_ids(const moe_token_list *list) {
  return cJSON_CreateIntArray(list->ids, (int)list->count);
}

static moe_status print_json(const moe_texts *t, int64_t i) {
  const text *x = &t->list[i];
  cJSON *json = cJSON_CreateObject();
  cJSON_AddNumberToObject(json, "index", (double)i);
  if (!t->request->ids) {
    cJSON_AddStringToObject(json, "prompt", x->prompt);
    cJSON_AddStringToObject(json, "text", x->text ? x->text : "");
  }
  cJSON_AddItemToObject(json, "prompt_ids", json_ids(&x->prompt_ids));
  cJSON_AddItemToObject(json, "ids", json_ids(&x->ids));
  cJSON_AddStringToObject(json, "end", ending_names[x->end]);
  char *line = cJSON_PrintUnformatted(json);
  cJSON_Delete(json);
  if (!line) return moe_fail(MOE_NO_MEMORY, "out of memory: text %lld as JSON", (long long)i);
  puts(line);
  cJSON_free(line);
  return MOE_OK;
}

/* Texts whose turn it is: what they have so far, and past those that are finished. */
static moe_status take_turns(moe_texts *t) {
  while (t->turn < t->count) {
    text *x = &t->list[t->turn];
    bool finished = x->end != GOES_ON;
    if (t->request->json && !finished) break;
    fflush(x->memory);
    if (t->request->json) {
      MOE_TRY(print_json(t, t->turn));
    } else if (!t->begun) {
      if (t->turn > 0) fputs(t->request->ids ? "" : "\n", stdout);
      print_prompt(t, x);
      fwrite(x->text, 1, x->length, stdout);
      t->begun = true;
    }
    if (!finished) break;
    if (!t->request->json) putchar('\n');
    t->turn++;
    t->begun = false;
  }
  fflush(stdout);
  return MOE_OK;
}

static moe_status say(moe_texts *t, int64_t prompt, const char *what, int64_t length) {
  text *x = &t->list[prompt];
  bool now = t->show && !t->request->json && t->turn == prompt && t->begun;
  if (fwrite(what, 1, (size_t)length, x->memory) != (size_t)length)
    return moe_fail(MOE_NO_MEMORY, "out of memory: text");
  if (!now) return MOE_OK;
  fwrite(what, 1, (size_t)length, stdout);
  fflush(stdout);
  return MOE_OK;
}

static bool is_stop_id(const moe_texts *t, int32_t token) {
  for (int i = 0; i < t->request->stop_id_count; i++)
    if (t->request->stop_ids[i] == token) return true;
  return false;
}

/* What the token reads as; *stopped when a stop string came. */
static moe_status read_token(moe_texts *t, int64_t prompt, int32_t token, bool *stopped) {
  const char *what;
  int64_t length;
  char number[16];
  if (t->list[prompt].stream) {
    MOE_TRY(moe_text_stream_add(t->list[prompt].stream, token, &what, &length, stopped));
  } else {
    length = snprintf(number, sizeof number, "%d ", token);
    what = number;
  }
  return say(t, prompt, what, length);
}

moe_status moe_texts_take(void *context, int64_t prompt, int32_t token, bool *end) {
  moe_texts *t = context;
  text *x = &t->list[prompt];
  const char *rest;
  int64_t length;
  bool stopped = false;
  MOE_TRY(moe_token_list_append(&x->ids, &token, 1));
  if (token == t->eos && !t->request->ignore_eos)
    x->end = EOS;
  else if (is_stop_id(t, token))
    x->end = STOP;
  else
    MOE_TRY(read_token(t, prompt, token, &stopped));
  if (stopped) x->end = STOP;
  if (x->end == GOES_ON && x->ids.count == t->prompts[prompt].max_new)
    x->end = t->prompts[prompt].max_new < t->request->max_new ? CONTEXT : LENGTH;
  *end = x->end != GOES_ON;
  if (*end && x->stream && !stopped) {
    MOE_TRY(moe_text_stream_end(x->stream, &rest, &length));
    MOE_TRY(say(t, prompt, rest, length));
  }
  return t->show ? take_turns(t) : MOE_OK;
}
