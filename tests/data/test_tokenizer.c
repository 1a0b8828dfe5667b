#include "core/base/rng.h"
#include "data/tokenizer.h"
#include "data/utf8.h"
#include "fixture.h"

/* Sentences of made-up words, the same every time. */
typedef struct {
  int64_t next, count;
  char text[256];
} speaker;

static void speak(speaker *s) {
  static const char *const words[] = {"the",  "model", "learns", "experts", "token", "of",
                                      "gate", "route", "loss",   "sum",     "node",  "rank",
                                      "lauf", "über",  "3",      "14",      "x+y",   "if(a)"};
  s->text[0] = 0;
  for (uint64_t w = 0; w < 8; w++) {
    uint32_t draw[4];
    moe_philox(1, (uint64_t)s->next, w, draw);
    strcat(s->text, words[draw[0] % (sizeof words / sizeof words[0])]);
    strcat(s->text, draw[1] % 5 == 0 ? "s " : draw[1] % 7 == 0 ? ", " : " ");
  }
}

static moe_status next_sentence(void *context, const char **text, int64_t *length, bool *end) {
  speaker *s = context;
  *end = s->next == s->count;
  if (*end) return MOE_OK;
  speak(s);
  s->next++;
  *text = s->text;
  *length = (int64_t)strlen(s->text);
  return MOE_OK;
}

static moe_tokenizer *trained(const char *type) {
  const moe_tokenizer_training training = {type, 310, 0.9995, 1000000, 1};
  speaker s = {.count = 500};
  char *model;
  int64_t size;
  moe_tokenizer *t;
  ok(moe_tokenizer_train(&training, next_sentence, &s, &model, &size));
  ok(moe_tokenizer_parse(model, size, "trained", &t));
  free(model);
  return t;
}

static void comes_back(const moe_tokenizer *t, const char *text, int64_t length) {
  moe_token_list list = {0};
  ok(moe_tokenizer_encode(t, text, length, &list));
  char *back;
  int64_t back_length;
  ok(moe_tokenizer_decode(t, list.ids, list.count, &back, &back_length));
  cr_assert_eq(back_length, length);
  cr_assert_arr_eq(back, text, (size_t)length + 1);
  free(back);
  free(list.ids);
}

static void keeps_text(const moe_tokenizer *t) {
  static const char *const texts[] = {"",
                                      "the model",
                                      " leading and trailing ",
                                      "two  spaces\t\ttabs\n\n\nnewlines\r\n",
                                      "über",
                                      "日本語 🙂 €",
                                      "unseen: ¿¡ Ω",
                                      "<eos> <pad> <0x41>",
                                      "\n",
                                      "e\u0301 ﬁ Å",
                                      "if(a) { x+y; }\n",
                                      "1234567890"};
  for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
    comes_back(t, texts[i], (int64_t)strlen(texts[i]));
}

static void has_our_specials(const moe_tokenizer *t) {
  static const char *const pieces[] = {"<pad>", "<unk>", "<bos>", "<eos>"};
  for (int id = 0; id < 4; id++) {
    cr_assert_eq(moe_tokenizer_special(t, id), id);
    cr_assert_str_eq(moe_tokenizer_piece(t, id), pieces[id]);
    cr_assert_eq(moe_tokenizer_id(t, pieces[id]), id);
  }
  cr_assert_eq(moe_tokenizer_special(t, 4), -1);
  cr_assert_eq(moe_tokenizer_id(t, "no such piece, surely"), -1);
  cr_assert_null(moe_tokenizer_piece(t, -1));
  cr_assert_null(moe_tokenizer_piece(t, (int32_t)moe_tokenizer_vocab_size(t)));
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(t); id++)
    cr_assert_eq(moe_tokenizer_id(t, moe_tokenizer_piece(t, id)), id);
}

/* Text cut before a newline gives the same ids in parts. */
static void may_be_cut_at_newlines(const moe_tokenizer *t) {
  const char *text = "the model\nlearns of the gate\n\n  route 314\nend";
  moe_token_list whole = {0};
  ok(moe_tokenizer_encode(t, text, (int64_t)strlen(text), &whole));
  for (const char *cut = strchr(text, '\n'); cut; cut = strchr(cut + 1, '\n')) {
    moe_token_list parts = {0};
    ok(moe_tokenizer_encode(t, text, cut - text, &parts));
    ok(moe_tokenizer_encode(t, cut, (int64_t)strlen(cut), &parts));
    cr_assert_eq(parts.count, whole.count);
    cr_assert_arr_eq(parts.ids, whole.ids, (size_t)whole.count * sizeof *whole.ids);
    free(parts.ids);
  }
  free(whole.ids);
}

static void is_sound(moe_tokenizer *t, int64_t vocab_size) {
  cr_assert_eq(moe_tokenizer_vocab_size(t), vocab_size);
  has_our_specials(t);
  keeps_text(t);
  may_be_cut_at_newlines(t);
  const int32_t specials[] = {2, 0, 3};
  char *text;
  ok(moe_tokenizer_decode(t, specials, 3, &text, NULL));
  cr_assert_str_eq(text, "");
  free(text);
  const int32_t outside[] = {5, (int32_t)vocab_size};
  fails(MOE_INVALID, "outside the vocabulary", moe_tokenizer_decode(t, outside, 2, &text, NULL));
  moe_tokenizer_close(t);
}

