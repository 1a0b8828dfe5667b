/* Any bytes as a SentencePiece model: refused with a message, or it encodes and decodes. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer.h"

static void require(int truth) {
  if (!truth) abort();
}

static void use(const moe_tokenizer *t) {
  static const char text[] = "The model's 16 experts \xE2\x82\xAC \xF0\x9F\x99\x82\n\n  x+y";
  moe_token_list list = {0};
  char *back = NULL;
  moe_status status = moe_tokenizer_encode(t, text, (int64_t)strlen(text), &list);
  if (status == MOE_OK) {
    for (int64_t i = 0; i < list.count; i++) require(moe_tokenizer_piece(t, list.ids[i]) != NULL);
    status = moe_tokenizer_decode(t, list.ids, list.count, &back, NULL);
  }
  require(status == MOE_OK || moe_error_message()[0] != 0);
  for (int which = MOE_TOKEN_PAD; which <= MOE_TOKEN_EOS; which++)
    require(moe_tokenizer_special(t, which) < moe_tokenizer_vocab_size(t));
  free(back);
  free(list.ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  moe_tokenizer *t = NULL;
  moe_error_clear();
  moe_status status = moe_tokenizer_parse(data, (int64_t)size, "fuzz.model", &t);
  if (status == MOE_OK)
    use(t);
  else
    require(status == MOE_DAMAGED && strstr(moe_error_message(), "fuzz.model"));
  moe_tokenizer_close(t);
  return 0;
}
