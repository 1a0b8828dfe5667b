/* Proof that exported weights are the model: logits and hashes of what was written, compared with
 * those of the checkpoint it came from.
 *
 * The model runs on the CPU, a few rows of a matrix at a time, so the memory needed is that of the
 * activations; a layer's experts are shared out over the processors. Local. */
#ifndef MOE_CHECKPOINT_PROOF_H
#define MOE_CHECKPOINT_PROOF_H

#include <signal.h>

#include "checkpoint/manifest.h"
#include "checkpoint/weights.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What was seen of a tensor's f32 values, all of which pass once, in order. */
typedef struct {
  XXH128_hash_t hash;
  int64_t count; /* 0: it was not read to its end */
} moe_weights_seen;

/* A forward pass. A source that is another one rounded is read with it when it comes right after
 * it. */
typedef struct {
  moe_weights *weights;
  float *logits;          /* f32 [batch * seq, V], out */
  moe_weights_seen *seen; /* [params.count], out; or NULL */
  int64_t *used;          /* [L, E], out: how many tokens each expert got; or NULL */
} moe_weights_pass;

enum { MOE_WEIGHTS_PASSES = 3 };

typedef struct {
  void (*passed)(void *context, int64_t bytes); /* of f32 values more; any threads; or NULL */
  void *context;
  const volatile sig_atomic_t *stop; /* becomes non-zero: give up with MOE_STOPPED; or NULL */
} moe_weights_watch;

/* The logits of 1 to MOE_WEIGHTS_PASSES models of the same sizes for `batch` sequences of `seq`
 * tokens that start at position 0, in float32. watch may be NULL. MOE_INVALID for tokens outside
 * the vocabulary, or sizes that differ. */
moe_status moe_weights_logits(const moe_weights_pass *pass, int passes, const int32_t *tokens,
                              int64_t batch, int64_t seq, const moe_weights_watch *watch);

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
  double seconds, bytes;         /* it took, and f32 values that went through the model */
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
