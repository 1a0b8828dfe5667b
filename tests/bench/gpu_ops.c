/* How far each operation is from its floor, at one layer's sizes of the 6.9b model.
 *
 *   gpu_ops [TOKENS] [NAME] [S] [SECONDS]    default 16384 tokens in sequences of 4096, every
 *                                            operation whose name contains NAME, or a part of
 *                                            NAME between two |
 *
 * The floor is the larger of bytes over the copy rate and products over the matrix rate, both as
 * measured on an H200 (4.26 TB/s, 780 TFLOP/s); bytes are each input read and each output written
 * once. Inputs are random; those that would fit the cache rotate over several copies. Each line is
 * the median of ROUNDS rounds of several calls. With SECONDS each operation is then repeated
 * without a pause for so long, for what it draws: time, power and joules of a call, and the clock.
 * (Not where a call changes its input, which would drift to values that are cheaper to multiply.)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/power.h"
#include "tests/bench/draws.h"

static const double COPY_RATE = 4.26e12, MATRIX_RATE = 780e12;
enum { D = 768, E = 16, F = 6144, K = 4, V = 32000, H = 12, G = 1, HEAD = 64, PAD = 128 };
enum { ROUNDS = 9, MOST_COPIES = 4, CHUNK = 8192 };

static moe_device *dev;
static int64_t T, S, C;
static int turn; /* which copy of rotating inputs */
static moe_power *meter;
static double repeat_s;
static moe_tensor draws;

/* ---- tensors: up to MOST_COPIES copies of what would fit the cache ----------------------------
 */

typedef struct {
  moe_tensor copy[MOST_COPIES];
  int copies;
} rotating;

static moe_tensor at(rotating x) {
  return x.copy[turn % x.copies];
}

static rotating make(moe_dtype dtype, int dims, int64_t a, int64_t b, int64_t c, int64_t d,
                     double scale) {
  rotating x = {.copies = 1};
  moe_tensor t = {.dtype = dtype, .dims = dims, .shape = {a, b, c, d}};
  int64_t bytes = moe_tensor_bytes(t);
  if (bytes > 1 << 16 && bytes < 256 << 20) x.copies = MOST_COPIES;
  for (int i = 0; i < x.copies; i++) {
    x.copy[i] = t;
    x.copy[i].data = moe_device_alloc(dev, bytes);
    if (x.copy[i].data == NULL) must(moe_fail(MOE_NO_MEMORY, "gpu_ops: out of device memory"));
    bool drawn = dtype == MOE_F32 || dtype == MOE_BF16 || dtype == MOE_F16; /* else zero */
    if (drawn) fill(dev, draws, x.copy[i], scale);
  }
  return x;
}
#define VECTOR(type, n, scale) make(type, 1, n, 1, 1, 1, scale)
#define MATRIX(type, rows, columns, scale) make(type, 2, rows, columns, 1, 1, scale)

/* Whole numbers below `below`. */
static rotating numbers(int64_t n, int64_t below) {
  rotating x = VECTOR(MOE_I32, n, 0);
  int32_t *host = malloc((size_t)(4 * n));
  for (int c = 0; c < x.copies; c++) {
    for (int64_t i = 0; i < n; i++)
      host[i] = (int32_t)(moe_rng_uniform_f64(3, (uint64_t)c, (uint64_t)i) * (double)below);
    must(moe_device_upload(dev, x.copy[c].data, host, 4 * n));
    must(moe_device_sync(dev));
  }
  free(host);
  return x;
}

/* ---- one layer's tensors ----------------------------------------------------------------------
 */

static rotating x, y, z, gain, rstd, dgain, qkv, dqkv, wqkv, attended, lse_heads, positions, table;
static rotating router_w, probs, lse, experts, gates, stats, dlogits, router_dw, offsets, pair,
    slot;
static rotating row_dgates, sorted, sorted_gates, w13, w2, gu, a, again, dgates, dw13, dw2, dhidden;
static rotating logits, targets, loss, head, tokens, embedding, dembedding;
static rotating grad, master, m, v, weight, scale, now, squares, sampled, next;
static rotating half_grad, half_m, half_v, half_dw13, half_dw2; /* in bf16 */
enum { PARAMETERS = 100 << 20 };

