/* The door: wrong operands are refused in words, wrong results are named in debug mode; and the
 * device's own functions. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/cpu/gemm.h"
#include "tests/support/op_check.h"

/* Shapes are checked before memory is touched, so one block stands for every tensor here. */
static double block[64];

static moe_tensor f32_1d(int64_t a) {
  return moe_tensor_1d(block, MOE_F32, a);
}
static moe_tensor f32_2d(int64_t a, int64_t b) {
  return moe_tensor_2d(block, MOE_F32, a, b);
}
static moe_tensor bf16_2d(int64_t a, int64_t b) {
  return moe_tensor_2d(block, MOE_BF16, a, b);
}
static moe_tensor i32_1d(int64_t a) {
  return moe_tensor_1d(block, MOE_I32, a);
}
static moe_tensor i32_2d(int64_t a, int64_t b) {
  return moe_tensor_2d(block, MOE_I32, a, b);
}
static moe_tensor f64_1d(int64_t a) {
  return moe_tensor_1d(block, MOE_F64, a);
}
static moe_tensor none(void) {
  return moe_tensor_none();
}

#define REFUSES(text, call) op_refuses(MOE_INVALID, text, call)

static void elementwise(moe_device *dev) {
  REFUSES("copy: dst and src must have the same number", moe_copy(dev, f32_1d(4), bf16_2d(1, 3)));
  REFUSES("add: x is int32", moe_add(dev, f32_1d(4), i32_1d(4)));
  REFUSES("sum_rows: out is fp32 [3]: it must be bf16 [4]",
          moe_sum_rows(dev, bf16_2d(2, 4), -1, f32_1d(3), none()));
  REFUSES("sum_rows: own must be a row of x",
          moe_sum_rows(dev, bf16_2d(2, 4), 2, moe_tensor_1d(block, MOE_BF16, 4), none()));
  REFUSES("sum_rows: squares is fp32 [1]: it must be fp64 [1]",
          moe_sum_rows(dev, f32_2d(2, 4), 0, f32_1d(4), f32_1d(1)));
  REFUSES("sum_squares: out is fp32 [1]: it must be fp64 [1]",
          moe_sum_squares(dev, f32_1d(4), f32_1d(1)));
  REFUSES("embed: out is fp32 [2, 3]: it must be bf16 [2, 4]",
          moe_embed(dev, i32_1d(2), bf16_2d(9, 4), f32_2d(2, 3)));
  REFUSES("embed_backward: dweight is bf16",
          moe_embed_backward(dev, i32_1d(2), bf16_2d(2, 4), bf16_2d(9, 4)));
  REFUSES("scale: x is absent", moe_scale(dev, none(), 1.0f));
  moe_tensor negative = f32_1d(-4);
  REFUSES("zero: x is fp32 [-4]", moe_zero(dev, negative));
}

static void dense(moe_device *dev) {
  moe_tensor x = f32_2d(2, 4), gain = f32_1d(4), rstd = f32_1d(2);
  REFUSES("rms_norm: sum is absent", moe_rms_norm(dev, x, x, gain, 1e-5, none(), x, rstd));
  REFUSES("rms_norm: eps must be above 0",
          moe_rms_norm(dev, x, none(), gain, 0.0, none(), x, rstd));
  REFUSES("rms_norm_backward: dgain is fp32 [2]: it must be fp32 [4]",
          moe_rms_norm_backward(dev, x, x, gain, rstd, x, rstd));
  REFUSES("gemm: b is fp32 [5, 3]: it must be fp32 [4, any]",
          moe_gemm(dev, MOE_NN, x, f32_2d(5, 3), 0.0f, f32_2d(2, 3)));
  REFUSES("gemm: b is fp32 [3, 4]: it must be bf16 [any, 4]",
          moe_gemm(dev, MOE_NT, bf16_2d(2, 4), f32_2d(3, 4), 0.0f, f32_2d(2, 3)));
  REFUSES("gemm: c is bf16 [2, 3]: it must be fp32 [2, 3]",
          moe_gemm(dev, MOE_NT, x, f32_2d(3, 4), 0.0f, bf16_2d(2, 3)));
  REFUSES("gemm: beta must be 0 or 1", moe_gemm(dev, MOE_NT, x, f32_2d(3, 4), 0.5f, f32_2d(2, 3)));
  REFUSES("gemm: form must be", moe_gemm(dev, (moe_gemm_form)7, x, x, 0.0f, x));
}

