/* Whether updates of weights pay beside the next step's forward pass, at the 6.9b model's sizes.
 *
 *   gpu_overlap [STEPS]         default 4 steps of each kind
 *
 * A step here is 30 layers' AdamW, their forward and their backward: the experts' products and the
 * larger of the other operations. k 0 runs them in that order; else the update of layer l + 1 runs
 * on k multiprocessors beside the forward pass of layer l, whose products leave it those. Steps
 * follow each other without a pause, and the kinds take turns, so that all meet the card at its
 * power limit. */
#include <stdio.h>
#include <stdlib.h>

#include "core/base/log.h"
#include "core/base/rng.h"
#include "kernels/backend.h"

enum {
  D = 768,
  F = 6144,
  E = 16,
  K = 4,
  T = 16384,
  C = T * K,
  S = 4096,
  H = 12,
  G = 1,
  HEAD = 64,
  QKV = (H + 2 * G) * HEAD,
  LAYERS = 30,
  BLOCK = 1 << 22,
  ROUNDS = 1
};
static const int64_t N = (int64_t)E * 3 * F * D; /* parameters of a layer's experts */

static moe_device *dev;
static moe_tensor block;

static void must(moe_status status) {
  if (status != MOE_OK) exit(moe_report(status));
}

static moe_tensor make(moe_dtype dtype, int dims, int64_t a, int64_t b, int64_t c, double scale) {
  moe_tensor x = {NULL, dtype, dims, {a, b, c, 1}};
  int64_t n = moe_tensor_count(x), size = moe_dtype_size(dtype);
  x.data = moe_device_alloc(dev, n * size);
  if (!x.data) must(moe_fail(MOE_NO_MEMORY, "gpu_overlap: no device memory"));
  for (int64_t i = 0; i < n; i += BLOCK) {
    int64_t here = n - i < BLOCK ? n - i : BLOCK;
    must(moe_copy(dev, moe_tensor_1d((char *)x.data + i * size, dtype, here),
                  moe_tensor_rows(block, 0, here)));
  }
  must(moe_scale(dev, x, (float)scale));
  return x;
}

static moe_tensor x, dy, a, gu[LAYERS], w13, w2, gates, dgates, rows_out, dw13, dw2, offsets;
static moe_tensor grad, master, m, v, weight, clip;

static const moe_attention_shape shape = {T / S, S, H, G, HEAD};
static moe_tensor tokens, normed, gain, rstd, wqkv, wo, qkv, dqkv, attended, lse, router, probs,
    tlse, chosen, tgates, stats, plan, pair, slot;

static void others_create(void) {
  tokens = make(MOE_BF16, 2, T, D, 1, 1), normed = make(MOE_BF16, 2, T, D, 1, 1);
  gain = make(MOE_F32, 1, D, 1, 1, 1), rstd = make(MOE_F32, 1, T, 1, 1, 0);
  wqkv = make(MOE_BF16, 2, QKV, D, 1, 0.03), wo = make(MOE_BF16, 2, D, H * HEAD, 1, 0.03);
  qkv = make(MOE_BF16, 2, T, QKV, 1, 1), dqkv = make(MOE_BF16, 2, T, QKV, 1, 1);
  attended = make(MOE_BF16, 2, T, H * HEAD, 1, 1);
  lse = make(MOE_F32, 3, T / S, H, S, 0);
  router = make(MOE_F32, 2, E, D, 1, 0.03), probs = make(MOE_F32, 2, T, E, 1, 0);
  tlse = make(MOE_F32, 1, T, 1, 1, 0), tgates = make(MOE_F32, 2, T, K, 1, 0);
  stats = make(MOE_F32, 2, 1, 2 * E + 1, 1, 0);
  chosen = moe_tensor_2d(moe_device_alloc(dev, 4L * T * K), MOE_I32, T, K);
  plan = moe_tensor_1d(moe_device_alloc(dev, 4L * (E + 1)), MOE_I32, E + 1);
  pair = moe_tensor_1d(moe_device_alloc(dev, 4L * (C + E * 128)), MOE_I32, C + E * 128);
  slot = moe_tensor_2d(moe_device_alloc(dev, 4L * T * K), MOE_I32, T, K);
}

