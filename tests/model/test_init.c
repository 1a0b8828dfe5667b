/* Initial weights: every element of a pool is its parameter's draw, and a master that is a part of
 * the pool holds the same draws unrounded, or what rounding to bf16 leaves over of them. */
#include <criterion/criterion.h>
#include <math.h>

#include "core/base/rng.h"
#include "tests/model/generate_fixture.h"

static moe_device *dev;
static moe_comm *world;
static moe_config config;

static void open_device(void) {
  small_world_open(2, &dev, &world);
}

static void close_device(void) {
  small_world_close(dev, world);
}

TestSuite(init, .init = open_device, .fini = close_device);

/* The model of a rank that owns these experts, its pools freshly drawn. */
typedef struct {
  moe_mesh mesh;
  moe_memory memory;
  moe_model *m;
} drawn;

static void open_model(drawn *d, moe_range owned, int precision) {
  *d = (drawn){.m = NULL};
  GENERATE_OK(moe_mesh_create(world, 1, SMALL_EXPERTS, &d->mesh));
  d->mesh.owned = owned;
  small_config(&config, 1.0);
  config.precision.dtype = precision;
  moe_model_options o = {.config = &config, .dev = dev, .mesh = &d->mesh, .batch = 1, .seq = 8};
  o.micro_batches = 1;
  moe_memory_measure(&d->memory);
  GENERATE_OK(moe_model_create(&o, &d->memory, &d->m));
  moe_model_destroy(d->m);
  GENERATE_OK(moe_memory_commit(&d->memory, moe_device_alloc, dev));
  GENERATE_OK(moe_model_create(&o, &d->memory, &d->m));
}

static void close_model(drawn *d) {
  moe_model_destroy(d->m);
  moe_mesh_destroy(&d->mesh);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) moe_device_free(dev, d->memory.arena[i].base);
}

/* A pool as the table says it must be, in f32; gaps zero. */
static float *expected_pool(const moe_params *params, moe_pool_kind pool, int64_t n) {
  float *out = calloc((size_t)n, sizeof *out);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    if (p->row->pool != pool) continue;
    double std = config.model.init_std;
    if (p->row->init == MOE_INIT_NORMAL_OUT) std /= sqrt(2.0 * (double)config.model.num_layers);
    for (int64_t j = 0; j < p->count; j++) out[p->offset + j] = 1.0f;
    if (p->row->init == MOE_INIT_ONES) continue;
    moe_rng_normal_fill(SMALL_SEED, moe_rng_stream(p->row->name, p->layer, p->expert), 0, p->count,
                        (float)std, out + p->offset);
  }
  return out;
}

static void expect_bits(const void *got, const float *values, moe_dtype type, int64_t n) {
  void *want = malloc((size_t)n * sizeof *values);
  moe_convert(values, MOE_F32, want, type, n);
  cr_assert_arr_eq(got, want, (size_t)(n * moe_dtype_size(type)));
  free(want);
}

/* Draw pool by pool, the master's window [begin, end) of it too; look at all elements. */
static void expect_drawn(drawn *d, moe_pool_kind pool, int64_t begin, int64_t end) {
  moe_tensor weights = moe_model_weights(d->m, pool);
  float *want = expected_pool(moe_model_params(d->m), pool, weights.shape[0]);
  moe_dtype type = weights.dtype == MOE_BF16 ? MOE_LOW16 : MOE_F32;
  float *master = calloc((size_t)(end - begin), sizeof *master);
  memset(weights.data, 0, (size_t)moe_tensor_bytes(weights));
  GENERATE_OK(
      moe_model_init_pool(d->m, pool, SMALL_SEED, moe_tensor_1d(master, type, end - begin), begin));
  expect_bits(weights.data, want, weights.dtype, weights.shape[0]);
  expect_bits(master, want + begin, type, end - begin);
  free(master);
  free(want);
}

Test(init, pools_hold_their_parameters_draws_and_a_master_its_part_of_them) {
  static const int precisions[] = {MOE_PRECISION_FP32, MOE_PRECISION_BF16, MOE_PRECISION_FP16};
  for (int i = 0; i < 3; i++) {
    drawn d;
    open_model(&d, (moe_range){0, SMALL_EXPERTS}, precisions[i]);
    for (int pool = 0; pool < MOE_POOLS; pool++) {
      int64_t n = moe_model_weights(d.m, (moe_pool_kind)pool).shape[0];
      const int64_t windows[][2] = {{0, n}, {n / 3 + 1, n / 2}, {n - 1, n}, {0, 1}};
      for (int w = 0; w < 4; w++)
        expect_drawn(&d, (moe_pool_kind)pool, windows[w][0], windows[w][1]);
    }
    close_model(&d);
  }
}

Test(init, an_expert_is_the_same_on_whichever_rank_owns_it) {
  drawn d;
  open_model(&d, (moe_range){2, 5}, MOE_PRECISION_BF16);
  int64_t n = moe_model_weights(d.m, MOE_POOL_EXPERT).shape[0];
  expect_drawn(&d, MOE_POOL_EXPERT, n / 5, n - 7);
  close_model(&d);
}