static void attention(moe_device *dev) {
  moe_tensor qkv = f32_2d(2, 8), table = f32_2d(9, 2);
  REFUSES("rope: heads must be a multiple of kv_heads",
          moe_rope(dev, qkv, i32_1d(2), table, 3, 2, 1));
  REFUSES("rope: the head size must be even", moe_rope(dev, qkv, i32_1d(2), f32_2d(9, 3), 2, 1, 1));
  REFUSES("rope: qkv is fp32 [2, 8]: it must be fp32 or bf16 or fp16 [2, 6]",
          moe_rope(dev, qkv, i32_1d(2), table, 1, 1, 1));
  REFUSES("rope: direction must be 1 or -1", moe_rope(dev, qkv, i32_1d(2), table, 2, 1, 2));
  moe_attention_shape shape = {1, 2, 2, 1, 2};
  moe_tensor out = f32_2d(2, 4), lse = moe_tensor_3d(block, MOE_F32, 1, 2, 2);
  REFUSES("attention: doc_start is int32 [3]", moe_attention(dev, shape, qkv, i32_1d(3), out, lse));
  REFUSES("attention: lse is fp32 [2, 2]",
          moe_attention(dev, shape, qkv, none(), out, f32_2d(2, 2)));
  REFUSES("attention_backward: dqkv is bf16",
          moe_attention_backward(dev, shape, out, qkv, none(), out, lse, bf16_2d(2, 8)));
}

static void router(moe_device *dev) {
  moe_tensor x = f32_2d(4, 3), weight = f32_2d(2, 3), probs = f32_2d(4, 2), lse = f32_1d(4);
  REFUSES("router: K must be from 1 to the number of experts",
          moe_router(dev, x, weight, none(), probs, lse, i32_2d(4, 3), f32_2d(4, 3), f32_2d(1, 5)));
  REFUSES("router: the tokens must divide evenly into the groups",
          moe_router(dev, x, weight, none(), probs, lse, i32_2d(4, 1), f32_2d(4, 1), f32_2d(3, 5)));
  REFUSES("router: stats is fp32 [1, 4]",
          moe_router(dev, x, weight, none(), probs, lse, i32_2d(4, 1), f32_2d(4, 1), f32_2d(1, 4)));
  REFUSES("router_drop: capacity must not be negative",
          moe_router_drop(dev, probs, -1, i32_2d(4, 1), f32_2d(4, 1), f32_1d(1)));
  REFUSES("router_backward: dweight is fp32 [3, 3]",
          moe_router_backward(dev, f32_2d(4, 1), x, weight, probs, lse, i32_2d(4, 1), f32_2d(4, 1),
                              f32_2d(1, 2), 0.0f, 0.0f, probs, x, f32_2d(3, 3)));
  REFUSES("permute_plan: pair must hold",
          moe_permute_plan(dev, i32_2d(3, 2), 4, i32_1d(3), i32_1d(11), i32_2d(3, 2)));
  REFUSES("permute_plan: pad must be a power of 2",
          moe_permute_plan(dev, i32_2d(3, 2), 6, i32_1d(3), i32_1d(64), i32_2d(3, 2)));
  REFUSES("permute_window: begin", moe_permute_window(dev, i32_1d(3), -1, 4, i32_1d(3)));
  REFUSES("gather_rows: group must be at least 1",
          moe_gather_rows(dev, x, i32_1d(2), 0, f32_2d(2, 3)));
  REFUSES("gather_gates: out is fp32 [3]: it must be fp32 [2]",
          moe_gather_gates(dev, probs, i32_1d(2), f32_1d(3)));
  REFUSES("combine_rows: beta must be 0 or 1",
          moe_combine_rows(dev, x, i32_2d(2, 2), 0, 2, f32_2d(2, 3)));
  REFUSES("combine_gates: begin must not be negative",
          moe_combine_gates(dev, f32_1d(3), i32_2d(2, 2), -2, 0, f32_2d(2, 2)));
}

