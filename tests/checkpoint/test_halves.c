/* Masters kept in halves: whole in files, however they are saved, and in halves again when loaded.
 */
#include <math.h>

#include "checkpoint/saver.h"
#include "tests/checkpoint/fixture.h"

TestSuite(halves, .init = open_world, .fini = close_world);

enum {
  MIB = 1 << 20,
  COUNT = 700001 /* several of the parts that are written at a time, and more */
};

/* Any finite float but a tie, which halves do not hold. */
static float value(int64_t i) {
  uint32_t bits = (uint32_t)sample_mix((uint64_t)i);
  if ((bits & 0x7f800000u) == 0x7f800000u) bits &= 0xbfffffffu;
  if ((bits & 0xffffu) == 0x8000u) bits ^= 1u;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static moe_piece piece_of(moe_role role, moe_dtype dtype, int64_t begin, int64_t count) {
  moe_piece p = {.name = "w", .role = role, .dtype = dtype, .dims = 1, .shape = {COUNT, 1}};
  p.begin = begin;
  p.count = count;
  p.data = calloc((size_t)count, (size_t)moe_dtype_size(dtype));
  return p;
}

static moe_piece in_halves(int64_t begin, int64_t count) {
  moe_piece p = piece_of(MOE_ROLE_MASTER, MOE_F32, begin, count);
  p.low = calloc((size_t)count, 2);
  return p;
}

static void release(moe_piece *p) {
  free(p->data);
  free(p->low);
}

static void expect_whole(const moe_piece *p) {
  float *joined = malloc((size_t)p->count * sizeof *joined);
  moe_join_halves(p->data, p->low, joined, p->count);
  for (int64_t i = 0; i < p->count; i++)
    cr_assert(joined[i] == value(p->begin + i), "element %lld is %a, not %a", (long long)i,
              (double)joined[i], (double)value(p->begin + i));
  free(joined);
}

static void save(moe_piece *p, int64_t memory) {
  moe_run_state state = sample_state(1);
  moe_saver *saver;
  moe_saved saved;
  EXPECT_OK(moe_saver_create(world, dev, run, (moe_keep){.newest = 2}, memory, &saver));
  EXPECT_OK(moe_saver_begin(saver, &state, p, 1));
  if (memory > 0 && p->low) memset(p->low, 0x55, 2 * COUNT); /* training goes on */
  EXPECT_OK(moe_saver_poll(saver, true, &saved));
  cr_assert(saved.status == MOE_OK, "%s", saved.message);
  moe_saver_destroy(saver);
}

static void load(moe_piece *p) {
  EXPECT_OK(moe_checkpoint_load(world, dev, in_step(1, ""), p, 1, true));
}

static moe_piece filled_halves(void) {
  moe_piece p = in_halves(0, COUNT);
  for (int64_t i = 0; i < COUNT; i++) {
    float f = value(i);
    moe_convert(&f, MOE_F32, (uint16_t *)p.data + i, MOE_BF16, 1);
    moe_convert(&f, MOE_F32, (uint16_t *)p.low + i, MOE_LOW16, 1);
  }
  return p;
}

Test(halves, are_whole_in_files_whatever_memory_a_save_has) {
  static const int64_t memory[] = {0, MIB, 16 * MIB}; /* none, less than they need, more */
  for (int i = 0; i < 3; i++) {
    moe_piece saved = filled_halves(), got = piece_of(MOE_ROLE_MASTER, MOE_F32, 0, COUNT);
    save(&saved, memory[i]);
    load(&got);
    for (int64_t k = 0; k < COUNT; k++)
      cr_assert(((float *)got.data)[k] == value(k), "%lld bytes: element %lld",
                (long long)memory[i], (long long)k);
    release(&saved);
    release(&got);
    SHELL("rm -r %s/checkpoints", run);
  }
}

Test(halves, are_filled_both_from_masters_of_any_range) {
  moe_piece saved = filled_halves();
  save(&saved, 0);
  const int64_t ranges[][2] = {{0, COUNT}, {0, 1}, {262143, 3}, {COUNT - 5, 5}, {1, 300000}};
  for (int i = 0; i < 5; i++) {
    moe_piece got = in_halves(ranges[i][0], ranges[i][1]);
    load(&got);
    expect_whole(&got);
    release(&got);
  }
  release(&saved);
}

Test(halves, of_a_checkpoint_without_masters_are_its_weights) {
  static const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};
  for (int i = 0; i < 3; i++) {
    moe_piece saved = piece_of(MOE_ROLE_PARAM, types[i], 0, COUNT), got = in_halves(0, COUNT);
    for (int64_t k = 0; k < COUNT; k++) {
      float f = (float)(k % 2047 - 1023) / 1024.0f; /* fp16 has it, bf16 has some */
      moe_convert(&f, MOE_F32, (char *)saved.data + k * moe_dtype_size(types[i]), types[i], 1);
    }
    save(&saved, 0);
    load(&got);
    float joined, wanted;
    for (int64_t k = 0; k < COUNT; k++) {
      moe_join_halves((uint16_t *)got.data + k, (uint16_t *)got.low + k, &joined, 1);
      moe_convert((char *)saved.data + k * moe_dtype_size(types[i]), types[i], &wanted, MOE_F32, 1);
      uint32_t bits;
      memcpy(&bits, &wanted, sizeof bits);
      if ((bits & 0x1ffffu) == 0x8000u) wanted = nextafterf(wanted, 0.0f); /* a tie gives a bit */
      cr_assert(joined == wanted, "%s: element %lld is %a, not %a", moe_dtype_name(types[i]),
                (long long)k, (double)joined, (double)wanted);
    }
    release(&saved);
    release(&got);
    SHELL("rm -r %s/checkpoints", run);
  }
}

/* Two roundings, to fp16 and then to bf16, would not always give what one does: on ranks that keep
 * no master of a weight it would not be the weight of the rank that does. */
Test(halves, weights_of_another_type_are_the_master_rounded_once) {
  moe_piece param = piece_of(MOE_ROLE_PARAM, MOE_F16, 0, COUNT);
  moe_piece master = piece_of(MOE_ROLE_MASTER, MOE_F32, 0, COUNT);
  moe_piece weights = piece_of(MOE_ROLE_PARAM, MOE_BF16, 0, COUNT), halves = in_halves(0, COUNT);
  moe_run_state state = sample_state(1);
  int64_t twice = 0;
  for (int64_t i = 0; i < COUNT; i++)
    ((float *)master.data)[i] = 1.0f + (float)(i % 65536) * 0x1p-16f + 0x1p-20f;
  moe_convert(master.data, MOE_F32, param.data, MOE_F16, COUNT);
  EXPECT_OK(
      moe_checkpoint_save(world, dev, run, &state, (moe_piece[]){param, master}, 2, 2, NULL, NULL));
  load(&weights);
  load(&halves);
  cr_expect(memcmp(weights.data, halves.data, 2 * COUNT) == 0);
  for (int64_t i = 0; i < COUNT; i++) {
    float half = moe_f16_to_f32(((uint16_t *)param.data)[i]);
    twice += ((uint16_t *)weights.data)[i] != moe_f32_to_bf16(half);
    cr_assert(((uint16_t *)weights.data)[i] == moe_f32_to_bf16(((float *)master.data)[i]));
  }
  cr_expect(twice > 0, "the values tell one rounding from two");
  release(&param);
  release(&master);
  release(&weights);
  release(&halves);
}
