/* config.json of a folder to import: any bytes must give a model within the settings' limits, or an
 * error. */
#include <stdlib.h>

#include "checkpoint/hf_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  moe_hf_config h;
  if (moe_hf_config_parse((const char *)data, (int64_t)size, "input", &h) != MOE_OK) return 0;
  moe_config *c = malloc(sizeof *c);
  if (!c) return 0;
  moe_config_defaults(c);
  if (moe_hf_config_apply(&h, "input", c) == MOE_OK) {
    moe_dims d = moe_dims_of(c);
    if (d.layers != h.dims.layers || d.experts != h.dims.experts || d.top_k > d.experts) abort();
    if (moe_dims_parameters(&d) < 1) abort();
  }
  free(c);
  return 0;
}