static void make_dense(void) {
  moe_dtype act = MOE_BF16;
  x = MATRIX(act, T, D, 1), y = MATRIX(act, T, D, 1), z = MATRIX(act, T, D, 1);
  gain = VECTOR(MOE_F32, D, 1), rstd = VECTOR(MOE_F32, T, 1), dgain = VECTOR(MOE_F32, D, 1);
  qkv = MATRIX(act, T, (H + 2 * G) * HEAD, 1), wqkv = MATRIX(act, (H + 2 * G) * HEAD, D, 0.03);
  attended = MATRIX(act, T, H * HEAD, 1), dqkv = MATRIX(act, T, (H + 2 * G) * HEAD, 1);
  lse_heads = make(MOE_F32, 3, T / S, H, S, 1, 1);
  positions = numbers(T, S), table = MATRIX(MOE_F32, S, HEAD, 1);
  logits = MATRIX(act, CHUNK, V, 1), targets = numbers(CHUNK, V), loss = VECTOR(MOE_F64, 2, 0);
  head = MATRIX(act, V, D, 0.03), tokens = numbers(T, V);
  embedding = MATRIX(act, V, D, 1), dembedding = MATRIX(MOE_F32, V, D, 0);
  sampled = MATRIX(MOE_F32, 8, V, 2), next = VECTOR(MOE_I32, 8, 0);
  grad = VECTOR(MOE_F32, PARAMETERS, 1), master = VECTOR(MOE_LOW16, PARAMETERS, 0);
  m = VECTOR(MOE_F32, PARAMETERS, 0), v = VECTOR(MOE_F32, PARAMETERS, 0);
  half_grad = VECTOR(MOE_BF16, PARAMETERS, 1);
  half_m = VECTOR(MOE_BF16, PARAMETERS, 0), half_v = VECTOR(MOE_BF16, PARAMETERS, 0);
  weight = VECTOR(act, PARAMETERS, 1), scale = VECTOR(MOE_F32, 1, 0);
  now = VECTOR(MOE_F64, MOE_ADAMW_NUMBERS, 0); /* rate 0: weights stay */
  squares = VECTOR(MOE_F64, 1, 0);
}

static void make_moe(void) {
  moe_dtype act = MOE_BF16;
  router_w = MATRIX(MOE_F32, E, D, 0.03), probs = MATRIX(MOE_F32, T, E, 1);
  lse = VECTOR(MOE_F32, T, 1), experts = MATRIX(MOE_I32, T, K, 0), gates = MATRIX(MOE_F32, T, K, 1);
  stats = MATRIX(MOE_F32, 1, 2 * E + 1, 1), dlogits = MATRIX(MOE_F32, T, E, 1);
  router_dw = MATRIX(MOE_F32, E, D, 0), offsets = VECTOR(MOE_I32, E + 1, 0);
  pair = VECTOR(MOE_I32, C, 0), slot = MATRIX(MOE_I32, T, K, 0);
  row_dgates = MATRIX(MOE_F32, T, K, 0);
  sorted = MATRIX(act, C, D, 1), sorted_gates = VECTOR(MOE_F32, C, 0.25);
  w13 = make(act, 4, E, 2, F, D, 0.03), w2 = make(act, 3, E, D, F, 1, 0.01);
  gu = MATRIX(act, C, 2 * F, 1), a = MATRIX(act, C, F, 1), again = MATRIX(act, C, F, 1);
  dgates = VECTOR(MOE_F32, C, 1), dhidden = MATRIX(act, C, D, 1);
  dw13 = make(MOE_F32, 3, E, 2 * F, D, 1, 0), dw2 = make(MOE_F32, 3, E, D, F, 1, 0);
  half_dw13 = make(act, 3, E, 2 * F, D, 1, 0), half_dw2 = make(act, 3, E, D, F, 1, 0);
  int64_t bytes = moe_expert_scratch(dev, C, D, F, act);
  moe_attention_shape shape = {T / S, S, H, G, HEAD};
  int64_t more = moe_attention_scratch(dev, shape, act);
  if (more > bytes) bytes = more;
  moe_device_set_scratch(dev, moe_device_alloc(dev, bytes), bytes);
  for (turn = 0; turn < MOST_COPIES; turn++) { /* a real routing in each copy */
    must(moe_router(dev, at(x), at(router_w), moe_tensor_none(), at(probs), at(lse), at(experts),
                    at(gates), at(stats)));
    must(moe_permute_plan(dev, at(experts), PAD, at(offsets), at(pair), at(slot)));
  }
}