static void others_forward(void) {
  must(moe_rms_norm(dev, tokens, moe_tensor_none(), gain, 1e-5, tokens, normed, rstd));
  must(moe_gemm(dev, MOE_NT, normed, wqkv, 0, qkv));
  must(moe_attention(dev, shape, qkv, moe_tensor_none(), attended, lse));
  must(moe_gemm(dev, MOE_NT, attended, wo, 0, normed));
  must(moe_rms_norm(dev, tokens, moe_tensor_none(), gain, 1e-5, tokens, normed, rstd));
  must(moe_router(dev, normed, router, moe_tensor_none(), probs, tlse, chosen, tgates, stats));
  must(moe_permute_plan(dev, chosen, 128, plan, pair, slot));
  must(moe_gather_rows(dev, normed, moe_tensor_rows(pair, 0, C), K, rows_out));
}

static void products_create(void) {
  int32_t host[E + 1];
  for (int j = 0; j <= E; j++) host[j] = C / E * j;
  x = make(MOE_BF16, 2, C, D, 1, 1), dy = make(MOE_BF16, 2, C, D, 1, 1);
  a = make(MOE_BF16, 2, C, F, 1, 1), rows_out = make(MOE_BF16, 2, C, D, 1, 0);
  for (int l = 0; l < LAYERS; l++) gu[l] = make(MOE_BF16, 2, C, 2 * F, 1, 1);
  w13 = make(MOE_BF16, 3, E, 2 * F, D, 0.03), w2 = make(MOE_BF16, 3, E, D, F, 0.01);
  gates = make(MOE_F32, 1, C, 1, 1, 0.25), dgates = make(MOE_F32, 1, C, 1, 1, 0);
  dw13 = make(MOE_F32, 3, E, 2 * F, D, 0), dw2 = make(MOE_F32, 3, E, D, F, 0);
  int64_t bytes = moe_expert_scratch(dev, C, D, F, MOE_BF16);
  int64_t more = moe_attention_scratch(dev, shape, MOE_BF16);
  if (more > bytes) bytes = more;
  moe_device_set_scratch(dev, moe_device_alloc(dev, bytes), bytes);
  offsets = moe_tensor_1d(moe_device_alloc(dev, sizeof host), MOE_I32, E + 1);
  must(moe_device_upload(dev, offsets.data, host, sizeof host));
  must(moe_device_sync(dev));
}

static void state_create(moe_dtype grads, moe_dtype moments) {
  grad = make(grads, 1, N, 1, 1, 1e-3), master = make(MOE_F32, 1, N, 1, 1, 0.02);
  m = make(moments, 1, N, 1, 1, 1e-3), v = make(moments, 1, N, 1, 1, 0);
  weight = make(MOE_BF16, 1, N, 1, 1, 1), clip = make(MOE_F32, 1, 1, 1, 1, 0);
  const float one = 1.0f;
  must(moe_device_upload(dev, clip.data, &one, sizeof one));
  must(moe_device_sync(dev));
}
static void state_destroy(void) {
  moe_tensor *all[] = {&grad, &master, &m, &v, &weight, &clip};
  for (int i = 0; i < 6; i++) moe_device_free(dev, all[i]->data);
}

static void update(int64_t step) {
  moe_adamw_args args = {1e-6, 0.9, 0.95, 1e-8, 0.1, step, 0};
  must(moe_adamw(dev, args, grad, clip, master, m, v, weight));
}

static void forward(int l) {
  others_forward();
  must(moe_expert_up(dev, x, offsets, w13, gates, gu[l], a));
  must(moe_expert_down(dev, a, offsets, w2, rows_out));
  must(moe_combine_rows(dev, rows_out, slot, 0, 0, normed));
}

