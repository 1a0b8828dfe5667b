/* Generation on a GPU: each operation of one step of the 6.9b model, and the whole step, against
 * the bytes they must move.
 *
 *   gpu_decode [SEQUENCES] [CACHED]     default: 1 and 32 sequences, 1024 tokens cached in each;
 *                                       1 262144 is a long context, whose rotation has alpha 8
 *
 * Weights are random and all 30 layers are there, so nothing stays in the cache. A graph of 30
 * calls, one per layer, is what is timed for an operation; a graph of embedding, 30 layers, head
 * and greedy choice for the step. The floor is bytes over the copy rate measured on an H200 (4.26
 * TB/s): weights of the experts that are chosen (all K of one sequence; for many, as the router
 * here chose), other weights, keys and values. Medians of ROUNDS launches.
 * MOE_PLAIN=overlap,gemv,router,stream,cluster says what some of it is worth (plain.h). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/draws.h"

static const double COPY_RATE = 4.26e12;
enum { D = 768, E = 16, F = 6144, K = 4, V = 32000, H = 12, G = 1, HEAD = 64, LAYERS = 30 };
enum { QKV = (H + 2 * G) * HEAD, ROUNDS = 25, ROOM_MORE = 64 };

static moe_device *dev;
static moe_tensor draws;
static int64_t asked_for, free_before; /* bytes: of all tensors; of the GPU before any */

/* ---- tensors ------------------------------------------------------------------------------- */

static moe_tensor make(moe_dtype dtype, int64_t a, int64_t b, double scale) {
  moe_tensor x = moe_tensor_2d(NULL, dtype, a, b);
  x.data = moe_device_alloc(dev, moe_tensor_bytes(x));
  asked_for += moe_tensor_bytes(x);
  if (x.data == NULL) must(moe_fail(MOE_NO_MEMORY, "gpu_decode: out of device memory"));
  if (scale > 0) fill(dev, draws, x, scale);
  return x;
}

static moe_tensor flat(moe_tensor x) {
  return moe_tensor_1d(x.data, x.dtype, moe_tensor_count(x));
}

static moe_tensor whole_numbers(int64_t n, int32_t first, int32_t step) {
  moe_tensor x = flat(make(MOE_I32, 1, n, 0));
  int32_t *host = malloc((size_t)(4 * n));
  for (int64_t i = 0; i < n; i++) host[i] = first + (int32_t)i * step;
  must(moe_device_upload(dev, x.data, host, 4 * n));
  must(moe_device_sync(dev));
  free(host);
  return x;
}

typedef struct {
  moe_tensor norm1, wqkv, wo, norm2, router, w13, w2, keys, values;
} layer;

/* The weights, once for all numbers of sequences; caches and what a step works on for each. */
static layer layers[LAYERS];
static moe_tensor embedding, norm, head, table;
static int64_t T, cached;
static moe_tensor tokens, next, streams, lengths, x, sum, y, h, qkv, attended, hidden, rstd, probs,
    lse, experts, gates, stats, logits;

static void make_weights(void) {
  moe_dtype act = MOE_BF16;
  for (int l = 0; l < LAYERS; l++) {
    layer *w = &layers[l];
    w->norm1 = flat(make(MOE_F32, 1, D, 1)), w->norm2 = flat(make(MOE_F32, 1, D, 1));
    w->wqkv = make(act, QKV, D, 0.03), w->wo = make(act, D, H * HEAD, 0.03);
    w->router = make(MOE_F32, E, D, 0.03 + 1e-3 * l); /* other choices in each layer */
    w->w13 = make(act, E * 2 * F, D, 0.03), w->w2 = make(act, E * D, F, 0.01);
    w->w13 = moe_tensor_3d(w->w13.data, act, E, 2 * F, D);
    w->w2 = moe_tensor_3d(w->w2.data, act, E, D, F);
  }
  embedding = make(act, V, D, 1), head = make(act, V, D, 0.03);
  norm = flat(make(MOE_F32, 1, D, 1));
}

static moe_attention_shape shape(void) {
  return (moe_attention_shape){T, 1, H, G, HEAD};
}

static void fill_table(int64_t positions) {
  float *host = malloc((size_t)moe_tensor_bytes(table));
  moe_rope_table_fill(10000.0, 8.0, positions, HEAD, host);
  must(moe_device_upload(dev, table.data, host, moe_tensor_bytes(table)));
  must(moe_device_sync(dev));
  free(host);
}

