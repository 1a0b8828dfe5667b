/* CUDA against the CPU at sizes that reach what small tests do not: rows longer than a block, split
 * sums, several rounds, scalar and 16-byte accesses. Elementwise, norm, matrix products, rope,
 * attention, loss, optimizer, sampling, embedding. */
#include <criterion/criterion.h>

#include "kernels/backend.h"
#include "tests/gpu/both.h"

static const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};

/* What one rounding to the type costs, with room for a last bit that goes the other way. */
static double rounding(moe_dtype type) {
  return type == MOE_BF16 ? 3e-3 : type == MOE_F16 ? 4e-4 : 2e-6;
}

#define EACH_TYPE(act)                          \
  for (int i_##act = 0; i_##act < 3; i_##act++) \
    for (moe_dtype act = types[i_##act], *once_##act = &act; once_##act != NULL; once_##act = NULL)

Test(gpu_elementwise, agrees_for_all_pairs_of_types_and_odd_starts, .init = both_open,
     .fini = both_close) {
  const int64_t sizes[] = {1, 7, 4096, 1000003};
  for (int i = 0; i < 4; i++) EACH_TYPE(to) EACH_TYPE(from) {
      both x = both_random("x", from, SHAPE(sizes[i] + 1), 1.0);
      both y = both_random("y", to, SHAPE(sizes[i] + 1), 1.0);
      both z = both_output("z", to, SHAPE(sizes[i]));
      both sum = both_random("sum", MOE_F64, SHAPE(1), 0.0);
      for (int s = 0; s < SIDES; s++) { /* from the second element on: not 16-byte aligned */
        x.t[s] = moe_tensor_rows(x.t[s], 1, sizes[i]);
        y.t[s] = moe_tensor_rows(y.t[s], 1, sizes[i]);
      }
      BOTH(moe_copy(dev, z.t[s], x.t[s]));
      AGREE(z, 0.0);
      BOTH(moe_add(dev, y.t[s], z.t[s]));
      BOTH(moe_scale(dev, y.t[s], 0.37f));
      AGREE(y, 0.0);
      BOTH(moe_sum_squares(dev, y.t[s], sum.t[s]));
      BOTH(moe_sum_squares(dev, z.t[s], sum.t[s]));
      AGREE(sum, 1e-13);
    }
}

Test(gpu_norm, agrees_for_short_long_and_odd_rows, .init = both_open, .fini = both_close) {
  const int64_t sizes[][2] = {{3000, 768}, {301, 4104}, {40, 20000}, {501, 777}, {77, 129}, {5, 1}};
  for (int i = 0; i < 6; i++) EACH_TYPE(act) {
      int64_t t = sizes[i][0], d = sizes[i][1];
      both x = both_random("x", act, SHAPE(t, d), 1.0), r = both_random("r", act, SHAPE(t, d), 1.0);
      both gain = both_random("gain", MOE_F32, SHAPE(d), 1.0);
      both sum = both_output("sum", act, SHAPE(t, d)), out = both_output("out", act, SHAPE(t, d));
      both rstd = both_output("rstd", MOE_F32, SHAPE(t));
      both dout = both_random("dout", act, SHAPE(t, d), 1.0);
      both dx = both_random("dx", act, SHAPE(t, d), 1.0);
      both dgain = both_random("dgain", MOE_F32, SHAPE(d), 1.0);
      BOTH(moe_rms_norm(dev, x.t[s], r.t[s], gain.t[s], 1e-5, sum.t[s], out.t[s], rstd.t[s]));
      AGREE(sum, 0.0);
      AGREE(rstd, 1e-6);
      AGREE(out, rounding(act));
      BOTH(moe_rms_norm_backward(dev, dout.t[s], sum.t[s], gain.t[s], rstd.t[s], dx.t[s],
                                 dgain.t[s]));
      AGREE(dx, rounding(act));
      AGREE(dgain, 2e-6);
      BOTH(moe_rms_norm(dev, x.t[s], both_none().t[s], gain.t[s], 1e-5, both_none().t[s], out.t[s],
                        rstd.t[s]));
      AGREE(out, rounding(act));
    }
}

/* Both sides sum in float32, each in its own order; tensor cores round in ways of their own. */
static double product_tolerance(moe_dtype in, moe_dtype out) {
  return out == MOE_F32 ? (in == MOE_F32 ? 1e-5 : 2e-5) : rounding(out);
}

Test(gpu_gemm, agrees_in_every_form_and_type, .init = both_open, .fini = both_close) {
  const int64_t sizes[][3] = {{512, 768, 1536}, {40, 24, 5000}, {300, 1000, 200}, {33, 65, 4097}};
  for (int i = 0; i < 4; i++)
    for (int form = MOE_NN; form <= MOE_TN; form++)
      for (int wide = 0; wide < 2; wide++) EACH_TYPE(act) {
          int64_t m = sizes[i][0], n = sizes[i][1], k = sizes[i][2];
          moe_dtype to = wide ? MOE_F32 : act;
          both a =
              both_random("a", act, SHAPE(form == MOE_TN ? k : m, form == MOE_TN ? m : k), 1.0);
          both b =
              both_random("b", act, SHAPE(form == MOE_NT ? n : k, form == MOE_NT ? k : n), 1.0);
          both c = both_output("c", to, SHAPE(m, n));
          BOTH(moe_gemm(dev, (moe_gemm_form)form, a.t[s], b.t[s], 0.0f, c.t[s]));
          AGREE(c, product_tolerance(act, to));
          both_align(c);
          BOTH(moe_gemm(dev, (moe_gemm_form)form, a.t[s], b.t[s], 1.0f, c.t[s]));
          AGREE(c, product_tolerance(act, to));
        }
}

Test(gpu_gemm, keeps_its_plans_apart, .init = both_open, .fini = both_close) {
  /* more shapes than plans fit, each used twice, with misaligned rows in between */
  both a = both_random("a", MOE_BF16, SHAPE(1300, 64), 1.0);
  both b = both_random("b", MOE_BF16, SHAPE(24, 64), 1.0);
  both c = both_output("c", MOE_BF16, SHAPE(1300, 24));
  for (int round = 0; round < 2; round++)
    for (int64_t rows = 1; rows <= 1300; rows++) {
      int64_t skip = rows < 1292 ? rows % 8 : 0;
      BOTH(moe_gemm(dev, MOE_NT, moe_tensor_rows(a.t[s], skip, rows), b.t[s], 0.0f,
                    moe_tensor_rows(c.t[s], skip, rows)));
    }
  AGREE(c, rounding(MOE_BF16));
}

Test(gpu_rope, agrees_and_undoes_itself, .init = both_open, .fini = both_close) {
  const int64_t sizes[][3] = {{12, 1, 64}, {4, 2, 128}, {3, 3, 6}};
  for (int i = 0; i < 3; i++) EACH_TYPE(act) {
      int64_t h = sizes[i][0], g = sizes[i][1], d = sizes[i][2], t = 1111;
      both qkv = both_random("qkv", act, SHAPE(t, (h + 2 * g) * d), 1.0);
      both table = both_output("table", MOE_F32, SHAPE(4096, d));
      both positions = both_ints("positions", SHAPE(t), 0, 4096);
      moe_rope_table_fill(10000.0, 1.0, 4096, d, table.t[CPU_SIDE].data);
      both_align(table);
      for (int direction = 1; direction >= -1; direction -= 2) {
        BOTH(moe_rope(dev, qkv.t[s], positions.t[s], table.t[s], h, g, direction));
        AGREE(qkv, rounding(act));
        both_align(qkv);
      }
    }
}

static both document_starts(int64_t tokens, int64_t seq, int64_t length) {
  both x = both_ints("doc_start", SHAPE(tokens), 0, 1);
  int32_t *start = x.t[CPU_SIDE].data;
  for (int64_t i = 0; i < tokens; i++) start[i] = (int32_t)(i % seq / length * length);
  both_align(x);
  return x;
}

/* Sequences of many blocks, the last one not full, with and without documents; by the kernels that
 * may add up in any order too. */
Test(gpu_attention, agrees_over_many_blocks, .init = both_open, .fini = both_close) {
  const moe_attention_shape shapes[] = {
      {1, 2048, 12, 1, 64}, {2, 1100, 6, 2, 64}, {1, 900, 4, 1, 128}};
  for (int i = 0; i < 12; i++) EACH_TYPE(act) {
      moe_attention_shape n = shapes[i / 4];
      both_dev[GPU_SIDE]->options.deterministic = i % 4 < 2;
      int64_t t = n.batch * n.seq, wide = n.heads * n.head_dim;
      int64_t width = wide + 2 * n.kv_heads * n.head_dim;
      both qkv = both_random("qkv", act, SHAPE(t, width), 1.0), doc = both_none();
      both dout = both_random("dout", act, SHAPE(t, wide), 1.0);
      both out = both_output("out", act, SHAPE(t, wide));
      both lse = both_output("lse", MOE_F32, SHAPE(n.batch, n.heads, n.seq));
      both dqkv = both_output("dqkv", act, SHAPE(t, width));
      if (i % 2 == 1) doc = document_starts(t, n.seq, 450); /* ends amid blocks */
      for (int s = 0; s < SIDES; s++) {
        int64_t bytes = moe_attention_scratch(both_dev[s], n, act);
        moe_device_set_scratch(both_dev[s], moe_device_alloc(both_dev[s], bytes), bytes);
      }
      BOTH(moe_attention(dev, n, qkv.t[s], doc.t[s], out.t[s], lse.t[s]));
      AGREE(out, rounding(act));
      AGREE(lse, 1e-5);
      both_align(out);
      both_align(lse);
      BOTH(moe_attention_backward(dev, n, dout.t[s], qkv.t[s], doc.t[s], out.t[s], lse.t[s],
                                  dqkv.t[s]));
      AGREE(dqkv, 2.0 * rounding(act));
    }
}

Test(gpu_loss, agrees_for_rows_kept_reread_and_odd, .init = both_open, .fini = both_close) {
  const int64_t sizes[][2] = {{200, 32000}, {100, 40000}, {60, 50257}, {300, 1000}, {9, 3}};
  for (int i = 0; i < 5; i++) EACH_TYPE(act) {
      int64_t t = sizes[i][0], v = sizes[i][1];
      both logits = both_random("logits", act, SHAPE(t, v), 3.0);
      both targets = both_ints("targets", SHAPE(t), -1, v);
      both loss = both_random("loss", MOE_F64, SHAPE(2), 1.0);
      both each = both_output("each", MOE_F32, SHAPE(t));
      ((int32_t *)targets.t[CPU_SIDE].data)[t / 2] = -1;
      both_align(targets);
      BOTH(moe_cross_entropy(dev, logits.t[s], targets.t[s], 1.0f, 0, loss.t[s], each.t[s]));
      AGREE(each, 1e-6);
      BOTH(
          moe_cross_entropy(dev, logits.t[s], targets.t[s], 64.0f, 1, loss.t[s], both_none().t[s]));
      AGREE(loss, 1e-6);
      AGREE(logits, rounding(act));
    }
}

/* A step's numbers where moe_adamw reads them. */
static void set_step(both now, moe_adamw_args args, double lr, int64_t step) {
  both_ok(moe_adamw_numbers(args, lr, step, now.t[CPU_SIDE].data), "numbers", __FILE__, __LINE__);
  both_align(now);
}

/* Masters beside weights of type `act`: f32, or the lower halves of f32 draws whose upper ones are
 * the weights. */
static both start_masters(moe_dtype act, int64_t n, both *weight) {
  both w = both_random("w", MOE_F32, SHAPE(n), 1.0);
  *weight = both_output("weight", act, SHAPE(n));
  if (act != MOE_BF16) return w;
  both low = both_output("low", MOE_LOW16, SHAPE(n));
  moe_convert(w.t[CPU_SIDE].data, MOE_F32, low.t[CPU_SIDE].data, MOE_LOW16, n);
  moe_convert(w.t[CPU_SIDE].data, MOE_F32, weight->t[CPU_SIDE].data, MOE_BF16, n);
  both_align(low);
  both_align(*weight);
  return low;
}

/* The masters in f32. */
static both whole_masters(both w, both weight) {
  if (w.t[0].dtype == MOE_F32) return w;
  int64_t n = moe_tensor_count(w.t[0]), half = 2 * n;
  both whole = both_output("masters", MOE_F32, SHAPE(n));
  uint16_t *high = malloc((size_t)half), *low = malloc((size_t)half);
  float *joined = malloc((size_t)n * sizeof *joined);
  ON_GPU(moe_device_download(dev, high, weight.t[s].data, half));
  ON_GPU(moe_device_download(dev, low, w.t[s].data, half));
  ON_GPU(moe_device_sync(dev));
  moe_join_halves(high, low, joined, n);
  ON_GPU(moe_device_upload(dev, whole.t[s].data, joined, n * 4));
  ON_GPU(moe_device_sync(dev));
  moe_join_halves(weight.t[CPU_SIDE].data, w.t[CPU_SIDE].data, whole.t[CPU_SIDE].data, n);
  free(joined);
  free(low);
  free(high);
  return whole;
}

Test(gpu_adamw, agrees_over_steps_and_skips, .init = both_open, .fini = both_close) {
  const int64_t sizes[] = {1, 1000003, 1 << 20};
  for (int i = 0; i < 3; i++) EACH_TYPE(act) {
      both g = both_random("g", MOE_F32, SHAPE(sizes[i]), 1.0);
      both weight, w = start_masters(act, sizes[i], &weight);
      both m = both_random("m", MOE_F32, SHAPE(sizes[i]), 0.0);
      both v = both_random("v", MOE_F32, SHAPE(sizes[i]), 0.0);
      both squares = both_random("squares", MOE_F64, SHAPE(1), 0.0);
      both scale = both_output("scale", MOE_F32, SHAPE(1));
      both now = both_output("now", MOE_F64, SHAPE(MOE_ADAMW_NUMBERS));
      BOTH(moe_sum_squares(dev, g.t[s], squares.t[s]));
      BOTH(moe_clip_scale(dev, squares.t[s], 1.0, 0.25, scale.t[s]));
      AGREE(scale, 1e-7);
      for (int step = 1; step <= 3; step++) {
        moe_adamw_args args = {0.9, 0.95, 1e-8, 0.1, 0};
        set_step(now, args, 1e-2, step);
        BOTH(moe_adamw(dev, args, now.t[s], g.t[s], scale.t[s], w.t[s], m.t[s], v.t[s],
                       weight.t[s]));
      }
      AGREE(m, 1e-6);
      AGREE(v, 1e-6);
      AGREE(whole_masters(w, weight), 1e-6);
      AGREE(weight, rounding(act));
    }
}

/* The random bits are the same, so a moment differs where its last f32 bits do, once in thousands;
 * with other bits the difference would be one rounding's, 2e-3. */
Test(gpu_adamw, rounds_moments_by_the_same_bits, .init = both_open, .fini = both_close) {
  const int64_t cases[][2] = {{1, 0}, {1000003, 0}, {1 << 20, 4000}, {100001, 4001}};
  for (int i = 0; i < 4; i++) EACH_TYPE(act) {
      int64_t n = cases[i][0];
      moe_dtype type = i % 2 == 0 ? MOE_BF16 : MOE_F32;
      both g = both_random("g", type, SHAPE(n), 1.0), weight, w = start_masters(act, n, &weight);
      both m = both_random("m", MOE_BF16, SHAPE(n), 0.0);
      both v = both_random("v", MOE_BF16, SHAPE(n), 0.0);
      both scale = both_output("scale", MOE_F32, SHAPE(1));
      both now = both_output("now", MOE_F64, SHAPE(MOE_ADAMW_NUMBERS));
      *(float *)scale.t[CPU_SIDE].data = 0.125f;
      both_align(scale);
      for (int step = 1; step <= 3; step++) {
        moe_adamw_args args = {0.9, 0.999, 1e-8, 0.1, cases[i][1]};
        set_step(now, args, 1e-2, step);
        BOTH(moe_adamw(dev, args, now.t[s], g.t[s], scale.t[s], w.t[s], m.t[s], v.t[s],
                       weight.t[s]));
      }
      AGREE(m, 1e-4);
      AGREE(v, 1e-4);
      AGREE(whole_masters(w, weight), 1e-5);
      AGREE(weight, rounding(act));
    }
}

Test(gpu_sample, draws_the_same_tokens, .init = both_open, .fini = both_close) {
  const moe_sample_args list[] = {{0.0f, 0, 1.0f, 5},
                                  {1.0f, 0, 1.0f, 5},
                                  {0.7f, 50, 0.9f, 5},
                                  {1.3f, 0, 0.95f, 6},
                                  {1.0f, 1000, 1.0f, 7}};
  const int64_t sizes[][2] = {{70, 32000}, {3, 100001}, {130, 5}};
  for (int i = 0; i < 3; i++) {
    int64_t rows = sizes[i][0], v = sizes[i][1];
    both logits = both_random("logits", MOE_F32, SHAPE(rows, v), 2.0);
    both token = both_output("token", MOE_I32, SHAPE(rows));
    both streams = both_ints("streams", SHAPE(rows), 0, 1000);
    both positions = both_ints("positions", SHAPE(rows), 0, 1 << 20);
    for (int n = 0; n < 5; n++) {
      BOTH(moe_sample(dev, logits.t[s], list[n], streams.t[s], positions.t[s], token.t[s]));
      AGREE(token, 0.0);
    }
  }
}

Test(gpu_embedding, agrees_for_rare_and_frequent_tokens, .init = both_open, .fini = both_close) {
  const int64_t sizes[][3] = {{20000, 300, 768}, {5000, 50000, 777}, {3000, 1, 2048}, {1, 9, 8}};
  for (int i = 0; i < 4; i++) EACH_TYPE(act) {
      int64_t t = sizes[i][0], v = sizes[i][1], d = sizes[i][2];
      both tokens = both_ints("tokens", SHAPE(t), 0, v);
      both weight = both_random("weight", act, SHAPE(v, d), 1.0);
      both out = both_output("out", act, SHAPE(t, d));
      both dweight = both_random("dweight", MOE_F32, SHAPE(v, d), 1.0);
      BOTH(moe_embed(dev, tokens.t[s], weight.t[s], out.t[s]));
      AGREE(out, 0.0);
      BOTH(moe_embed_backward(dev, tokens.t[s], out.t[s], dweight.t[s]));
      AGREE(dweight, 0.0); /* the same order of addition */
    }
}
