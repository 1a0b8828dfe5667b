/* Weights to and from Hugging Face's layout: what transformers' MixtralForCausalLM and vLLM load.
 *
 *   OUT/model-00001-of-00006.safetensors  model.safetensors.index.json  config.json
 *      /generation_config.json  tokenizer.model  tokenizer.json  tokenizer_config.json
 *      /special_tokens_map.json  README.md
 *
 * An export is written beside its place, read back, proven (proof.h), and only then renamed. */
#ifndef MOE_CHECKPOINT_HF_H
#define MOE_CHECKPOINT_HF_H

#include "checkpoint/proof.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_EXPORT_RUN_DTYPE = -1 };

typedef struct {
  const char *checkpoint; /* a step folder */
  const char *out;        /* folder (GGUF: file) to make */
  int dtype;              /* a moe_dtype of 2 or 4 bytes; MOE_EXPORT_RUN_DTYPE: the compute type */
  double alpha;           /* NTK factor to fold into the rotary base; 0: the run's own */
  int64_t shard_bytes;    /* largest file; 0: 5 GB */
  const char *tokenizer;  /* SentencePiece model, "bytes" or "none"; NULL: the run's */
  bool overwrite;         /* replace `out` when it exists */
  bool drop_router_bias;  /* leave out a selection bias, which Mixtral has no place for */
  const volatile sig_atomic_t *stop;
} moe_export_options;

/* Local. MOE_USAGE: `out` exists, no such tokenizer, a router bias that would be lost; MOE_FAILED:
 * what was written is not the model (and has been deleted). */
moe_status moe_export_hf(const moe_export_options *options);

typedef struct {
  const char *folder;  /* with config.json and *.safetensors */
  const char *run_dir; /* gets checkpoints/step-N, tokenizer.model and config.ini */
  int64_t step;
  int dtype; /* compute type of the new run; MOE_EXPORT_RUN_DTYPE: that of the files */
  const volatile sig_atomic_t *stop;
} moe_import_options;

/* Collective, for a world of one rank. Writes step-N through the commit protocol: weights only, so
 * a run that resumes from it starts its optimizer afresh. MOE_USAGE for a model this program cannot
 * train, MOE_DAMAGED for files that are not what they say. */
moe_status moe_import_hf(moe_comm *world, const moe_import_options *options);

/* Open such a folder as a source of weights (safetensors single or sharded; experts one by one or
 * fused; fp32, bf16, fp16). Nothing in it is trusted. MOE_USAGE, MOE_DAMAGED, MOE_IO. */
moe_status moe_weights_open_hf(const char *folder, moe_weights **out);

#ifdef __cplusplus
}
#endif
#endif