static void make_state(void) {
  moe_dtype act = MOE_BF16;
  int64_t room = cached + ROOM_MORE, positions = room;
  for (int l = 0; l < LAYERS; l++) {
    moe_tensor k = make(act, T * room, G * HEAD, 1), v = make(act, T * room, G * HEAD, 1);
    layers[l].keys = moe_tensor_3d(k.data, act, T, room, G * HEAD);
    layers[l].values = moe_tensor_3d(v.data, act, T, room, G * HEAD);
  }
  table = make(MOE_F32, positions, HEAD, 0);
  fill_table(positions);
  tokens = whole_numbers(T, 11, 97), next = whole_numbers(T, 0, 0);
  streams = whole_numbers(T, 0, 1), lengths = whole_numbers(T, (int32_t)cached, 0);
  x = make(act, T, D, 1), sum = make(act, T, D, 1), y = make(act, T, D, 1), h = make(act, T, D, 1);
  qkv = make(act, T, QKV, 1), attended = make(act, T, H * HEAD, 1);
  hidden = make(act, T * K, F, 0), rstd = flat(make(MOE_F32, 1, T, 0));
  probs = make(MOE_F32, T, E, 0), lse = flat(make(MOE_F32, 1, T, 0));
  experts = make(MOE_I32, T, K, 0), gates = make(MOE_F32, T, K, 0.25);
  stats = make(MOE_F32, 1, 2 * E + 1, 0), logits = make(MOE_F32, T, V, 0);
  int64_t bytes = moe_attention_cached_scratch(dev, shape(), room, act);
  moe_device_set_scratch(dev, moe_device_alloc(dev, bytes), bytes);
  asked_for += bytes;
}

static void free_state(void) {
  moe_tensor all[] = {tokens, next, streams, lengths, x,       sum,   y,     h,      qkv,  attended,
                      hidden, rstd, probs,   lse,     experts, gates, stats, logits, table};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) moe_device_free(dev, all[i].data);
  for (int l = 0; l < LAYERS; l++) {
    moe_device_free(dev, layers[l].keys.data);
    moe_device_free(dev, layers[l].values.data);
  }
  moe_device_free(dev, moe_device_scratch(dev, 0));
  moe_device_set_scratch(dev, NULL, 0);
}

/* ---- the operations of a layer --------------------------------------------------------------- */

static moe_status do_qkv(const layer *w) {
  moe_norm n = {x, y, w->norm1, 1e-5, sum, h, rstd};
  return moe_norm_gemm(dev, n, w->wqkv, qkv);
}
static moe_status do_attention(const layer *w) {
  return moe_attention_cached(dev, shape(), qkv, lengths, table, w->keys, w->values, lengths,
                              attended);
}
static moe_status do_output(const layer *w) {
  return moe_gemm(dev, MOE_NT, attended, w->wo, 0, y);
}
static moe_status do_router(const layer *w) {
  moe_norm n = {sum, y, w->norm2, 1e-5, x, h, rstd};
  return moe_norm_router(dev, n, w->router, moe_tensor_none(), probs, lse, experts, gates, stats);
}
static moe_status do_experts(const layer *w) {
  return moe_experts_decode(dev, h, experts, gates, 0, w->w13, w->w2, hidden, y);
}

typedef moe_status (*operation)(const layer *w);
static const operation whole_layer[] = {do_qkv, do_attention, do_output, do_router, do_experts};
enum { PER_LAYER = sizeof whole_layer / sizeof *whole_layer };

static void do_head(void) {
  must(moe_rms_norm(dev, x, y, norm, 1e-5, x, h, rstd));
  must(moe_gemm(dev, MOE_NT, h, head, 0, logits));
}
static void do_sample(void) {
  moe_sample_args greedy = {0.0f, 0, 1.0f, 1};
  must(moe_sample(dev, logits, greedy, streams, lengths, next));
}

static void step(void) {
  must(moe_embed(dev, tokens, embedding, x)); /* y: what the step before left */
  for (int l = 0; l < LAYERS; l++)
    for (int i = 0; i < PER_LAYER; i++) must(whole_layer[i](&layers[l]));
  do_head();
  do_sample();
}

static operation only; /* what each() calls in every layer */
static void each(void) {
  for (int l = 0; l < LAYERS; l++) must(only(&layers[l]));
}

/* ---- measuring ------------------------------------------------------------------------------- */

static int by_value(const void *p, const void *q) {
  double a = *(const double *)p, b = *(const double *)q;
  return (a > b) - (a < b);
}

/* A line: median microseconds of `work` as a graph, over `calls`, against the floor of `bytes` for
 * one call. */
