/* Token files for tests that train a little. */
#ifndef MOE_TESTS_SUPPORT_TOKENS_H
#define MOE_TESTS_SUPPORT_TOKENS_H

#include <criterion/criterion.h>
#include <stdio.h>

#include "data/token_file.h"

/* FOLDER/tokens: 20 documents of 64 tokens from 4 to 93. */
static inline void write_tokens(const char *folder, int64_t vocab) {
  char path[256];
  snprintf(path, sizeof path, "%s/tokens", folder);
  moe_token_writer *w;
  cr_assert_eq(moe_token_writer_create(path, vocab, &w), MOE_OK);
  for (int d = 0; d < 20; d++) {
    int32_t ids[64];
    for (int i = 0; i < 64; i++) ids[i] = 4 + (d * 7 + i * 3) % 90;
    cr_assert_eq(moe_token_writer_append(w, ids, 64), MOE_OK);
    cr_assert_eq(moe_token_writer_end_document(w), MOE_OK);
  }
  cr_assert_eq(moe_token_writer_finish(w), MOE_OK);
  moe_token_writer_destroy(w);
}

#endif