/* ---- operations -------------------------------------------------------------------------------
 * X(name, bytes, products, call): products in multiplications and additions */

#define SHAPE_S ((moe_attention_shape){T / S, S, H, G, HEAD})
#define ADAMW ((moe_adamw_args){0.9, 0.95, 1e-8, 0.1, 0})
#define NONE moe_tensor_none()
#define PAIRS (H * (double)T * S / 2 * HEAD * 2) /* of one causal product */
#define ROUTED ((double)T * K)
#define OPERATIONS(X)                                                                              \
  X("add", 6.0 * T * D, 0, moe_add(dev, at(y), at(x)))                                             \
  X("rms_norm + residual", 8.0 * T * D, 0,                                                         \
    moe_rms_norm(dev, at(x), at(y), at(gain), 1e-5, at(y), at(z), at(rstd)))                       \
  X("rms_norm_backward", 8.0 * T * D, 0,                                                           \
    moe_rms_norm_backward(dev, at(z), at(x), at(gain), at(rstd), at(y), at(dgain)))                \
  X("gemm qkv", 2.0 * T * (D + 14 * HEAD), 2.0 * T * D * 14 * HEAD,                                \
    moe_gemm(dev, MOE_NT, at(x), at(wqkv), 0, at(qkv)))                                            \
  X("rope", 4.0 * T * 13 * HEAD, 0, moe_rope(dev, at(qkv), at(positions), at(table), H, G, 1))     \
  X("attention", 2.0 * T * (14 + 12) * HEAD, 2 * PAIRS,                                            \
    moe_attention(dev, SHAPE_S, at(qkv), NONE, at(attended), at(lse_heads)))                       \
  X("attention_backward", 2.0 * T * (14 * 2 + 24) * HEAD, 5 * PAIRS,                               \
    moe_attention_backward(dev, SHAPE_S, at(x), at(qkv), NONE, at(attended), at(lse_heads),        \
                           at(dqkv)))                                                              \
  X("router", 2.0 * T * D + 8.0 * T * E, 0,                                                        \
    moe_router(dev, at(x), at(router_w), NONE, at(probs), at(lse), at(experts), at(gates),         \
               at(stats)))                                                                         \
  X("router_backward", 6.0 * T * D + 12.0 * T * E, 0,                                              \
    moe_router_backward(dev, at(gates), at(x), at(router_w), at(probs), at(lse), at(experts),      \
                        at(gates), moe_tensor_2d(at(stats).data, MOE_F32, 1, E), 1e-3f, 0,         \
                        at(dlogits), at(y), at(router_dw)))                                        \
  X("norm_router", 8.0 * T * D + 8.0 * T * E, 0,                                                   \
    moe_norm_router(dev, (moe_norm){at(x), at(y), at(gain), 1e-5, at(y), at(z), at(rstd)},         \
                    at(router_w), NONE, at(probs), at(lse), at(experts), at(gates), at(stats)))    \
  X("router_norm_backward", 8.0 * T * D + 12.0 * T * E, 0,                                         \
    moe_router_norm_backward(                                                                      \
        dev, at(gates), at(x), at(router_w), at(probs), at(lse), at(experts), at(gates),           \
        moe_tensor_2d(at(stats).data, MOE_F32, 1, E), 1e-3f, 0, at(dlogits), at(router_dw),        \
        (moe_norm_gradient){at(z), at(x), at(gain), at(rstd), at(y), at(dgain)}))                  \
  X("permute_plan", 12.0 * T * K + 4.0 * C, 0,                                                     \
    moe_permute_plan(dev, at(experts), PAD, at(offsets), at(pair), at(slot)))                      \
  X("gather_rows", 2.0 * T * D + 2.0 * C * D, 0,                                                   \
    moe_gather_rows(dev, at(x), at(pair), K, at(sorted)))                                          \
  X("combine_rows", 2.0 * T * D + 2.0 * ROUTED * D, 0,                                             \
    moe_combine_rows(dev, at(sorted), at(slot), 0, 0, at(y)))                                      \
  X("combine_norm", 6.0 * T * D + 2.0 * ROUTED * D, 0,                                             \
    moe_combine_norm(dev, at(sorted), at(slot),                                                    \
                     (moe_norm){at(x), at(attended), at(gain), 1e-5, at(y), at(z), at(rstd)}))     \
  X("gather_gates", 12.0 * ROUTED, 0,                                                              \
    moe_gather_gates(dev, at(gates), at(pair), at(sorted_gates)))                                  \
  X("gates_backward", 2.0 * T * D + 2.0 * ROUTED * D, 0,                                           \
    moe_gates_backward(dev, at(x), at(sorted), at(slot), at(gates), at(row_dgates)))               \
  X("gather_backward", 2.0 * T * D + 2.0 * (ROUTED + C) * D, 0,                                    \
    moe_gather_backward(dev, at(x), at(pair), at(sorted), at(slot), at(gates), at(dhidden),        \
                        at(row_dgates)))                                                           \
  X("expert_up", 2.0 * ROUTED * (D + 3 * F), ROUTED * 4 * D * F,                                   \
    moe_expert_up(dev, at(sorted), at(offsets), at(w13), at(sorted_gates), MOE_GU_VALUES, at(gu),  \
                  at(a)))                                                                          \
  X("expert_down", 2.0 * ROUTED * (D + F), ROUTED * 2 * D * F,                                     \
    moe_expert_down(dev, at(a), at(offsets), at(w2), at(dhidden)))                                 \
  X("expert_down_backward", 2.0 * ROUTED * (D + 5 * F), ROUTED * 2 * D * F,                        \
    moe_expert_down_backward(dev, at(sorted), at(offsets), at(w2), at(sorted_gates),               \
                             MOE_GU_VALUES, at(gu), at(again), at(dgates)))                        \
  X("expert_up_backward", 2.0 * ROUTED * (D + 2 * F), ROUTED * 4 * D * F,                          \
    moe_expert_up_backward(dev, at(gu), at(offsets), at(w13), at(dhidden)))                        \
  X("expert_weight_grad w13", 2.0 * ROUTED * (D + 2 * F) + 16.0 * E * D * F, ROUTED * 4 * D * F,   \
    moe_expert_weight_grad(dev, at(gu), at(sorted), at(offsets), 1, at(dw13), NONE))               \
  X("expert_weight_grad w2", 2.0 * ROUTED * (D + F) + 8.0 * E * D * F, ROUTED * 2 * D * F,         \
    moe_expert_weight_grad(dev, at(sorted), at(a), at(offsets), 1, at(dw2), NONE))                 \
  X("expert_weight_grad w13, new", 2.0 * ROUTED * (D + 2 * F) + 8.0 * E * D * F,                   \
    ROUTED * 4 * D * F,                                                                            \
    moe_expert_weight_grad(dev, at(gu), at(sorted), at(offsets), 0, at(dw13), NONE))               \
  X("expert_weight_grad w13, bf16", 2.0 * ROUTED * (D + 2 * F) + 4.0 * E * D * F,                  \
    ROUTED * 4 * D * F,                                                                            \
    moe_expert_weight_grad(dev, at(gu), at(sorted), at(offsets), 0, at(half_dw13), NONE))          \
  X("expert_weight_grad w2, bf16", 2.0 * ROUTED * (D + F) + 2.0 * E * D * F, ROUTED * 2 * D * F,   \
    moe_expert_weight_grad(dev, at(sorted), at(a), at(offsets), 0, at(half_dw2), NONE))            \
  X("expert_weight_grad w13, squares", 2.0 * ROUTED * (D + 2 * F) + 8.0 * E * D * F,               \
    ROUTED * 4 * D * F,                                                                            \
    moe_expert_weight_grad(dev, at(gu), at(sorted), at(offsets), 0, at(dw13), at(squares)))        \
  X("expert_weight_grad w13, bf16, squares", 2.0 * ROUTED * (D + 2 * F) + 4.0 * E * D * F,         \
    ROUTED * 4 * D * F,                                                                            \
    moe_expert_weight_grad(dev, at(gu), at(sorted), at(offsets), 0, at(half_dw13), at(squares)))   \
  X("expert_weight_grad w2, bf16, squares", 2.0 * ROUTED * (D + F) + 2.0 * E * D * F,              \
    ROUTED * 2 * D * F,                                                                            \
    moe_expert_weight_grad(dev, at(sorted), at(a), at(offsets), 0, at(half_dw2), at(squares)))     \
  X("gemm head, 8192 rows", 2.0 * CHUNK * (D + V), 2.0 * CHUNK * D * V,                            \
    moe_gemm(dev, MOE_NT, moe_tensor_rows(at(x), 0, CHUNK), at(head), 0, at(logits)))              \
  X("cross_entropy, 8192 rows", 4.0 * CHUNK * V, 0,                                                \
    moe_cross_entropy(dev, at(logits), at(targets), 1e-4f, 1, at(loss), NONE))                     \
  X("gemm head input gradient", 2.0 * CHUNK * (D + V), 2.0 * CHUNK * D * V,                        \
    moe_gemm(dev, MOE_NN, at(logits), at(head), 0, moe_tensor_rows(at(y), 0, CHUNK)))              \
  X("gemm head weight gradient", 2.0 * CHUNK * (D + V) + 8.0 * V * D, 2.0 * CHUNK * D * V,         \
    moe_gemm(dev, MOE_TN, at(logits), moe_tensor_rows(at(x), 0, CHUNK), 1, at(dembedding)))        \
  X("embed", 4.0 * T * D, 0, moe_embed(dev, at(tokens), at(embedding), at(x)))                     \
  X("embed_backward", 10.0 * T * D, 0, moe_embed_backward(dev, at(tokens), at(x), at(dembedding))) \
  X("sum_squares, 105 M", 4.0 * PARAMETERS, 0, moe_sum_squares(dev, at(grad), at(squares)))        \
  X("sum_rows of 2, bf16, 52 M", 3.0 * PARAMETERS, 0,                                              \
    moe_sum_rows(dev, moe_tensor_2d(at(half_grad).data, MOE_BF16, 2, PARAMETERS / 2), 0,           \
                 moe_tensor_rows(at(half_grad), 0, PARAMETERS / 2), at(squares)))                  \
  X("adamw, 105 M", 28.0 * PARAMETERS, 0,                                                          \
    moe_adamw(dev, ADAMW, at(now), at(grad), at(scale), at(master), at(m), at(v), at(weight)))     \
  X("adamw, bf16 gradients", 26.0 * PARAMETERS, 0,                                                 \
    moe_adamw(dev, ADAMW, at(now), at(half_grad), at(scale), at(master), at(m), at(v),             \
              at(weight)))                                                                         \
  X("adamw, bf16 moments", 20.0 * PARAMETERS, 0,                                                   \
    moe_adamw(dev, ADAMW, at(now), at(grad), at(scale), at(master), at(half_m), at(half_v),        \
              at(weight)))                                                                         \
  X("adamw, both bf16", 18.0 * PARAMETERS, 0,                                                      \
    moe_adamw(dev, ADAMW, at(now), at(half_grad), at(scale), at(master), at(half_m), at(half_v),   \
              at(weight)))                                                                         \
  X("sample, 8 rows", 4.0 * 8 * V, 0,                                                              \
    moe_sample(dev, at(sampled), (moe_sample_args){0.8f, 50, 0.9f, 1}, at(next), at(next),         \
               at(next)))

