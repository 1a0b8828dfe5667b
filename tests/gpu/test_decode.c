/* CUDA against the CPU at sizes that reach what small tests do not: generation. Products with few
 * rows, experts of few tokens, long caches, and the router in one block. */
#include <criterion/criterion.h>
#include <string.h>

#include "tests/gpu/both.h"

static const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};

static double rounding(moe_dtype type) {
  return type == MOE_BF16 ? 3e-3 : type == MOE_F16 ? 4e-4 : 2e-6;
}

Test(gpu_decode, products_with_few_rows_agree, .init = both_open, .fini = both_close) {
  const int64_t sizes[][3] = {{1, 896, 768},
                              {8, 768, 768},
                              {9, 1000, 776},
                              {32, 768, 6144},
                              {17, 33, 2056},
                              {3, 32000, 768},
                              {1, 7, 8},
                              /* large b, several segments of k, odd edges */
                              {32, 11000, 776},
                              {16, 9001, 1000}};
  for (int i = 0; i < 9; i++)
    for (int n = 0; n < 3; n++)
      for (int wide = 0; wide < 2; wide++) {
        int64_t m = sizes[i][0], k = sizes[i][2];
        moe_dtype to = wide ? MOE_F32 : types[n];
        double tolerance = wide ? 2e-5 : rounding(to) + 1e-5;
        both a = both_random("a", types[n], SHAPE(m, k), 1.0);
        both b = both_random("b", types[n], SHAPE(sizes[i][1], k), 0.05);
        both c = both_output("c", to, SHAPE(m, sizes[i][1]));
        BOTH(moe_gemm(dev, MOE_NT, a.t[s], b.t[s], 0.0f, c.t[s]));
        AGREE(c, tolerance);
        both_align(c);
        BOTH(moe_gemm(dev, MOE_NT, a.t[s], b.t[s], 1.0f, c.t[s]));
        AGREE(c, tolerance);
      }
}

/* Whatever stands beside it, a row comes out the same: texts do not depend on the batch. */
Test(gpu_decode, a_row_does_not_depend_on_its_neighbours, .init = both_open, .fini = both_close) {
  const int64_t sizes[] = {900, 11000}; /* small and large b */
  both a = both_random("a", MOE_BF16, SHAPE(32, 768), 1.0);
  for (int n = 0; n < 2; n++) {
    both b = both_random("b", MOE_BF16, SHAPE(sizes[n], 768), 0.05);
    both one = both_output("one", MOE_F32, SHAPE(1, sizes[n]));
    both all = both_output("all", MOE_F32, SHAPE(32, sizes[n]));
    ON_GPU(moe_gemm(dev, MOE_NT, a.t[s], b.t[s], 0.0f, all.t[s]));
    for (int64_t i = 0; i < 32; i += 5) {
      ON_GPU(moe_gemm(dev, MOE_NT, moe_tensor_rows(a.t[s], i, 1), b.t[s], 0.0f, one.t[s]));
      both row = {.t = {one.t[CPU_SIDE], moe_tensor_rows(all.t[GPU_SIDE], i, 1)}, .name = "row"};
      cr_assert_eq(both_hash(one), both_hash(row), "row %lld", (long long)i);
    }
  }
}

typedef struct {
  int64_t t, k, e, d, f;
} expert_shape;

static void decode_experts(moe_dtype act, expert_shape n) {
  both x = both_random("x", act, SHAPE(n.t, n.d), 1.0);
  both experts = both_ints("experts", SHAPE(n.t, n.k), -1, n.e);
  both gates = both_random("gates", MOE_F32, SHAPE(n.t, n.k), 0.5);
  both w13 = both_random("w13", act, SHAPE(n.e, 2 * n.f, n.d), 0.04);
  both w2 = both_random("w2", act, SHAPE(n.e, n.d, n.f), 0.02);
  both hidden = both_output("hidden", act, SHAPE(n.t * n.k, n.f));
  both out = both_output("out", act, SHAPE(n.t, n.d));
  BOTH(moe_experts_decode(dev, x.t[s], experts.t[s], gates.t[s], 0, w13.t[s], w2.t[s], hidden.t[s],
                          out.t[s]));
  AGREE(out, 2.0 * rounding(act) + 2e-5);
  uint64_t first = both_hash(out);
  ON_GPU(moe_experts_decode(dev, x.t[s], experts.t[s], gates.t[s], 0, w13.t[s], w2.t[s],
                            hidden.t[s], out.t[s]));
  cr_assert_eq(both_hash(out), first, "other bits the second time");
}

