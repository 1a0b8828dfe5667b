/* Damaged checkpoints: every flipped bit, every missing byte is refused, and the file named. */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/verify.h"
#include "tests/checkpoint/fixture.h"

TestSuite(damage, .init = open_world, .fini = close_world);

#define SHARD "shard-00000-of-00001.h5"
static const char *const files[] = {SHARD, "manifest.json"};

static int64_t size_of(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 ? st.st_size : -1;
}

static void flip(const char *path, int64_t at, int bit) {
  unsigned char byte;
  int fd = open(path, O_RDWR);
  cr_assert(fd >= 0 && pread(fd, &byte, 1, at) == 1);
  byte ^= (unsigned char)(1 << bit);
  cr_assert(pwrite(fd, &byte, 1, at) == 1);
  close(fd);
}

static void expect_refused(int64_t step, const char *file, const char *what) {
  moe_status status = moe_checkpoint_verify(world, in_step(step, ""));
  cr_assert(status == MOE_DAMAGED, "%s of %s: status %d", what, file, (int)status);
  EXPECT_SAYS(file);
}

Test(damage, every_flipped_bit_is_refused_and_its_file_named) {
  EXPECT_OK(save_sample(1, 2));
  for (int f = 0; f < 2; f++) {
    int64_t size = size_of(in_step(1, files[f]));
    for (int i = 0; i < 250; i++) {
      uint64_t key = sample_key(f, i, 99);
      int64_t at = (int64_t)(key % (uint64_t)size);
      char what[64];
      snprintf(what, sizeof what, "bit %d of byte %lld", (int)(key >> 60) % 8, (long long)at);
      flip(in_step(1, files[f]), at, (int)(key >> 60) % 8);
      expect_refused(1, files[f], what);
      flip(in_step(1, files[f]), at, (int)(key >> 60) % 8);
    }
  }
  EXPECT_OK(moe_checkpoint_verify(world, in_step(1, "")));
}

/* Several threads look for faults; what is said of them must not depend on who was quicker. */
Test(damage, of_several_faults_in_a_file_the_first_is_named) {
  EXPECT_OK(save_sample(1, 2));
  moe_manifest m;
  char first[MOE_DATASET_PATH + 32];
  EXPECT_OK(moe_manifest_read(in_step(1, ""), &m));
  for (int64_t k = 2; k < m.slices; k++)
    flip(in_step(1, SHARD), m.by_offset[k]->offset + moe_slice_bytes(m.by_offset[k]) / 2, 1);
  moe_slice_dataset(m.by_offset[2], first);
  strcat(first, " does not have the hash");
  for (int trial = 0; trial < 50; trial++) expect_refused(1, first, "the first of many");
  moe_manifest_clear(&m);
}

/* The first block is where HDF5 keeps most of its structure. */
Test(damage, every_byte_of_the_first_block_counts) {
  EXPECT_OK(save_sample(1, 2));
  for (int64_t at = 0; at < 4096; at += 13) {
    flip(in_step(1, SHARD), at, (int)(at % 8));
    expect_refused(1, SHARD, "a flip");
    flip(in_step(1, SHARD), at, (int)(at % 8));
  }
}

Test(damage, a_file_cut_anywhere_is_refused) {
  EXPECT_OK(save_sample(1, 2));
  for (int f = 0; f < 2; f++) {
    int64_t size = size_of(in_step(1, files[f]));
    SHELL("cp %s %s/whole", in_step(1, files[f]), run);
    for (int i = 0; i < 40; i++) {
      int64_t length = i < 38 ? size * i / 38 : i == 38 ? size - 1 : size + 1;
      cr_assert(truncate(in_step(1, files[f]), length) == 0);
      expect_refused(1, files[f], "a cut");
      SHELL("cp %s/whole %s", run, in_step(1, files[f]));
    }
  }
  EXPECT_OK(moe_checkpoint_verify(world, in_step(1, "")));
}

Test(damage, missing_files_and_what_is_no_file_are_refused) {
  EXPECT_OK(save_sample(1, 2));
  for (int f = 0; f < 2; f++) {
    char path[MOE_PATH];
    strcpy(path, in_step(1, files[f]));
    SHELL("mv %s %s/away", path, run);
    expect_refused(1, files[f], "the absence");
    EXPECT_SAYS("is missing");
    SHELL("ln -s %s/away %s", run, path);
    expect_refused(1, files[f], "a link");
    EXPECT_SAYS("symbolic link");
    SHELL("rm %s && mkfifo %s", path, path);
    expect_refused(1, files[f], "a pipe");
    EXPECT_SAYS("not a regular file");
    SHELL("rm %s && mv %s/away %s", path, run, path);
  }
  EXPECT_OK(moe_checkpoint_verify(world, in_step(1, "")));
}

Test(damage, resume_falls_back_to_the_newest_that_verifies) {
  for (int64_t step = 1; step <= 3; step++) EXPECT_OK(save_sample(step, 3));
  flip(in_step(3, SHARD), 70000, 3);
  cr_expect(resumed_step() == 2);
  cr_assert(unlink(in_step(2, SHARD)) == 0);
  cr_expect(resumed_step() == 1);
  char path[MOE_PATH];
  cr_expect(moe_checkpoint_find(world, run, in_step(3, ""), path) == MOE_DAMAGED,
            "asked for by name there is no falling back");
  EXPECT_SAYS(SHARD);
}

Test(damage, resume_refuses_to_start_anew_beside_invalid_checkpoints) {
  char path[MOE_PATH];
  EXPECT_OK(save_sample(1, 2));
  cr_assert(truncate(in_step(1, "manifest.json"), 100) == 0);
  cr_expect(moe_checkpoint_find(world, run, "auto", path) == MOE_DAMAGED);
  EXPECT_SAYS("none of its checkpoints is valid");
  EXPECT_SAYS("--resume none");
  cr_expect_str_empty(path);
}

Test(damage, loading_checks_metadata_always_and_data_when_asked) {
  EXPECT_OK(save_sample(1, 2));
  moe_piece p = sample_piece(MOE_ROLE_PARAM, 2, 0, sample_total(2));
  flip(in_step(1, SHARD), 5, 0);
  cr_expect(moe_checkpoint_load(world, dev, in_step(1, ""), &p, 1, false) == MOE_DAMAGED);
  EXPECT_SAYS("metadata");
  flip(in_step(1, SHARD), 5, 0);
  flip(in_step(1, SHARD), size_of(in_step(1, SHARD)) / 2, 0);
  int refused = 0;
  for (int t = 0; t < SAMPLE_TENSORS; t++)
    for (int role = 0; role < MOE_ROLES; role++) {
      moe_piece q = sample_piece(role, t, 0, sample_total(t) / 2);
      moe_status status = moe_checkpoint_load(world, dev, in_step(1, ""), &q, 1, true);
      if (status == MOE_DAMAGED) refused++;
      free(q.data);
    }
  cr_expect(refused >= 1, "the tensor with the flipped bit");
  free(p.data);
}