static int by_value(const void *p, const void *q) {
  double b = *(const double *)p, c = *(const double *)q;
  return (b > c) - (b < c);
}

/* What is changed in place would drift to values that are cheaper to multiply. */
static void refresh(void) {
  for (int i = 0; i < gu.copies; i++) fill(dev, draws, gu.copy[i], 1);
  for (int i = 0; i < logits.copies; i++) fill(dev, draws, logits.copy[i], 1);
}

static bool wanted(const char *operation, const char *names) {
  char name[64];
  for (;; names++) {
    int length = (int)strcspn(names, "|");
    snprintf(name, sizeof name, "%.*s", length, names);
    if (strstr(operation, name) != NULL) return true;
    names += length;
    if (*names == '\0') return false;
  }
}

#define MEASURE(text, bytes_, products_, call)                                      \
  if (wanted(text, only)) {                                                         \
    double floor_s = (bytes_) / COPY_RATE, by_products = (products_) / MATRIX_RATE; \
    if (by_products > floor_s) floor_s = by_products;                               \
    int calls = floor_s > 3e-4 ? 1 : 10;                                            \
    double seconds[ROUNDS];                                                         \
    for (int round = -2; round < ROUNDS; round++) {                                 \
      refresh();                                                                    \
      must(moe_device_sync(dev));                                                   \
      double start = moe_clock_s();                                                 \
      for (int i = 0; i < calls; i++, turn++) must(call);                           \
      must(moe_device_sync(dev));                                                   \
      if (round >= 0) seconds[round] = (moe_clock_s() - start) / calls;             \
    }                                                                               \
    show(text, seconds, floor_s, (bytes_), (products_));                            \
    if (repeat_s > 0.0 && !changes_input(text)) {                                   \
      moe_power_run run = {.dev = dev, .meter = meter, .seconds = repeat_s};        \
      for (; moe_power_goes_on(&run); turn++) must(call);                           \
      show_power(&run, (bytes_), (products_));                                      \
    }                                                                               \
    printf("\n");                                                                   \
    fflush(stdout);                                                                 \
  }

