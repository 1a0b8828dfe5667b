/* Random problems for Hopper's expert products, and whether they were solved.
 *
 * Every product gets its own random inputs, rounded to bf16, so that one wrong kernel does not hide
 * another. Outputs start as NaN, so do the inputs' rows after the last segment; both must still be
 * NaN there afterwards. */
#ifndef MOE_TESTS_GPU_EXPERT_PROBLEM_H
#define MOE_TESTS_GPU_EXPERT_PROBLEM_H

#include "kernels/ops.h"

enum { MOST_EXPERTS = 20 };
/* KEPT: without making a again. SLOPES: a's derivatives in place of g and u. HALF: weight gradients
 * in bf16; their references stay f32. */
typedef enum {
  UP,
  SLOPES_UP,
  DOWN,
  DOWN_BACKWARD,
  KEPT_BACKWARD,
  SLOPES_BACKWARD,
  UP_BACKWARD,
  GRAD_W13,
  GRAD_W2,
  HALF_W13,
  HALF_W2,
  PRODUCTS
} product;
extern const char *const product_names[];

typedef struct {
  int64_t d, f, e;
  int64_t pad; /* segments begin at multiples of it */
  int64_t rows[MOST_EXPERTS];
} shape;

/* Host values, each representable in bf16. */
typedef struct {
  shape s;
  int64_t used, c; /* rows of segments, rows of the buffers */
  int32_t offsets[MOST_EXPERTS + 1];
  float *x, *dy, *gates, *gu, *a, *w13, *w2, *base; /* base: what gradients add to */
} problem;

/* A product's output. */
typedef struct {
  const char *name;
  int64_t rows, checked, columns; /* the first `checked` rows belong to segments */
  double tolerance;               /* relative, of 2-norms */
  moe_dtype dtype;                /* where the act type is bf16 */
  float *v;
} result;

/* Around each test: open and close the devices (without a Hopper GPU the test is skipped). */
void problem_open(void);
void problem_close(void);

problem problem_make(shape s, int64_t seed);
void problem_release(problem *p);

/* Solve it on Hopper. Returns how many outputs there are; free r[i].v. */
int problem_run(product k, const problem *p, int accumulate, result *r);
/* How many of the product's outputs are wrong; each is printed. quiet: only wrong ones are, with
 * this text, and the CPU is the judge whatever the size. */
int problem_check(product k, const problem *p, int accumulate, const char *quiet);
/* Solve it `times` more: how many outputs differ from the first in any bit. */
int problem_repeat(product k, const problem *p, int times);

#endif
