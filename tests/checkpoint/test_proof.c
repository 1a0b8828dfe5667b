/* A proof holds for the same weights, and for nothing else. */
#include <math.h>

#include "checkpoint/proof.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

TestSuite(proof, .init = open_world, .fini = close_world, .timeout = 60);

static moe_weights *original, *written;
static moe_proof_report report;

/* The model as step 1, and as step 2 after `change` was made to one of its params. */
static void open_both(const char *name, void (*change)(float *values, int64_t n)) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  save_model(c, 5, 1);
  bool changed = false;
  for (int i = 0; i < n; i++)
    if (pieces[i].role == MOE_ROLE_PARAM && name && strcmp(pieces[i].name, name) == 0) {
      change(pieces[i].data, pieces[i].count);
      changed = true;
    }
  cr_assert(changed || !name);
  moe_run_state state = {.step = 2, .config = moe_config_text(c)};
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 9, NULL, NULL));
  EXPECT_OK(moe_weights_open_checkpoint(in_step(1, ""), &original));
  EXPECT_OK(moe_weights_open_checkpoint(in_step(2, ""), &written));
}

static moe_status prove(moe_weights *expected, double rounding_tolerance) {
  moe_proof_options o = {.original = original, .expected = expected, .written = written};
  o.rounding_tolerance = rounding_tolerance;
  return moe_proof(&o, &report);
}

Test(proof, holds_for_the_same_weights_and_accounts_for_every_expert) {
  open_both(NULL, NULL);
  EXPECT_OK(prove(original, 0.0));
  cr_assert_eq(report.expert_tensors, 3 * 3 * 5);
  cr_assert_eq(report.tensors, 3 * 3 * 5 + 3 * 7 + 3);
  cr_assert_eq(report.experts, 15);
  cr_assert_eq(report.experts_used, 15);
  cr_assert_eq(report.difference, 0.0);
  cr_assert_eq(report.agreement, 1.0);
  cr_assert_gt(report.scale, 0.1);
  cr_assert_eq(strlen(report.hash), 32);
}

static void last_bit(float *values, int64_t n) {
  values[n - 1] = nextafterf(values[n - 1], 9.0f);
}
static void not_a_number(float *values, int64_t n) {
  values[n / 2] = NAN;
}

#define LAST_EXPERT "model.layers.2.block_sparse_moe.experts.4.w2.weight"

Test(proof, fails_for_one_bit_of_one_expert_and_names_it) {
  open_both(LAST_EXPERT, last_bit);
  cr_assert_eq(prove(original, 0.0), MOE_FAILED);
  EXPECT_SAYS(LAST_EXPERT);
}

Test(proof, fails_for_one_bit_of_the_embedding_of_a_token_no_prompt_has) {
  open_both("model.embed_tokens.weight", last_bit);
  cr_assert_eq(prove(original, 0.0), MOE_FAILED);
  EXPECT_SAYS("model.embed_tokens.weight");
}

/* A source that gives expert 1 of layer 0 for expert 0 and the other way round. */
typedef struct {
  moe_weights base;
  moe_weights *from;
} swapped;

static moe_status swapped_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                               float *out) {
  moe_weights *from = ((swapped *)w)->from;
  if (p->layer == 0 && (p->expert == 0 || p->expert == 1))
    p = moe_params_at(&from->params, p->row->name, 0, 1 - p->expert);
  return moe_weights_read(from, p, begin, count, out);
}
static moe_dtype swapped_dtype(const moe_weights *w, const moe_param *p) {
  return moe_weights_dtype(((const swapped *)w)->from, p);
}
static void swapped_close(moe_weights *w) {
  free(w);
}

Test(proof, fails_for_two_experts_in_each_others_place) {
  static const moe_weights_kind kind = {
      .read = swapped_read, .dtype = swapped_dtype, .close = swapped_close};
  moe_weights *s;
  open_both(NULL, NULL);
  EXPECT_OK(moe_weights_new(&kind, sizeof(swapped), "swapped", &s));
  ((swapped *)s)->from = written;
  s->dims = written->dims;
  s->norm_eps = written->norm_eps;
  s->rope_base = written->rope_base;
  EXPECT_OK(moe_weights_list(s));
  moe_proof_options o = {.original = original, .expected = original, .written = s};
  cr_assert_eq(moe_proof(&o, &report), MOE_FAILED);
  EXPECT_SAYS("layers.0.block_sparse_moe.experts.0.w1");
  moe_weights_close(s);
}

Test(proof, fails_for_another_rotary_base_or_epsilon) {
  open_both(NULL, NULL);
  written->rope_alpha = 2.0;
  cr_assert_eq(prove(original, 0.0), MOE_FAILED);
  EXPECT_SAYS("rotary base");
  written->rope_alpha = 1.0;
  written->norm_eps *= 1.01;
  cr_assert_eq(prove(original, 0.0), MOE_FAILED);
  EXPECT_SAYS("epsilon");
}

Test(proof, fails_for_logits_that_are_not_numbers) {
  open_both("model.norm.weight", not_a_number);
  moe_proof_options o = {.original = written, .expected = written, .written = written};
  cr_assert_eq(moe_proof(&o, &report), MOE_FAILED);
  EXPECT_SAYS("logits");
}

Test(proof, reports_what_rounding_costs_and_holds_it_to_a_limit) {
  moe_weights *exact, *rounded;
  open_both(NULL, NULL);
  exact = written;
  EXPECT_OK(moe_weights_round(exact, MOE_BF16, &rounded));
  written = rounded;
  EXPECT_OK(prove(rounded, 0.0));
  cr_assert_eq(report.difference, 0.0);
  cr_assert(report.rounding > 1e-5 && report.rounding < 0.2, "%g", report.rounding);
  cr_assert_eq(prove(rounded, 1e-6), MOE_FAILED);
  EXPECT_SAYS("wider type");
  cr_assert_eq(prove(original, 0.0), MOE_FAILED); /* the rounded tensors are not the exact ones */
  moe_weights_close(rounded);
  moe_weights_close(exact);
}

Test(proof, fails_for_a_damaged_byte_of_either_side_and_names_the_file) {
  open_both(NULL, NULL);
  moe_weights_close(written);
  SHELL("printf '\\125' | dd of=%s bs=1 seek=30000 conv=notrunc status=none",
        in_step(2, "shard-00000-of-00001.h5"));
  EXPECT_OK(moe_weights_open_checkpoint(in_step(2, ""), &written));
  cr_assert_eq(prove(original, 0.0), MOE_DAMAGED);
  EXPECT_SAYS("step-00000002");
  moe_weights *damaged = written;
  written = original;
  original = damaged;
  cr_assert_eq(prove(original, 0.0), MOE_DAMAGED);
  EXPECT_SAYS("step-00000002");
}

Test(proof, stops_when_asked) {
  volatile sig_atomic_t stop = 1;
  open_both(NULL, NULL);
  moe_proof_options o = {.original = original, .expected = original, .written = written};
  o.stop = &stop;
  cr_assert_eq(moe_proof(&o, &report), MOE_STOPPED);
}