static bool changes_input(const char *operation) {
  return strcmp(operation, "expert_down_backward") == 0 || strstr(operation, "cross_entropy");
}

static void show(const char *text, double *seconds, double floor_s, double bytes, double products) {
  qsort(seconds, ROUNDS, sizeof *seconds, by_value);
  double s = seconds[ROUNDS / 2];
  printf("%-28s %9.4f %9.4f %6.2f %8.2f %8.1f %9.4f %9.4f", text, 1e3 * s, 1e3 * floor_s,
         s / floor_s, 1e-12 * bytes / s, 1e-12 * products / s, 1e3 * seconds[0],
         1e3 * seconds[ROUNDS - 1]);
}

static void show_power(const moe_power_run *run, double bytes, double products) {
  must(run->status);
  double s = run->use.seconds / (double)run->calls, joules = run->use.watts * s;
  printf("   %9.4f %6.0f %6.0f %6.0f %5.0f%% %9.3f", 1e3 * s, run->use.watts, run->use.mhz,
         run->use.set_mhz, 100.0 * run->use.capped, 1e3 * joules);
  printf(" %8.1f", 1e12 * joules / bytes);
  if (products > 0.0) printf(" %8.3f", 1e12 * joules / products);
}

int main(int argc, char **argv) {
  T = argc > 1 ? atoll(argv[1]) : 16384;
  const char *only = argc > 2 ? argv[2] : "";
  S = argc > 3 ? atoll(argv[3]) : 4096;
  repeat_s = argc > 4 ? atof(argv[4]) : 0.0;
  if (T < CHUNK || S < 1 || T % S != 0) {
    fprintf(stderr, "gpu_ops: TOKENS must be a multiple of S and at least %d\n", CHUNK);
    return 2;
  }
  C = T * K + E * (PAD - 1);
  moe_log_init("gpu_ops", -1);
  moe_device_options options = {.kind = MOE_DEVICE_CUDA};
  must(moe_device_open(&options, &dev));
  meter = repeat_s > 0.0 ? moe_power_open(dev) : NULL;
  draws = make_draws(dev);
  make_dense();
  make_moe();
  printf("%s, %lld tokens, bf16; floors at %.2f TB/s and %.0f TFLOP/s\n", moe_device_name(dev),
         (long long)T, 1e-12 * COPY_RATE, 1e-12 * MATRIX_RATE);
  printf("%-28s %9s %9s %6s %8s %8s %9s %9s", "operation", "ms", "floor", "ratio", "TB/s",
         "TFLOP/s", "least", "most");
  if (repeat_s > 0.0)
    printf("   %9s %6s %6s %6s %6s %9s %8s %8s", "repeated", "W", "MHz", "set", "capped", "mJ",
           "pJ/byte", "pJ/FLOP");
  printf("\n");
  if (meter) {
    moe_power_run idle = {.dev = dev, .meter = meter, .seconds = repeat_s};
    while (moe_power_goes_on(&idle)) (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    printf("(nothing: %.0f W of %.0f, %.0f MHz of %.0f)\n", idle.use.watts, idle.use.limit_watts,
           idle.use.set_mhz, idle.use.max_mhz);
  }
  OPERATIONS(MEASURE)
  moe_power_close(meter);
  moe_device_close(dev); /* with all that it holds */
  return 0;
}
