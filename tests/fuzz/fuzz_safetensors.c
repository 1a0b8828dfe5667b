/* A whole safetensors file from memory: any bytes must give a checked header or an error. What the
 * header was accepted to hold must then lie inside the data. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  moe_safetensors f;
  uint64_t length;
  if (size < sizeof length) return 0;
  memcpy(&length, data, sizeof length);
  size -= sizeof length;
  if (length > size) length = size;
  int64_t rest = (int64_t)(size - length);
  if (moe_safetensors_parse((const char *)data + 8, (int64_t)length, rest, "input", &f) != MOE_OK)
    return 0;
  for (int64_t i = 0; i < f.count; i++) {
    const moe_safetensor *t = &f.list[i];
    if (t->offset < 0 || t->offset > rest || t->count < 0) abort();
    if (t->readable && t->count * moe_dtype_size(t->dtype) > rest - t->offset) abort();
    if (moe_safetensors_find(&f, t->name) != t) abort();
  }
  moe_safetensors_close(&f);
  return 0;
}
