/* Proof that exported weights are the model: logits and hashes of what was written, compared with
 * those of the checkpoint it came from.
 *
 * The model runs on the CPU, one layer's attention at a time, then one expert at a time, so the
 * memory needed is that of the largest tensor and not of the model. Local. */
#ifndef MOE_CHECKPOINT_PROOF_H
#define MOE_CHECKPOINT_PROOF_H

#include <signal.h>

#include "checkpoint/weights.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Every tensor is read whole once, in pieces and in order; `seen` (may be NULL) is shown each piece
 * as it passes, so a caller can hash a model in the same pass. used (may be NULL): [L, E] receives
 * how many tokens each expert got. */
typedef struct {
  moe_status (*seen)(void *context, const moe_param *p, int64_t begin, int64_t count,
                     const float *values);
  void *context;
  int64_t *used;
  const volatile sig_atomic_t *stop; /* becomes non-zero: give up with MOE_STOPPED; or NULL */
} moe_weights_watch;

/* logits f32 [batch * seq, V] of `batch` sequences of `seq` tokens that start at position 0, in
 * float32. watch may be NULL. MOE_INVALID for tokens outside the vocabulary. */
moe_status moe_weights_logits(moe_weights *w, const int32_t *tokens, int64_t batch, int64_t seq,
                              const moe_weights_watch *watch, float *logits);

typedef struct {
  moe_weights *original; /* what was exported */
  moe_weights *expected; /* the same rounded as the export rounds; may be `original` */
  moe_weights *written;  /* read back from the export */
  /* Largest |expected - written| allowed, as a share of the largest |expected| logit; 0: 1e-5. */
  double tolerance;
  /* The same between original and written; 0: no limit, only reported. */
  double rounding_tolerance;
  const volatile sig_atomic_t *stop;
} moe_proof_options;

typedef struct {
  int64_t tokens;         /* prompt tokens, in all */
  double scale;           /* largest |logit| of `expected` */
  double difference;      /* largest |expected - written|, divided by scale */
  double rounding;        /* largest |original - written|, divided by scale */
  double agreement;       /* share of positions whose best token is the same in original, written */
  int64_t tensors;        /* tensors whose XXH3-128 is the same in expected and written: all */
  int64_t expert_tensors; /* of them, experts': 3 L E */
  int64_t experts, experts_used; /* L E, and those that got a token of the prompts */
  char hash[33];                 /* XXH3-128 of all tensors' hashes, in the order of the table */
} moe_proof_report;

/* Compare on prompts drawn for the model's sizes (a few dozen tokens each, <bos> first). MOE_FAILED
 * names the tensor that differs, or says by how much the logits do. */
moe_status moe_proof(const moe_proof_options *options, moe_proof_report *out);
/* One line for people and logs. */
void moe_proof_print(const moe_proof_report *report);

#ifdef __cplusplus
}
#endif
#endif
