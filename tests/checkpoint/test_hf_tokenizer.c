/* Tokenizers as tokenizer.json. */
#include "checkpoint/hf_tokenizer.h"
#include "checkpoint/json.h"
#include "tests/checkpoint/hf.h"

TestSuite(hf_tokenizer, .init = open_world, .fini = close_world, .timeout = 300);

/* tokenizer.json of a SentencePiece model, written into the run's folder. */
static cJSON *tokenizer_json(const char *name) {
  char path[256];
  moe_tokenizer *t;
  cJSON *root;
  snprintf(path, sizeof path, MOE_SOURCE_DIR "/tests/fuzz/seeds/tokenizer/%s", name);
  EXPECT_OK(moe_tokenizer_open(path, &t));
  EXPECT_OK(moe_hf_tokenizer_write(t, path, 40, run));
  moe_tokenizer_close(t);
  SHELL("cmp %s %s/tokenizer.model", path, run);
  cr_assert(there(run, "tokenizer_config.json") && there(run, "special_tokens_map.json"));
  snprintf(path, sizeof path, "%s/tokenizer.json", run);
  EXPECT_OK(moe_json_read(path, 1 << 20, &root));
  return root;
}

Test(hf_tokenizer, merges_of_a_bpe_tokenizer_make_its_pieces_best_first) {
  cJSON *root = tokenizer_json("bpe");
  const cJSON *model = moe_json_member(root, "model"), *merge;
  const cJSON *vocab = moe_json_member(model, "vocab");
  double last = 0.0; /* pieces are numbered by score */
  int merges = 0;
  cJSON_ArrayForEach(merge, moe_json_member(model, "merges")) {
    char made[128];
    snprintf(made, sizeof made, "%s%s", cJSON_GetArrayItem(merge, 0)->valuestring,
             cJSON_GetArrayItem(merge, 1)->valuestring);
    const cJSON *id = moe_json_member(vocab, made);
    cr_assert(cJSON_IsNumber(id), "%s is no piece", made);
    cr_assert_geq(id->valuedouble, last);
    last = id->valuedouble;
    merges++;
  }
  cr_assert_eq(merges, 5); /* er, _e, es, ou, to: each of two characters */
  cJSON_Delete(root);
}

Test(hf_tokenizer, a_unigram_tokenizer_keeps_its_pieces_and_scores) {
  cJSON *root = tokenizer_json("unigram");
  const cJSON *vocab = moe_json_member(moe_json_member(root, "model"), "vocab");
  moe_tokenizer *t;
  EXPECT_OK(moe_tokenizer_open(MOE_SOURCE_DIR "/tests/fuzz/seeds/tokenizer/unigram", &t));
  cr_assert_eq(cJSON_GetArraySize(vocab), moe_tokenizer_vocab_size(t));
  for (int32_t id = 0; id < moe_tokenizer_vocab_size(t); id++) {
    const cJSON *piece = cJSON_GetArrayItem(vocab, id);
    cr_assert_str_eq(cJSON_GetArrayItem(piece, 0)->valuestring, moe_tokenizer_piece(t, id));
    cr_assert_eq((float)cJSON_GetArrayItem(piece, 1)->valuedouble,
                 moe_tokenizer_piece_score(t, id));
  }
  moe_tokenizer_close(t);
  cJSON_Delete(root);
}