static void backward(int l) {
  must(moe_expert_down_backward(dev, dy, offsets, w2, gates, gu[l], a, dgates));
  must(moe_expert_up_backward(dev, gu[l], offsets, w13, rows_out));
  must(moe_expert_weight_grad(dev, dy, a, offsets, 0, dw2));
  must(moe_expert_weight_grad(dev, gu[l], x, offsets, 0, dw13));
  must(moe_attention_backward(dev, shape, normed, qkv, moe_tensor_none(), attended, lse, dqkv));
}

/* Updates of all layers, each on `k` multiprocessors beside the forward of the one before. */
static void forward_beside_updates(int k, int64_t step, bool products) {
  update(step); /* of the first layer: nothing is there to run beside it */
  moe_device_lend(dev, k);
  for (int l = 0; l < LAYERS; l++) {
    must(moe_device_wait_lane(dev, MOE_LANE_UPDATE)); /* layer l's is done */
    moe_device_use_lane(dev, MOE_LANE_UPDATE);
    if (l == 0) must(moe_device_wait_lane(dev, MOE_LANE_MAIN));
    if (l + 1 < LAYERS) update(step);
    moe_device_use_lane(dev, MOE_LANE_MAIN);
    if (products) forward(l);
  }
  moe_device_lend(dev, 0);
}

/* Seconds of each of `steps` steps: k 0: after one another. */
static double steps_of(int k, int steps, bool products, bool updates) {
  moe_mark from = {0}, to = {0};
  must(moe_device_sync(dev));
  for (int s = -1; s < steps; s++) {
    if (s == 0) moe_device_mark(dev, &from);
    if (k == 0 || !updates) {
      for (int l = 0; l < LAYERS && updates; l++) update(s + 2);
      for (int l = 0; l < LAYERS && products; l++) forward(l);
    } else {
      forward_beside_updates(k, s + 2, products);
    }
    for (int l = LAYERS - 1; l >= 0 && products; l--) backward(l);
  }
  moe_device_mark(dev, &to);
  must(moe_device_sync(dev));
  double seconds = moe_device_between(dev, &from, &to) / steps;
  moe_device_forget(dev, &from);
  moe_device_forget(dev, &to);
  return seconds;
}

static void compare(const char *what, moe_dtype grads, moe_dtype moments, int steps) {
  static const int ks[] = {0, 12, 16, 20, 24, 28, 32};
  state_create(grads, moments);
  printf("%s\n%6s %12s %12s\n", what, "k", "step, ms", "update, ms");
  for (int round = 0; round < ROUNDS; round++)
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) {
      double step = steps_of(ks[i], steps, true, true), alone = steps_of(ks[i], 1, false, true);
      printf("%6d %12.2f %12.2f\n", ks[i], 1e3 * step, 1e3 * alone);
      fflush(stdout);
    }
  state_destroy();
}

int main(int argc, char **argv) {
  int steps = argc > 1 ? atoi(argv[1]) : 4;
  if (steps < 1) {
    fprintf(stderr, "gpu_overlap: STEPS must be 1 or more\n");
    return 2;
  }
  moe_log_init("gpu_overlap", -1);
  moe_device_options options = {.kind = MOE_DEVICE_CUDA};
  must(moe_device_open(&options, &dev));
  block = moe_tensor_1d(moe_device_alloc(dev, 4LL * BLOCK), MOE_F32, BLOCK);
  float *host = malloc(4LL * BLOCK);
  moe_rng_normal_fill(1, 2, 0, BLOCK, 1.0f, host);
  must(moe_device_upload(dev, block.data, host, 4LL * BLOCK));
  must(moe_device_sync(dev));
  free(host);
  products_create();
  others_create();
  printf("%s\nwithout updates %.2f ms\n", moe_device_name(dev),
         1e3 * steps_of(0, steps, true, false));
  compare("bf16 gradients and moments", MOE_BF16, MOE_BF16, steps);
  compare("float32 gradients and moments", MOE_F32, MOE_F32, steps);
  moe_device_close(dev);
  return 0;
}