Test(tokenizer, trains_a_sound_unigram_model) {
  is_sound(trained("unigram"), 310);
}

Test(tokenizer, trains_a_sound_bpe_model) {
  is_sound(trained("bpe"), 310);
}

Test(tokenizer, knows_bytes) {
  moe_tokenizer *t;
  ok(moe_tokenizer_open("bytes", &t));
  moe_token_list list = {0};
  ok(moe_tokenizer_encode(t, "A\xFF", 2, &list));
  cr_assert_eq(list.count, 2);
  cr_assert_eq(list.ids[0], 4 + 'A');
  cr_assert_eq(list.ids[1], 4 + 255);
  cr_assert_str_eq(moe_tokenizer_piece(t, 4 + 10), "<0x0A>");
  free(list.ids);
  char all[256];
  for (int i = 0; i < 256; i++) all[i] = (char)(255 - i);
  comes_back(t, all, 255);
  is_sound(t, 260);
}

Test(tokenizer, learns_words_it_has_seen) {
  moe_tokenizer *t = trained("unigram");
  moe_token_list list = {0};
  ok(moe_tokenizer_encode(t, "the model learns", 16, &list));
  cr_assert_leq(list.count, 6);
  free(list.ids);
  moe_tokenizer_close(t);
}

Test(tokenizer, explains_a_vocabulary_the_text_cannot_give) {
  const moe_tokenizer_training training = {"unigram", 30000, 0.9995, 1000, 1};
  speaker s = {.count = 100};
  char *model;
  int64_t size;
  fails(MOE_USAGE, "Vocabulary size too high",
        moe_tokenizer_train(&training, next_sentence, &s, &model, &size));
  cr_assert_null(model);
}

static moe_status broken_input(void *context, const char **text, int64_t *length, bool *end) {
  speaker *s = context;
  if (s->next == 50) return moe_fail(MOE_DAMAGED, "the disk is full of eels");
  return next_sentence(context, text, length, end);
}

Test(tokenizer, passes_on_the_inputs_own_error) {
  const moe_tokenizer_training training = {"unigram", 300, 0.9995, 1000, 1};
  speaker s = {.count = 100};
  char *model;
  int64_t size;
  fails(MOE_DAMAGED, "eels", moe_tokenizer_train(&training, broken_input, &s, &model, &size));
}

Test(tokenizer, refuses_what_is_no_model, .init = make_folder, .fini = remove_folder) {
  moe_tokenizer *t;
  fails(MOE_IO, "missing.model", moe_tokenizer_open(in_folder("missing.model"), &t));
  write_file(in_folder("a.model"), "this is text", 12);
  fails(MOE_DAMAGED, "a.model", moe_tokenizer_open(in_folder("a.model"), &t));
  write_file(in_folder("a.model"), "", 0);
  fails(MOE_DAMAGED, "a.model", moe_tokenizer_open(in_folder("a.model"), &t));
  fails(MOE_DAMAGED, "not a file", moe_tokenizer_open(folder, &t));
}

/* ---- what it is made of ---- */

static void expect_made_like_ours(const char *type, moe_tokenizer_type expected) {
  moe_tokenizer *t = trained(type);
  moe_tokenizer_spec spec;
  ok(moe_tokenizer_describe(t, &spec));
  cr_assert_eq(spec.type, expected);
  cr_assert(spec.byte_fallback && spec.verbatim && !spec.dummy_prefix && spec.user_defined == 0);
  static const moe_piece_kind specials[] = {MOE_PIECE_CONTROL, MOE_PIECE_UNKNOWN, MOE_PIECE_CONTROL,
                                            MOE_PIECE_CONTROL};
  for (int id = 0; id < 4; id++) cr_assert_eq(moe_tokenizer_piece_kind(t, id), specials[id]);
  int bytes = 0, normal = 0;
  for (int id = 4; id < moe_tokenizer_vocab_size(t); id++) {
    bytes += moe_tokenizer_piece_kind(t, id) == MOE_PIECE_BYTE;
    if (moe_tokenizer_piece_kind(t, id) != MOE_PIECE_NORMAL) continue;
    normal++;
    cr_assert_leq(moe_tokenizer_piece_score(t, id), 0.0f);
  }
  cr_assert_eq(bytes, 256);
  cr_assert_eq(normal, 310 - 4 - 256);
  moe_tokenizer_close(t);
}

Test(tokenizer, says_how_a_unigram_model_was_made) {
  expect_made_like_ours("unigram", MOE_TOKENIZER_UNIGRAM);
}
Test(tokenizer, says_how_a_bpe_model_was_made) {
  expect_made_like_ours("bpe", MOE_TOKENIZER_BPE);
}

Test(tokenizer, says_what_bytes_are) {
  moe_tokenizer *t;
  moe_tokenizer_spec spec;
  ok(moe_tokenizer_open("bytes", &t));
  ok(moe_tokenizer_describe(t, &spec));
  cr_assert(spec.type == MOE_TOKENIZER_BYTES && spec.verbatim && !spec.dummy_prefix);
  cr_assert_eq(moe_tokenizer_piece_kind(t, MOE_TOKEN_UNK), MOE_PIECE_UNKNOWN);
  cr_assert_eq(moe_tokenizer_piece_kind(t, MOE_BYTES_FIRST), MOE_PIECE_BYTE);
  moe_tokenizer_close(t);
}