static void experts(moe_device *dev) {
  moe_tensor w13 = moe_tensor_3d(block, MOE_F32, 2, 6, 4), x = f32_2d(5, 4);
  REFUSES(
      "expert_up: gu is fp32 [5, 5]: it must be fp32 [5, 6]",
      moe_expert_up(dev, x, i32_1d(3), w13, f32_1d(5), MOE_GU_VALUES, f32_2d(5, 5), f32_2d(5, 3)));
  w13.shape[1] = 5; /* cannot be split into gate and up */
  REFUSES(
      "expert_up: w13 is fp32 [2, 5, 4]",
      moe_expert_up(dev, x, i32_1d(3), w13, f32_1d(5), MOE_GU_VALUES, f32_2d(5, 6), f32_2d(5, 3)));
  moe_tensor w2 = moe_tensor_3d(block, MOE_F32, 2, 4, 3);
  REFUSES("expert_down: offsets is int32 [2]: it must be int32 [3]",
          moe_expert_down(dev, f32_2d(5, 3), i32_1d(2), w2, x));
  REFUSES("expert_down_backward: a must not overlap gu",
          moe_expert_down_backward(dev, x, i32_1d(3), w2, f32_1d(5), MOE_GU_VALUES, f32_2d(5, 6),
                                   f32_2d(5, 3), f32_1d(5)));
  REFUSES("expert_down_backward: dgates must be absent",
          moe_expert_down_backward(dev, x, i32_1d(3), w2, f32_1d(5), MOE_GU_SLOPES, f32_2d(5, 6),
                                   f32_2d(5, 3), f32_1d(5)));
  REFUSES("gates_backward: slot is int32 [4, 2]: it must be int32 [5,",
          moe_gates_backward(dev, x, f32_2d(9, 4), i32_2d(4, 2), f32_2d(4, 2), f32_2d(4, 2)));
  REFUSES("expert_weight_grad: dw is bf16 [2, 4, 4]: it must be fp32",
          moe_expert_weight_grad(dev, x, x, i32_1d(3), 0, moe_tensor_3d(block, MOE_BF16, 2, 4, 4),
                                 moe_tensor_none()));
  REFUSES("expert_weight_grad: accumulate must be 0 or 1",
          moe_expert_weight_grad(dev, x, x, i32_1d(3), 2, moe_tensor_3d(block, MOE_F32, 2, 4, 4),
                                 moe_tensor_none()));
  REFUSES("expert_weight_grad: squares is fp32 [1]: it must be fp64 [1]",
          moe_expert_weight_grad(dev, x, x, i32_1d(3), 0, moe_tensor_3d(block, MOE_F32, 2, 4, 4),
                                 f32_1d(1)));
}

static void ending(moe_device *dev) {
  moe_tensor logits = f32_2d(2, 4), x = f32_1d(4);
  REFUSES("cross_entropy: loss is fp64 [1]: it must be fp64 [2]",
          moe_cross_entropy(dev, logits, i32_1d(2), 1.0f, 0, f64_1d(1), none()));
  REFUSES("clip_scale: unscale must be above 0",
          moe_clip_scale(dev, f64_1d(1), 1.0, 0.0, f32_1d(1)));
  moe_adamw_args args = {0.9, 0.95, 1e-8, 0.1, 0};
  moe_tensor now = f64_1d(MOE_ADAMW_NUMBERS);
  double numbers[MOE_ADAMW_NUMBERS];
  REFUSES("adamw: steps count from 1", moe_adamw_numbers(args, 1e-3, 0, numbers));
  REFUSES("adamw: now is fp32 [4]: it must be fp64 [4]",
          moe_adamw(dev, args, x, x, f32_1d(1), x, x, x, none()));
  REFUSES("adamw: master is fp32 [4]: it must be low16",
          moe_adamw(dev, args, now, x, f32_1d(1), x, x, x, moe_tensor_1d(block, MOE_BF16, 4)));
  REFUSES("adamw: v is fp32 [4]: it must be bf16",
          moe_adamw(dev, args, now, x, f32_1d(1), x, moe_tensor_1d(block, MOE_BF16, 4), x, none()));
  REFUSES("adamw: grad, m, v and weight must have as many",
          moe_adamw(dev, args, now, f32_1d(3), f32_1d(1), x, x, x, none()));
  args.beta2 = 1.0;
  REFUSES("adamw: beta1 and beta2 must be in",
          moe_adamw(dev, args, now, x, f32_1d(1), x, x, x, none()));
  REFUSES("sample: top_p must be in", moe_sample(dev, logits, (moe_sample_args){1.0f, 0, 0.0f, 1},
                                                 i32_1d(2), i32_1d(2), i32_1d(2)));
  REFUSES("sample: temperature must be", moe_sample(dev, logits, (moe_sample_args){NAN, 0, 1.0f, 1},
                                                    i32_1d(2), i32_1d(2), i32_1d(2)));
  REFUSES("sample: streams", moe_sample(dev, logits, (moe_sample_args){1.0f, 0, 1.0f, 1}, i32_1d(3),
                                        i32_1d(2), i32_1d(2)));
  REFUSES("advance: by", moe_advance(dev, i32_1d(3), i32_1d(2)));
}

