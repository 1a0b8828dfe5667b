/* A small model with drawn weights: the generator over it, and the model that trains as its oracle.
 * Shared by tests of the generator on one rank, on several, and on a GPU. */
#ifndef MOE_TESTS_MODEL_GENERATE_FIXTURE_H
#define MOE_TESTS_MODEL_GENERATE_FIXTURE_H

#include <stdlib.h>
#include <string.h>

#include "core/model/generate_loop.h"
#include "core/model/model.h"

enum { SMALL_VOCAB = 97, SMALL_EXPERTS = 6, SMALL_CONTEXT = 16, SMALL_SEED = 3 };

typedef struct {
  moe_config config;
  moe_device *dev; /* borrowed */
  moe_mesh mesh;
  moe_memory memory;
  moe_generator *g;
} small_generator;

/* Ends the test or job with the call's message. */
#ifndef GENERATE_OK
#define GENERATE_OK(call)                                                                 \
  do {                                                                                    \
    if ((call) != MOE_OK) {                                                               \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, moe_error_message()); \
      abort();                                                                            \
    }                                                                                     \
  } while (0)
#endif

/* A world of one rank on a CPU device, for a suite's .init and .fini. */
static inline void small_world_open(int threads, moe_device **dev, moe_comm **world) {
  moe_device_options options = {.kind = MOE_DEVICE_CPU, .threads = threads};
  GENERATE_OK(moe_comm_init(NULL, NULL));
  GENERATE_OK(moe_device_open(&options, dev));
  GENERATE_OK(moe_comm_world(*dev, world));
}

static inline void small_world_close(moe_device *dev, moe_comm *world) {
  moe_comm_destroy(world);
  moe_device_close(dev);
  moe_comm_finalize();
}

static inline void small_config(moe_config *c, double alpha) {
  static const char *const sizes[] = {
      "model.preset=tiny",       "model.vocab_size=97", "model.hidden_size=24",
      "model.num_layers=2",      "model.num_heads=4",   "model.num_kv_heads=2",
      "model.head_dim=8",        "model.num_experts=6", "model.top_k=2",
      "model.ffn_size=20",       "model.context=16",    "model.init_std=0.25",
      "data.sequence_length=16",
  };
  moe_config_defaults(c);
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
    GENERATE_OK(moe_config_set(c, sizes[i]));
  c->model.rope_alpha = alpha;
  GENERATE_OK(moe_config_resolve(c, 0));
}

/* This rank's share of the same weights on any number of ranks. */
static inline void small_weights(const small_generator *s) {
  const moe_params *params = moe_generator_params(s->g);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    moe_tensor to = moe_tensor_rows(moe_generator_pools(s->g)[p->row->pool], p->offset, p->count);
    double std = s->config.model.init_std;
    GENERATE_OK(moe_param_init(s->dev, p, &params->dims, std, SMALL_SEED, 0, to));
  }
}

typedef struct {
  double alpha; /* 0: 1 */
  int64_t batch, room, chunk;
  moe_sample_args sample;
  int precision; /* MOE_PRECISION_FP32 is 0 */
  bool bias, eager;
  bool wide; /* sizes that a GPU's fast kernels take */
} small_options;

/* Over all ranks of `world`; NULL: this process alone, without MPI. */
static inline small_generator *small_open(moe_device *dev, moe_comm *world, small_options o) {
  small_generator *s = calloc(1, sizeof *s);
  small_config(&s->config, o.alpha > 0.0 ? o.alpha : 1.0);
  s->config.precision.dtype = o.precision;
  if (o.wide) {
    s->config.model.hidden_size = 128;
    s->config.model.ffn_size = 192;
    s->config.model.head_dim = 32;
    s->config.model.init_std = 0.1;
  }
  s->dev = dev;
  if (o.sample.top_p <= 0.0f) o.sample.top_p = 1.0f;
  if (world)
    GENERATE_OK(moe_mesh_create(world, moe_comm_size(world), SMALL_EXPERTS, &s->mesh));
  else
    s->mesh =
        (moe_mesh){.ep = 1, .edp = 1, .owned = {0, SMALL_EXPERTS}, .num_experts = SMALL_EXPERTS};
  moe_generator_options options = {.config = &s->config,
                                   .dev = dev,
                                   .mesh = &s->mesh,
                                   .batch = o.batch,
                                   .room = o.room,
                                   .chunk = o.chunk,
                                   .sample = o.sample,
                                   .router_bias = o.bias,
                                   .eager = o.eager};
  moe_memory_measure(&s->memory);
  GENERATE_OK(moe_generator_create(&options, &s->memory, &s->g));
  moe_generator_destroy(s->g);
  GENERATE_OK(moe_memory_commit(&s->memory, moe_device_alloc, dev));
  GENERATE_OK(moe_generator_create(&options, &s->memory, &s->g));
  small_weights(s);
  return s;
}

static inline void small_close(small_generator *s) {
  moe_generator_destroy(s->g);
  moe_mesh_destroy(&s->mesh);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) moe_device_free(s->dev, s->memory.arena[i].base);
  moe_device_set_scratch(s->dev, NULL, 0);
  free(s);
}

/* Tokens that look like nothing in particular. */
static inline void small_tokens(int32_t *out, int64_t n, int which) {
  for (int64_t i = 0; i < n; i++)
    out[i] = (int32_t)((i * 37 + which * 11 + i * i / 7) % SMALL_VOCAB);
}

/* Logits [n, V] of one text by the model that trains, which computes everything at once. */
static inline void model_logits(moe_device *dev, moe_comm *world, double alpha,
                                const float *router_bias, const int32_t *tokens, int64_t n,
                                float *logits) {
  static moe_config c; /* large */
  moe_mesh mesh;
  moe_memory memory = {0};
  moe_model *m;
  small_config(&c, alpha);
  if (router_bias) c.train.bias_update_rate = 1e-3;
  moe_model_options o = {.config = &c, .dev = dev, .mesh = &mesh, .batch = 1, .seq = n};
  o.micro_batches = 1;
  GENERATE_OK(moe_mesh_create(world, 1, SMALL_EXPERTS, &mesh));
  moe_memory_measure(&memory);
  GENERATE_OK(moe_model_create(&o, &memory, &m));
  moe_model_destroy(m);
  GENERATE_OK(moe_memory_commit(&memory, moe_device_alloc, dev));
  GENERATE_OK(moe_model_create(&o, &memory, &m));
  for (int pool = 0; pool < MOE_POOLS; pool++)
    GENERATE_OK(moe_model_init_pool(m, (moe_pool_kind)pool, SMALL_SEED, moe_tensor_none(), 0));
  if (router_bias) {
    size_t bytes = (size_t)(c.model.num_layers * c.model.num_experts) * sizeof(float);
    memcpy(moe_model_router_bias(m), router_bias, bytes);
    GENERATE_OK(moe_model_router_bias_changed(m));
  }
  int32_t *numbers = calloc((size_t)(2 * n), sizeof *numbers);
  for (int64_t i = 0; i < n; i++) numbers[n + i] = (int32_t)i;
  moe_batch batch = {
      .batch = 1, .seq = n, .tokens = tokens, .targets = numbers, .positions = numbers + n};
  GENERATE_OK(moe_model_logits(m, &batch, logits));
  free(numbers);
  moe_model_destroy(m);
  moe_mesh_destroy(&mesh);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) moe_device_free(dev, memory.arena[i].base);
}

#endif
