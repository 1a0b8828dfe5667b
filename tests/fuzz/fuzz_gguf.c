/* Any bytes as a GGUF file: refused with a message that names it, or every key and every element of
 * every tensor in it can be read. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/gguf.h"

static void require(int truth) {
  if (!truth) abort();
}

static void use(const moe_gguf *g) {
  static const char *const keys[] = {"general.architecture", "general.alignment",
                                     "llama.block_count", "llama.rope.freq_base",
                                     "tokenizer.ggml.tokens"};
  for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
    int64_t number;
    double real;
    char *text = NULL;
    moe_gguf_entry e;
    if (!moe_gguf_find(g, keys[i], &e)) continue;
    if (moe_gguf_int(g, keys[i], &number) == MOE_OK) require(number >= 0);
    moe_gguf_number(g, keys[i], &real);
    if (moe_gguf_text(g, keys[i], &text) == MOE_OK) require(strlen(text) <= (size_t)e.count);
    free(text);
  }
  const moe_gguf_tensor *t = moe_gguf_tensor_find(g, "t");
  if (!t) return;
  float *values = malloc((size_t)t->elements * sizeof *values);
  void *raw = malloc((size_t)t->bytes);
  require(values && raw && moe_gguf_read(g, t, 0, t->elements, raw) == MOE_OK);
  moe_ggml_decode(t->type, raw, t->elements, values);
  free(values);
  free(raw);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  moe_gguf *g = NULL;
  moe_error_clear();
  moe_status status = moe_gguf_parse(data, (int64_t)size, "fuzz", &g);
  if (status == MOE_OK)
    use(g);
  else
    require(status == MOE_DAMAGED && g == NULL && strstr(moe_error_message(), "fuzz"));
  moe_gguf_close(g);
  return 0;
}
