/* Hopper's own expert products against float32 references (expert_problem.h): chosen and random
 * shapes, and what the model relies on. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/base/rng.h"
#include "tests/gpu/expert_problem.h"

/* ---- the shapes ------------------------------------------------------------------------------ */

static const shape shapes[] = {
    {128, 192, 1, 128, {128}}, /* one tile: begin here when everything is wrong */
    {64, 64, 1, 128, {1}},
    {128, 192, 1, 1, {77}},
    {256, 384, 3, 128, {129, 0, 127}},
    {768, 768, 7, 128, {0, 1, 127, 128, 129, 777, 0}},
    {768, 768, 7, 1, {0, 1, 127, 128, 129, 777, 0}}, /* segments that end inside a tile */
    {192, 320, 16, 128, {3, 0, 700, 1, 128, 0, 0, 255, 2048, 5, 6, 7, 0, 64, 65, 1}},
    {768, 6144, 8, 128, {0, 1, 127, 128, 129, 777, 2048, 300}},
    {768, 6144, 1, 128, {2048}},
    {128, 192, 2, 128, {0, 0}}, /* no rows at all */
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static void on_the_shapes(product k) {
  int wrong = 0;
  for (int i = 0; i < SHAPES; i++) {
    problem p = problem_make(shapes[i], 10 * i);
    wrong += problem_check(k, &p, 0, NULL);
    if (k >= GRAD_W13) wrong += problem_check(k, &p, 1, NULL);
    problem_release(&p);
    if (i < 2 && wrong > 0) break; /* the rest would only hide the map */
  }
  cr_assert(wrong == 0, "%s: %d tensors are wrong", product_names[k], wrong);
}

#define PRODUCT(name, k)                                                                      \
  Test(gpu_experts_sm90, name, .init = problem_open, .fini = problem_close, .timeout = 300) { \
    on_the_shapes(k);                                                                         \
  }
PRODUCT(up_agrees, UP)
PRODUCT(up_with_slopes_agrees, SLOPES_UP)
PRODUCT(down_agrees, DOWN)
PRODUCT(down_backward_agrees, DOWN_BACKWARD)
PRODUCT(down_backward_beside_a_kept_activation_agrees, KEPT_BACKWARD)
PRODUCT(down_backward_from_slopes_agrees, SLOPES_BACKWARD)
PRODUCT(up_backward_agrees, UP_BACKWARD)
PRODUCT(gradient_of_w13_agrees, GRAD_W13)
PRODUCT(gradient_of_w2_agrees, GRAD_W2)
PRODUCT(gradient_of_w13_in_bf16_agrees, HALF_W13)
PRODUCT(gradient_of_w2_in_bf16_agrees, HALF_W2)

/* ---- random shapes ----------------------------------------------------------------------------
 * SHAPES_EACH to a test, so that processes share them. MOE_TEST_SEED in the environment gives other
 * ones (default 1); what is printed names the seed that gives a shape again, as the first of its
 * test. */

enum { SHAPES_EACH = 50 };

static int64_t pick(int64_t seed, int64_t i, int64_t below) {
  return (int64_t)(moe_rng_uniform_f64(9, (uint64_t)seed, (uint64_t)i) * (double)below);
}

/* One in ten is a few experts with wide matrices. */
static shape random_shape(int64_t seed) {
  bool wide = pick(seed, 0, 10) == 0;
  shape s = {64 * (1 + pick(seed, 1, wide ? 16 : 6)),
             64 * (1 + pick(seed, 2, wide ? 24 : 9)),
             1 + pick(seed, 3, wide ? 3 : MOST_EXPERTS),
             pick(seed, 4, 2) == 0 ? 1 : 128,
             {0}};
  for (int64_t j = 0; j < s.e; j++)
    if (pick(seed, 10 + j, 4) > 0) s.rows[j] = pick(seed, 40 + j, 901);
  return s;
}

static void on_random_shapes(int64_t which) {
  const char *wish = getenv("MOE_TEST_SEED");
  int64_t first = (wish != NULL ? atoll(wish) : 1) + which * SHAPES_EACH;
  int wrong = 0, differ = 0;
  for (int64_t seed = first; seed < first + SHAPES_EACH && wrong < 6; seed++) {
    char note[32];
    snprintf(note, sizeof note, ", seed %lld", (long long)seed);
    problem p = problem_make(random_shape(seed), seed);
    for (int k = 0; k < PRODUCTS; k++) {
      wrong += problem_check((product)k, &p, pick(seed, 5, 2) == 0, note);
      if (seed % 5 == 0) differ += problem_repeat((product)k, &p, 1);
    }
    problem_release(&p);
  }
  printf("seeds from %lld: %d tensors wrong, %d differ when made again\n", (long long)first, wrong,
         differ);
  cr_assert(wrong + differ == 0, "%d tensors are wrong, %d differ when made again", wrong, differ);
}

#define RANDOM(name, which)                                                                   \
  Test(gpu_experts_sm90, name, .init = problem_open, .fini = problem_close, .timeout = 300) { \
    on_random_shapes(which);                                                                  \
  }
RANDOM(fifty_random_shapes_agree, 0)
RANDOM(fifty_more_agree, 1)
RANDOM(the_third_fifty_agree, 2)
RANDOM(the_last_fifty_agree, 3)

/* ---- what the model relies on ---------------------------------------------------------------- */

Test(gpu_experts_sm90, every_product_gives_the_same_bits_again, .init = problem_open,
     .fini = problem_close, .timeout = 300) {
  problem p = problem_make(shapes[4], 3);
  int differ = 0;
  for (int k = 0; k < PRODUCTS; k++) differ += problem_repeat((product)k, &p, 4);
  problem_release(&p);
  cr_assert(differ == 0, "a race: results change from run to run");
}

static int64_t differing(const result *x, const result *y) {
  int64_t count = 0, n = x->checked * x->columns;
  for (int64_t i = 0; i < n; i++) count += x->v[i] != y->v[i];
  return count;
}

Test(gpu_experts_sm90, backward_makes_the_forward_activation_bit_for_bit, .init = problem_open,
     .fini = problem_close, .timeout = 300) {
  problem p = problem_make(shapes[4], 4);
  result up[2], back[3];
  problem_run(UP, &p, 0, up);
  free(p.gu);
  p.gu = up[0].v;
  problem_run(DOWN_BACKWARD, &p, 0, back);
  int64_t differ = differing(&up[1], &back[1]), n = p.used * p.s.f;
  for (int i = 0; i < 3; i++) free(back[i].v);
  free(up[1].v);
  problem_release(&p);
  cr_assert(differ == 0, "%lld of %lld elements differ", (long long)differ, (long long)n);
}

Test(gpu_experts_sm90, backward_beside_a_kept_activation_makes_the_same_gradients,
     .init = problem_open, .fini = problem_close, .timeout = 300) {
  problem p = problem_make(shapes[4], 5);
  result remade[3], kept[2];
  problem_run(DOWN_BACKWARD, &p, 0, remade);
  problem_run(KEPT_BACKWARD, &p, 0, kept);
  int64_t differ = differing(&remade[0], &kept[0]), rows = p.used;
  double worst = 0.0; /* gates: other tiles, another order of their sums */
  for (int64_t i = 0; i < rows; i++)
    worst = fmax(worst, fabs((double)remade[2].v[i] - (double)kept[1].v[i]) /
                            (fabs((double)remade[2].v[i]) + 1.0));
  for (int i = 0; i < 3; i++) free(remade[i].v);
  for (int i = 0; i < 2; i++) free(kept[i].v);
  problem_release(&p);
  cr_assert(differ == 0, "%lld gradients of g and u differ", (long long)differ);
  cr_assert(worst < 1e-4, "gradients of gates differ by %g", worst);
}

/* Forward and back by both ways: what differs is how often bf16 was rounded. */
Test(gpu_experts_sm90, backward_from_slopes_makes_the_same_gradients, .init = problem_open,
     .fini = problem_close, .timeout = 300) {
  static const product forward[2] = {UP, SLOPES_UP}, back[2] = {DOWN_BACKWARD, SLOPES_BACKWARD};
  problem p = problem_make(shapes[4], 6);
  result up[2][2], dgu[2][3];
  double error = 0.0, size = 0.0;
  free(p.gu);
  for (int i = 0; i < 2; i++) {
    problem_run(forward[i], &p, 0, up[i]);
    p.gu = up[i][0].v;
    problem_run(back[i], &p, 0, dgu[i]);
  }
  for (int64_t i = 0; i < p.used * 2 * p.s.f; i++) {
    double want = (double)dgu[0][0].v[i], off = (double)dgu[1][0].v[i] - want;
    error += off * off, size += want * want;
  }
  for (int i = 0; i < 3; i++) free(dgu[0][i].v);
  free(dgu[1][0].v), free(up[0][0].v), free(up[0][1].v), free(up[1][1].v);
  problem_release(&p);
  cr_assert(error <= 25e-6 * size, "they differ by %g of their size", sqrt(error / size));
}