Test(ops_checks, elementwise_operations_refuse_wrong_operands) {
  op_each_device(elementwise);
}
Test(ops_checks, norm_and_gemm_refuse_wrong_operands) {
  op_each_device(dense);
}
Test(ops_checks, rope_and_attention_refuse_wrong_operands) {
  op_each_device(attention);
}
Test(ops_checks, router_and_permutation_refuse_wrong_operands) {
  op_each_device(router);
}
Test(ops_checks, experts_refuse_wrong_operands) {
  op_each_device(experts);
}
Test(ops_checks, loss_optimizer_and_sampling_refuse_wrong_operands) {
  op_each_device(ending);
}

/* ---- debug mode ------------------------------------------------------------------------ */

static void names_operation(moe_device *dev, moe_dtype act) {
  double *values = op_doubles(20);
  values[17] = (double)INFINITY;
  op_tensor x = op_values(dev, "x", act, OP_SHAPE(20), values);
  op_tensor y = op_filled(dev, "y", act, OP_SHAPE(20), 1.0);
  op_ok(moe_add(dev, y.t, x.t)); /* not in debug mode: passes */
  dev->options.debug = true;
  moe_device_label(dev, "backward", 3);
  op_refuses(MOE_DIVERGED, "non-finite value: add in layer 3 backward: element 17 of y is inf",
             moe_add(dev, y.t, x.t));
  moe_device_label(dev, "head", -1);
  op_refuses(MOE_DIVERGED, "scale in head: element 17 of x is inf", moe_scale(dev, x.t, 2.0f));
  op_tensor good = op_filled(dev, "good", act, OP_SHAPE(20), 1.0);
  op_ok(moe_scale(dev, good.t, 2.0f));
  dev->options.debug = false;
}

Test(ops_checks, debug_mode_names_the_first_operation_that_made_a_non_finite_value) {
  op_each(names_operation);
}

/* Rows past offsets[e] belong to nobody and may hold anything. */
static void ignores_unused_rows(moe_device *dev, moe_dtype act) {
  op_tensor a = op_filled(dev, "a", act, OP_SHAPE(4, 3), 1.0);
  op_tensor w2 = op_filled(dev, "w2", act, OP_SHAPE(1, 2, 3), 1.0);
  op_tensor offsets = op_ints(dev, "offsets", OP_SHAPE(2), (int32_t[]){0, 2});
  op_tensor y = op_output(dev, "y", act, OP_SHAPE(4, 2));
  op_scratch(dev, moe_expert_scratch(dev, 4, 2, 3, act));
  dev->options.debug = true;
  op_ok(moe_expert_down(dev, a.t, offsets.t, w2.t, y.t));
  op_tensor bad = op_output(dev, "bad", act, OP_SHAPE(4, 3));
  op_refuses(MOE_DIVERGED, "expert_down", moe_expert_down(dev, bad.t, offsets.t, w2.t, y.t));
  dev->options.debug = false;
}

Test(ops_checks, debug_mode_looks_only_at_the_rows_that_experts_own) {
  op_each(ignores_unused_rows);
}

/* ---- the device ------------------------------------------------------------------------ */