Test(gpu_decode, experts_of_few_tokens_agree, .init = both_open, .fini = both_close) {
  const expert_shape sizes[] = {{1, 4, 8, 768, 3072},
                                {32, 4, 16, 768, 520},
                                {8, 2, 4, 768, 2048},
                                {100, 4, 16, 264, 520},
                                {9, 3, 7, 100, 333},
                                {5, 8, 300, 64, 72},
                                /* more pairs of an expert than share a pass; segments, edges */
                                {64, 4, 4, 776, 1000},
                                {3, 3, 5, 1544, 392}};
  for (int i = 0; i < 8; i++)
    for (int n = 0; n < 3; n++) decode_experts(types[n], sizes[i]);
}

static void attend(moe_dtype act, moe_attention_shape shape, int64_t room, int64_t longest) {
  int64_t b = shape.batch, t = b * shape.seq, width = shape.kv_heads * shape.head_dim;
  both qkv = both_random("qkv", act, SHAPE(t, (shape.heads * shape.head_dim + 2 * width)), 1.0);
  both keys = both_random("keys", act, SHAPE(b, room, width), 1.0);
  both values = both_random("values", act, SHAPE(b, room, width), 1.0);
  both lengths = both_ints("lengths", SHAPE(b), longest / 2, longest);
  both out = both_random("out", act, SHAPE(t, shape.heads * shape.head_dim), 1.0);
  void *scratch[SIDES];
  for (int s = 0; s < SIDES; s++) {
    int64_t bytes = moe_attention_cached_scratch(both_dev[s], shape, room, act);
    scratch[s] = moe_device_alloc(both_dev[s], bytes);
    moe_device_set_scratch(both_dev[s], scratch[s], bytes);
  }
  for (int step = 0; step < 2; step++) {
    BOTH(moe_attention_cached(dev, shape, qkv.t[s], moe_tensor_none(), moe_tensor_none(), keys.t[s],
                              values.t[s], lengths.t[s], out.t[s]));
    AGREE(out, 2.0 * rounding(act));
    AGREE(keys, 0.0);
    AGREE(values, 0.0);
  }
  for (int s = 0; s < SIDES; s++) {
    moe_device_set_scratch(both_dev[s], NULL, 0);
    moe_device_free(both_dev[s], scratch[s]);
  }
}

Test(gpu_decode, attention_over_long_caches_agrees, .init = both_open, .fini = both_close) {
  const struct {
    moe_attention_shape shape;
    int64_t room, longest;
  } list[] = {{{1, 1, 12, 1, 64}, 70000, 69999}, {{32, 1, 12, 1, 64}, 1500, 1499},
              {{1, 512, 12, 1, 64}, 3000, 2600}, {{2, 77, 8, 2, 128}, 1000, 990},
              {{3, 4, 12, 1, 64}, 5000, 4990},   {{2, 1, 6, 2, 80}, 4000, 3900},
              {{2, 3, 3, 3, 250}, 700, 690},     {{1, 33, 16, 4, 32}, 2100, 2090},
              {{3, 1, 12, 1, 64}, 300, 3},       {{2, 1, 12, 1, 64}, 9000, 8990},
              {{2, 5, 12, 1, 64}, 1100, 1099},   {{40, 1, 4, 2, 128}, 500, 499}};
  for (int i = 0; i < 12; i++)
    for (int n = 0; n < 3; n++) attend(types[n], list[i].shape, list[i].room, list[i].longest);
}

Test(gpu_decode, router_of_few_tokens_agrees, .init = both_open, .fini = both_close) {
  const int64_t sizes[][5] = {/* T, D, E, K, groups */
                              {1, 768, 16, 4, 1},
                              {32, 768, 16, 4, 4},
                              {7, 100, 33, 33, 7},
                              {20, 776, 64, 8, 1},
                              {3, 64, 1, 1, 1}};
  for (int i = 0; i < 5; i++)
    for (int n = 0; n < 3; n++)
      for (int biased = 0; biased < 2; biased++) {
        int64_t t = sizes[i][0], d = sizes[i][1], e = sizes[i][2], k = sizes[i][3];
        both x = both_random("x", types[n], SHAPE(t, d), 1.0);
        both weight = both_random("weight", MOE_F32, SHAPE(e, d), 0.05);
        both bias = biased ? both_random("bias", MOE_F32, SHAPE(e), 0.1) : both_none();
        both probs = both_output("probs", MOE_F32, SHAPE(t, e));
        both lse = both_output("lse", MOE_F32, SHAPE(t));
        both experts = both_output("experts", MOE_I32, SHAPE(t, k));
        both gates = both_output("gates", MOE_F32, SHAPE(t, k));
        both stats = both_output("stats", MOE_F32, SHAPE(sizes[i][4], 2 * e + 1));
        BOTH(moe_router(dev, x.t[s], weight.t[s], bias.t[s], probs.t[s], lse.t[s], experts.t[s],
                        gates.t[s], stats.t[s]));
        AGREE(probs, 2e-6);
        AGREE(lse, 2e-6);
        AGREE(experts, 0.0);
        AGREE(gates, 2e-6);
        AGREE(stats, 2e-6);
      }
}
