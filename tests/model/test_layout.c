/* Where a model's memory lies: gradients may lie over what layers keep for backward, but only where
 * backward has been when it stores them. */
#include <criterion/criterion.h>

#include "core/model/model_state.h"
#include "tests/model/generate_fixture.h"

enum { LAYERS = 5 };

static moe_device *dev;
static moe_comm *world;
static moe_config config;

static void open_device(void) {
  small_world_open(1, &dev, &world);
}

static void close_device(void) {
  small_world_close(dev, world);
}

TestSuite(layout, .init = open_device, .fini = close_device);

typedef struct {
  int recompute, layers; /* recompute_layers */
  int64_t seq, ffn, micro_batches;
} kind;

typedef struct {
  moe_mesh mesh;
  moe_memory memory;
  moe_model *m;
} trained;

static void open_model(trained *t, kind k) {
  *t = (trained){.m = NULL};
  small_config(&config, 1.0);
  config.model.num_layers = LAYERS;
  config.model.ffn_size = k.ffn;
  config.train.recompute = k.recompute;
  config.train.recompute_layers = k.layers;
  moe_model_options o = {.config = &config,
                         .dev = dev,
                         .mesh = &t->mesh,
                         .batch = 1,
                         .seq = k.seq,
                         .micro_batches = k.micro_batches,
                         .training = true};
  GENERATE_OK(moe_mesh_create(world, 1, SMALL_EXPERTS, &t->mesh));
  moe_memory_measure(&t->memory);
  GENERATE_OK(moe_model_create(&o, &t->memory, &t->m));
  moe_model_destroy(t->m);
  GENERATE_OK(moe_memory_commit(&t->memory, moe_device_alloc, dev));
  GENERATE_OK(moe_model_create(&o, &t->memory, &t->m));
}

static void close_model(trained *t) {
  moe_model_destroy(t->m);
  moe_mesh_destroy(&t->mesh);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) moe_device_free(dev, t->memory.arena[i].base);
  moe_device_set_scratch(dev, NULL, 0);
}

static bool overlap(moe_tensor a, moe_tensor b) {
  if (!moe_tensor_present(a) || !moe_tensor_present(b)) return false;
  const char *x = a.data, *y = b.data;
  return x < y + moe_tensor_bytes(b) && y < x + moe_tensor_bytes(a);
}

/* What block i keeps of its experts meets t. */
static bool keeps_in(const moe_block *b, moe_tensor t) {
  return overlap(b->gu, t) || overlap(b->xs, t) || overlap(b->a, t) || overlap(b->y, t);
}

static bool inside(const moe_memory *memory, moe_tensor t) {
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) {
    const moe_arena *a = &memory->arena[i];
    const char *x = t.data;
    if (a->base && x >= a->base && x + moe_tensor_bytes(t) <= a->base + a->size) return true;
  }
  return false;
}

/* All of it is memory that was taken; a layer's gradients leave alone what it keeps and what those
 * before it keep, which backward has yet to visit; layers do not meet but where they share. */
static void expect_order(const trained *t, int sharing) {
  const moe_model *m = t->m;
  cr_assert(inside(&t->memory, moe_model_grads(m, MOE_POOL_EXPERT)));
  for (int l = 0; l < LAYERS; l++) {
    const moe_block *b = &m->blocks[l];
    cr_assert(inside(&t->memory, b->gu) && inside(&t->memory, b->g.w13));
    cr_assert(!moe_tensor_present(b->a) || inside(&t->memory, b->a));
    cr_assert(!moe_tensor_present(b->xs) || inside(&t->memory, b->xs));
    cr_assert(!moe_tensor_present(b->y) || inside(&t->memory, b->y));
    cr_assert(!overlap(b->gu, b->a) && !overlap(b->gu, b->y) && !overlap(b->a, b->y));
    cr_assert(!overlap(b->xs, b->gu) && !overlap(b->xs, b->a) && !overlap(b->xs, b->y));
    for (int i = 0; i < l; i++) {
      const moe_block *before = &m->blocks[i];
      bool meet = keeps_in(before, b->gu) || keeps_in(before, b->xs) || keeps_in(before, b->a) ||
                  keeps_in(before, b->y);
      cr_assert_eq(meet, l < sharing, "layers %d and %d", i, l);
    }
    for (int i = 0; i <= l; i++)
      cr_assert(!keeps_in(&m->blocks[i], b->g.w13) && !keeps_in(&m->blocks[i], b->g.w2),
                "gradients of layer %d over what layer %d keeps", l, i);
  }
}

static int64_t total(kind k, int sharing) {
  trained t;
  open_model(&t, k);
  expect_order(&t, sharing);
  int64_t bytes = moe_memory_total(&t.memory);
  for (int pool = 0; pool < MOE_POOLS; pool++) { /* are zero where no parameter is */
    if (pool == MOE_POOL_EXPERT) continue;
    cr_assert(
        !overlap(moe_model_grads(t.m, (moe_pool_kind)pool), moe_model_grads(t.m, MOE_POOL_EXPERT)));
  }
  close_model(&t);
  return bytes;
}

