/* Any bytes as a token file: refused with a one-line message that names a byte of the index, or
 * everything in it can be read.
 *
 * The input is the .idx; its last bytes, as many as its first byte says, are the .bin. So an input
 * of a real index needs its size kept in step, which the fuzzer finds soon from the seeds. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "data/token_file.h"

static void require(int truth) {
  if (!truth) abort();
}

static void use(const moe_token_file *f) {
  int64_t tokens = moe_token_file_tokens(f), documents = moe_token_file_documents(f);
  int32_t *ids = malloc((size_t)tokens * sizeof *ids + 1);
  require(ids != NULL);
  moe_status status = moe_token_file_read(f, 0, tokens, INT32_MAX, ids);
  require(status == MOE_OK || status == MOE_DAMAGED); /* negative or too large ids */
  free(ids);
  int64_t before = 0;
  for (int64_t d = 0; d < documents; d++) {
    int64_t begin = moe_token_file_document_begin(f, d);
    int64_t end = moe_token_file_document_begin(f, d + 1);
    require(begin == before && begin <= end && end <= tokens);
    if (begin < end) require(moe_token_file_document_of(f, end - 1) == d);
    before = end;
  }
  require(before == tokens);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1 || (size_t)data[0] + 1 > size) return 0;
  size_t bin_size = data[0], index_size = size - 1 - bin_size;
  moe_token_file *f = NULL;
  moe_error_clear();
  moe_status status = moe_token_file_parse(data + 1, (int64_t)index_size, data + 1 + index_size,
                                           (int64_t)bin_size, "fuzz", &f);
  if (status == MOE_OK) {
    use(f);
  } else {
    const char *message = moe_error_message();
    require(status == MOE_DAMAGED && strstr(message, "fuzz.idx, byte ") && !strchr(message, '\n'));
  }
  moe_token_file_close(f);
  return 0;
}
