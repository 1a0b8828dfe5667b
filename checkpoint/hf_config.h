/* A Mixtral config.json and our settings, both ways. Private to checkpoint/hf_*.c and tests. */
#ifndef MOE_CHECKPOINT_HF_CONFIG_H
#define MOE_CHECKPOINT_HF_CONFIG_H

#include "core/base/config.h"
#include "core/model/params.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_dims dims;
  double norm_eps, theta; /* theta: the rotary base, any scaling folded in */
  int64_t context;
  double init_std, aux_coef;
  moe_dtype dtype;    /* of the weights: f32, bf16 or f16 */
  int64_t special[4]; /* ids of <pad> <unk> <bos> <eos> (data/tokenizer.h); -1: none */
} moe_hf_config;

/* The model of a config.json. MOE_DAMAGED: not JSON, a member missing or of another kind; MOE_USAGE
 * names what this program cannot compute (another architecture or activation, a sliding window,
 * tied embeddings, scaled rotary embedding, sizes out of range). `special` is not read. Local. */
moe_status moe_hf_config_parse(const char *text, int64_t length, const char *where,
                               moe_hf_config *out);
moe_status moe_hf_config_read(const char *path, moe_hf_config *out);
/* The [model] settings and the compute type, over what c holds; resolved. MOE_USAGE. */
moe_status moe_hf_config_apply(const moe_hf_config *h, const char *where, moe_config *c);

/* Write config.json and generation_config.json into a folder, fsynced. Local. */
moe_status moe_hf_config_write(const moe_hf_config *h, const char *folder);

#ifdef __cplusplus
}
#endif
#endif