/* Bytes that one layer keeps, and of one layer's gradients: rows are tokens times 2, sizes f32. */
static int64_t kept(kind k) {
  return 2 * k.seq * (k.recompute == MOE_RECOMPUTE_NONE ? 3 * k.ffn + 2 * 24 : 2 * k.ffn) * 4;
}
static int64_t grads(kind k) {
  return SMALL_EXPERTS * 3 * k.ffn * 24 * 4;
}

/* A second micro-batch adds to gradients, so nothing may lie over them. */
static int64_t saved(kind k, int sharing) {
  kind apart = k;
  apart.micro_batches = 2;
  int64_t stats = LAYERS * (2 * SMALL_EXPERTS + 2) * 4; /* of one micro-batch more */
  return total(apart, sharing) - stats - total(k, sharing);
}

enum { ROUNDING = 8 * MOE_ARENA_ALIGN };

Test(layout, gradients_need_one_layers_room_where_layers_keep_more) {
  static const int modes[] = {MOE_RECOMPUTE_NONE, MOE_RECOMPUTE_SWIGLU};
  for (int i = 0; i < 2; i++) {
    for (int64_t seq = 256; seq <= 2048; seq *= 2) { /* more and more layers' gradients over one */
      kind k = {.recompute = modes[i], .seq = seq, .ffn = 64, .micro_batches = 1};
      cr_assert_geq(kept(k), grads(k));
      cr_assert_float_eq((double)saved(k, 0), (double)((LAYERS - 1) * grads(k)), ROUNDING);
    }
  }
}

Test(layout, gradients_lie_over_all_that_is_kept_where_that_is_less) {
  kind k = {.recompute = MOE_RECOMPUTE_SWIGLU, .seq = 16, .ffn = 64, .micro_batches = 1};
  cr_assert_lt(kept(k), grads(k));
  cr_assert_float_eq((double)saved(k, 0), (double)((LAYERS - 1) * kept(k)), ROUNDING);
}

Test(layout, only_what_a_layer_keeps_for_itself_makes_room) {
  kind k = {.seq = 512, .ffn = 64, .micro_batches = 1};
  static const int modes[] = {MOE_RECOMPUTE_EXPERTS, MOE_RECOMPUTE_BLOCK};
  for (int i = 0; i < 2; i++) {
    k.recompute = modes[i];
    for (k.layers = 1; k.layers <= LAYERS; k.layers++) {
      int sharing = k.layers < LAYERS ? k.layers + 1 : LAYERS;
      int64_t room = (LAYERS - sharing) * kept(k), most = (LAYERS - 1) * grads(k);
      cr_assert_float_eq((double)saved(k, sharing), (double)(room < most ? room : most), ROUNDING);
    }
  }
}

/* Nobody writes the gaps before matrices that begin at multiples of 64 elements, and the norm reads
 * them: they stay zero only in memory of their own. */
Test(layout, gradients_with_gaps_lie_for_themselves) {
  kind k = {.recompute = MOE_RECOMPUTE_NONE, .seq = 256, .ffn = 21, .micro_batches = 1};
  trained t;
  cr_assert_float_eq((double)saved(k, 0), 0.0, ROUNDING);
  open_model(&t, k);
  const moe_block *b = t.m->blocks;
  cr_assert_gt((char *)b[1].g.w13.data, (char *)b[0].g.w2.data + moe_tensor_bytes(b[0].g.w2));
  close_model(&t);
}

Test(layout, the_last_layer_that_shares_a_buffer_need_not_recompute) {
  kind k = {.seq = 16, .ffn = 64, .micro_batches = 1};
  for (k.recompute = MOE_RECOMPUTE_EXPERTS; k.recompute <= MOE_RECOMPUTE_BLOCK; k.recompute++) {
    for (k.layers = 0; k.layers <= LAYERS; k.layers++) {
      trained t;
      int64_t layers[MOE_RECOMPUTE_AUTO];
      open_model(&t, k);
      int64_t recomputing = k.layers == 0 || k.layers == LAYERS ? LAYERS - 1 : k.layers;
      moe_model_recompute(t.m, layers);
      cr_assert_eq(layers[k.recompute], recomputing);
      cr_assert_eq(layers[MOE_RECOMPUTE_SWIGLU], LAYERS - recomputing);
      cr_assert_eq(moe_model_recomputing(&config), recomputing);
      cr_assert_eq(t.m->blocks[recomputing].gu.data, t.m->blocks[0].gu.data);
      cr_assert_eq(t.m->blocks[recomputing].stash == t.m->blocks[0].stash,
                   k.recompute == MOE_RECOMPUTE_BLOCK);
      close_model(&t);
    }
  }
}