static void measure(const char *text, void (*work)(void), int calls, double bytes) {
  moe_graph *graph;
  double seconds[ROUNDS];
  work(); /* chooses algorithms */
  must(moe_device_sync(dev));
  must(moe_device_graph_begin(dev));
  work();
  must(moe_device_graph_end(dev, &graph));
  for (int round = -3; round < ROUNDS; round++) {
    must(moe_device_sync(dev));
    double start = moe_clock_s();
    must(moe_device_graph_launch(dev, graph));
    must(moe_device_sync(dev));
    if (round >= 0) seconds[round] = (moe_clock_s() - start) / calls;
  }
  moe_graph_destroy(dev, graph);
  qsort(seconds, ROUNDS, sizeof *seconds, by_value);
  double s = seconds[ROUNDS / 2], floor_s = bytes / COPY_RATE;
  printf("%-24s %10.2f %10.2f %7.2f %8.2f %10.2f %10.2f\n", text, 1e6 * s, 1e6 * floor_s,
         s / floor_s, 1e-12 * bytes / s, 1e6 * seconds[0], 1e6 * seconds[ROUNDS - 1]);
  fflush(stdout);
}

static void measure_each(const char *text, operation op, double bytes) {
  only = op;
  measure(text, each, LAYERS, bytes);
}

/* Experts that the choices of `experts` name. */
static int chosen(void) {
  int32_t list[4096];
  int count = 0;
  int64_t n = moe_tensor_count(experts);
  must(moe_device_download(dev, list, experts.data, 4 * n));
  must(moe_device_sync(dev));
  for (int e = 0; e < E; e++)
    for (int64_t i = 0; i < n; i++)
      if (list[i] == e) {
        count++;
        break;
      }
  return count;
}

static void measure_all(void) {
  double t = (double)T;
  step(); /* real activations and choices */
  int used = chosen();
  double expert = 6.0 * D * F, projections = 2.0 * D * (QKV + H * HEAD), keys = 4.0 * G * HEAD;
  double cache = t * keys * (double)cached, router = 4.0 * E * D;
  double held = (double)(free_before - moe_device_free_bytes(dev));
  double whole = LAYERS * (used * expert + projections + cache + router) + 2.0 * V * D;
  printf("\n%lld sequences, %lld tokens cached in each, %d experts chosen\n", (long long)T,
         (long long)cached, used);
  printf("memory: %.2f GB asked for, of which caches %.2f GB; %.2f GB held\n",
         1e-9 * (double)asked_for, 1e-9 * LAYERS * t * keys * (double)(cached + ROOM_MORE),
         1e-9 * held);
  printf("%-24s %10s %10s %7s %8s %10s %10s\n", "operation", "us", "floor", "ratio", "TB/s",
         "least", "most");
  measure_each("norm, gemm qkv", do_qkv, 2.0 * D * QKV + 2.0 * t * (D + QKV));
  measure_each("rope, attention_cached", do_attention, cache + 2.0 * t * (QKV + H * HEAD));
  measure_each("gemm o", do_output, 2.0 * D * H * HEAD + 4.0 * t * D);
  measure_each("norm, router", do_router, router + 2.0 * t * D);
  measure_each("experts_decode", do_experts, used * expert);
  measure("norm, gemm head", do_head, 1, 2.0 * V * D + 4.0 * t * V);
  measure("sample, greedy", do_sample, 1, 4.0 * t * V);
  measure("step of 30 layers", step, 1, whole);
}

int main(int argc, char **argv) {
  int64_t asked = argc > 1 ? atoll(argv[1]) : 0;
  cached = argc > 2 ? atoll(argv[2]) : 1024;
  if (asked < 0 || asked > 1024 || cached < 0 || cached > 1 << 20) {
    fprintf(stderr, "gpu_decode: up to 1024 sequences and 2^20 cached tokens\n");
    return 2;
  }
  moe_log_init("gpu_decode", -1);
  moe_device_options options = {.kind = MOE_DEVICE_CUDA};
  must(moe_device_open(&options, &dev));
  free_before = moe_device_free_bytes(dev);
  draws = make_draws(dev);
  make_weights();
  int64_t weights = asked_for;
  printf("%s, 6.9b shape, bf16; floors at %.2f TB/s\n", moe_device_name(dev), 1e-12 * COPY_RATE);
  const int64_t list[] = {asked > 0 ? asked : 1, asked > 0 ? 0 : 32};
  for (int i = 0; i < 2; i++) {
    T = list[i];
    if (T == 0) continue;
    make_state();
    measure_all();
    free_state();
    asked_for = weights;
  }
  moe_device_close(dev); /* with all that it holds */
  return 0;
}