static void memory(moe_device *dev) {
  const int64_t sizes[] = {0, 1, 100, 4096, (2 << 20) - 1, 2 << 20, 9999999};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    char *data = moe_device_alloc(dev, sizes[i]);
    op_require(data != NULL || sizes[i] == 0, "no memory for %lld bytes", (long long)sizes[i]);
    op_require((uintptr_t)data % 256 == 0, "block of %lld is not aligned", (long long)sizes[i]);
    char *host = malloc((size_t)sizes[i] + 1);
    op_ok(moe_device_download(dev, host, data, sizes[i]));
    op_ok(moe_device_sync(dev));
    for (int64_t j = 0; j < sizes[i]; j++) op_require(host[j] == 0, "byte %lld", (long long)j);
    memset(host, 7, (size_t)sizes[i]);
    op_ok(moe_device_upload(dev, data, host, sizes[i]));
    op_ok(moe_device_sync(dev));
    free(host);
    moe_device_free(dev, data);
  }
  op_require(moe_device_alloc(dev, -1) == NULL, "a negative size");
  op_require(moe_device_alloc(dev, INT64_MAX) == NULL, "a size no machine has");
  void *pinned = moe_device_alloc_host(dev, 5000);
  op_require(pinned != NULL, "host memory");
  memset(pinned, 1, 5000);
  moe_device_free_host(dev, pinned);
}

Test(device, gives_zeroed_aligned_memory_or_none) {
  op_each_device(memory);
}

static void scratch(moe_device *dev) {
  op_require(moe_device_scratch(dev, 1) == NULL, "no scratch was given");
  moe_device_set_scratch(dev, block, 64);
  op_require(moe_device_scratch(dev, 64) == block, "64 bytes are there");
  op_require(moe_device_scratch(dev, 65) == NULL, "65 bytes are not");
}

Test(device, scratch_is_refused_beyond_the_plan) {
  op_each_device(scratch);
}

Test(device, names_the_processor_and_its_threads) {
  moe_device *dev;
  cr_assert_eq(moe_device_open(&(moe_device_options){.kind = MOE_DEVICE_CPU, .threads = 3}, &dev),
               MOE_OK);
  cr_assert(strstr(moe_device_name(dev), ", 3 threads") != NULL, "%s", moe_device_name(dev));
  cr_assert(moe_device_is_host(dev));
  cr_assert_eq(moe_device_what(dev), MOE_DEVICE_CPU);
  cr_assert_eq(moe_device_free_bytes(dev), INT64_MAX);
  moe_device_close(dev);
  moe_device_close(NULL);
}

Test(device, auto_finds_a_device_and_cuda_says_why_not) {
  moe_device *dev;
  cr_assert_eq(moe_device_open(&(moe_device_options){.kind = MOE_DEVICE_AUTO}, &dev), MOE_OK);
  bool gpu = moe_device_what(dev) == MOE_DEVICE_CUDA;
  moe_device_close(dev);
  moe_status status = moe_device_open(&(moe_device_options){.kind = MOE_DEVICE_CUDA}, &dev);
  if (gpu) {
    cr_assert_eq(status, MOE_OK);
    moe_device_close(dev);
    return;
  }
  cr_assert_eq(status, MOE_USAGE);
  cr_assert_null(dev);
  cr_assert(strstr(moe_error_message(), "use run.backend = cpu") != NULL);
}

Test(device, restarts_for_blas_only_when_it_chose_narrow_kernels_by_itself) {
  cr_assert(moe_cpu_blas_mistaken("Haswell", true, NULL));
  cr_assert(moe_cpu_blas_mistaken("ZEN", true, NULL));
  cr_assert_not(moe_cpu_blas_mistaken("Haswell", false, NULL), "no wide vectors");
  cr_assert_not(moe_cpu_blas_mistaken("SkylakeX", true, NULL), "wide already");
  cr_assert_not(moe_cpu_blas_mistaken("Cooperlake", true, NULL), "wide already");
  cr_assert_not(moe_cpu_blas_mistaken("Haswell", true, "SkylakeX"), "restarted before");
  cr_assert_not(moe_cpu_blas_mistaken("Haswell", true, "Haswell"), "the user's wish");
}
