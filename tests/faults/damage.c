/* Damages the newest checkpoint of a run, again and again, and sees each time that it is refused by
 * name and that resuming falls back to the one before.
 *
 *     fault_damage RUN data|metadata|torn|missing COUNT SEED
 *
 * RUN has two checkpoints or more. data flips a bit inside a dataset, metadata one outside of all
 * (HDF5's structure, or the manifest), torn cuts a file or fills its end with zeros, as a machine
 * that lost power leaves it; missing takes a file away. What was changed is put back. Prints a line
 * `violation: ...` for each promise that did not hold. */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/commit.h"
#include "checkpoint/verify.h"
#include "core/base/log.h"
#include "core/base/rng.h"

typedef struct {
  moe_comm *world;
  const char *run;
  char newest[MOE_PATH], before[MOE_PATH];
  moe_manifest manifest;
  uint64_t seed, draws;
} victim;

static void give_up(const char *what) {
  fprintf(stderr, "fault_damage: %s: %s\n", what, moe_error_message());
  exit(1);
}

static int64_t draw(victim *v, int64_t below) {
  return (int64_t)(moe_rng_uniform_f64(v->seed, 0, v->draws++) * (double)below);
}

static void path_of(const victim *v, int file, char path[MOE_PATH + 128]) {
  const char *name = file < 0 ? "manifest.json" : v->manifest.file[file].name;
  snprintf(path, MOE_PATH + 128, "%s/%s", v->newest, name);
}

static int64_t size_of(const char *path) {
  struct stat st;
  if (stat(path, &st) != 0) give_up(path);
  return st.st_size;
}

/* ---- one kind of damage each; `what` says what was done */

static void flip(const char *path, int64_t at, int bit) {
  unsigned char byte;
  int fd = open(path, O_RDWR);
  if (fd < 0 || pread(fd, &byte, 1, at) != 1) give_up(path);
  byte ^= (unsigned char)(1 << bit);
  if (pwrite(fd, &byte, 1, at) != 1) give_up(path);
  close(fd);
}

/* The slice of file `file` that holds byte `at`, or NULL. */
static const moe_slice *slice_at(const moe_manifest *m, int file, int64_t at) {
  for (int64_t i = 0; i < m->slices; i++) {
    const moe_slice *s = &m->slice[i];
    if (s->file == file && at >= s->offset && at < s->offset + moe_slice_bytes(s)) return s;
  }
  return NULL;
}

/* A file and a byte of it that is data, or is not. */
static int64_t pick_byte(victim *v, bool data, int *file, char path[MOE_PATH + 128]) {
  for (;;) {
    *file = (int)draw(v, v->manifest.files + !data) - !data; /* -1: the manifest */
    path_of(v, *file, path);
    int64_t at = draw(v, size_of(path));
    if (*file < 0 || (slice_at(&v->manifest, *file, at) != NULL) == data) return at;
  }
}

/* Cut a file, or let its end read as zeros, as after a crash of a machine. */
static void tear(const char *path, int64_t length, bool zeros) {
  int64_t size = size_of(path);
  if (truncate(path, length) != 0 || (zeros && truncate(path, size) != 0)) give_up(path);
}

/* ---- the promises */

static bool is_refused(victim *v, const char *file, const char *what) {
  char found[MOE_PATH];
  const char *name = strrchr(file, '/') + 1;
  moe_status status = moe_checkpoint_verify(v->world, v->newest);
  if (status != MOE_DAMAGED || !strstr(moe_error_message(), name)) {
    printf("violation: %s of %s: status %d, \"%s\"\n", what, name, (int)status,
           status == MOE_OK ? "" : moe_error_message());
    return false;
  }
  status = moe_checkpoint_find(v->world, v->run, "auto", found);
  if (status == MOE_OK && strcmp(found, v->before) == 0) return true;
  printf("violation: %s of %s: resumes from \"%s\"\n", what, name, found);
  return false;
}

static void trial(victim *v, const char *kind, int64_t i) {
  char path[MOE_PATH + 128], aside[MOE_PATH + 160], command[3 * MOE_PATH], what[128];
  int file;
  bool unchanged = false;
  bool data = strcmp(kind, "data") == 0;
  if (data || strcmp(kind, "metadata") == 0) {
    int64_t at = pick_byte(v, data, &file, path);
    int bit = (int)draw(v, 8);
    snprintf(what, sizeof what, "bit %d of byte %" PRId64, bit, at);
    flip(path, at, bit);
    is_refused(v, path, what);
    flip(path, at, bit);
    return;
  }
  file = (int)(i % (v->manifest.files + 1)) - 1;
  path_of(v, file, path);
  snprintf(aside, sizeof aside, "%s.aside", path);
  if (strcmp(kind, "torn") == 0) {
    int64_t length = draw(v, size_of(path));
    bool zeros = draw(v, 2);
    snprintf(what, sizeof what, "%s from byte %" PRId64, zeros ? "zeros" : "a cut", length);
    snprintf(command, sizeof command, "cp '%s' '%s'", path, aside);
    if (system(command) != 0) give_up(command);
    tear(path, length, zeros);
    snprintf(command, sizeof command, "cmp -s '%s' '%s'", path, aside);
    unchanged = system(command) == 0; /* it ended in zeros */
  } else {
    snprintf(what, sizeof what, "the absence");
    if (rename(path, aside) != 0) give_up(path);
  }
  if (!unchanged) is_refused(v, path, what);
  if (rename(aside, path) != 0) give_up(path);
}

static void open_victim(victim *v) {
  char folder[MOE_PATH];
  int64_t *steps, n;
  if (moe_comm_world(NULL, &v->world) != MOE_OK || moe_commit_folder(v->run, folder) != MOE_OK ||
      moe_commit_list(folder, &steps, &n) != MOE_OK || n < 2)
    give_up("no two checkpoints");
  moe_commit_place(folder, steps[0], v->newest);
  moe_commit_place(folder, steps[1], v->before);
  free(steps);
  if (moe_manifest_read(v->newest, &v->manifest) != MOE_OK) give_up("no manifest");
}

int main(int argc, char **argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: fault_damage RUN data|metadata|torn|missing COUNT SEED\n");
    return 2;
  }
  victim v = {.run = argv[1], .seed = strtoull(argv[4], NULL, 10)};
  moe_log_init("fault_damage", -1);
  if (moe_comm_init(&argc, &argv) != MOE_OK) give_up("MPI");
  open_victim(&v);
  for (int64_t i = 0; i < atoll(argv[3]); i++) trial(&v, argv[2], i);
  if (moe_checkpoint_verify(v.world, v.newest) != MOE_OK) give_up("put back, it is not whole");
  moe_manifest_clear(&v.manifest);
  moe_comm_destroy(v.world);
  moe_comm_finalize();
  return 0;
}
