/* A checkpoint's tensors, streamed. */
#include "checkpoint/tensors.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/verify.h"

/* A shard that is open: it stays so until its place is needed and nobody reads it. */
typedef struct {
  moe_hdf5 file;
  int held;    /* the shard's number + 1; 0: the place is empty */
  int readers; /* in the middle of one of its slices */
} place;

struct moe_tensors {
  char folder[MOE_PATH];
  moe_manifest manifest;
  place place[MOE_TENSOR_READERS];
};

/* Of the places of all open checkpoints, and of HDF5. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

moe_status moe_tensors_open(const char *step_folder, moe_tensors **out) {
  *out = NULL;
  if (strlen(step_folder) >= MOE_PATH)
    return moe_fail(MOE_USAGE, "%.60s...: the path is too long", step_folder);
  moe_tensors *t = calloc(1, sizeof *t);
  if (!t) return moe_fail(MOE_NO_MEMORY, "%s: no memory to open it", step_folder);
  strcpy(t->folder, step_folder);
  moe_status status = moe_manifest_read(step_folder, &t->manifest);
  if (status == MOE_OK) status = moe_checkpoint_check_model(&t->manifest, step_folder);
  if (status == MOE_OK)
    *out = t;
  else
    moe_tensors_close(t);
  return status;
}

void moe_tensors_close(moe_tensors *t) {
  if (!t) return;
  for (int i = 0; i < MOE_TENSOR_READERS; i++)
    if (t->place[i].held) moe_hdf5_release(&t->place[i].file);
  moe_manifest_clear(&t->manifest);
  free(t);
}

const moe_manifest *moe_tensors_manifest(const moe_tensors *t) {
  return &t->manifest;
}

int64_t moe_tensors_end(const moe_tensors *t, int64_t first) {
  const moe_manifest *m = &t->manifest;
  int64_t end = first + 1;
  while (end < m->slices && m->slice[end].role == m->slice[first].role &&
         strcmp(m->slice[end].name, m->slice[first].name) == 0)
    end++;
  return end;
}

/* The place of an open shard, or of one that may be closed for it; -1: all are in use. */
static int find_place(const moe_tensors *t, int number) {
  int found = -1;
  for (int i = 0; i < MOE_TENSOR_READERS; i++) {
    if (t->place[i].held == number + 1) return i;
    if (t->place[i].readers == 0 && (found < 0 || t->place[found].held)) found = i;
  }
  return found;
}

static moe_status open_shard(moe_tensors *t, int number, int *out) {
  int i = *out = find_place(t, number);
  if (i < 0) return moe_fail(MOE_INVALID, "%s: too many readers at a time", t->folder);
  place *p = &t->place[i];
  if (p->held == number + 1) return MOE_OK;
  if (p->held) moe_hdf5_release(&p->file);
  p->held = 0;
  MOE_TRY(moe_shard_open(t->folder, &t->manifest, number, &p->file));
  p->held = number + 1;
  return MOE_OK;
}

/* ---- a reader */

static const moe_slice *slice_of(const moe_tensor_reader *r) {
  return &r->from->manifest.slice[r->slice];
}

moe_status moe_tensor_reader_open(moe_tensors *t, int64_t first, moe_tensor_reader *out) {
  *out = (moe_tensor_reader){.from = t, .slice = first, .end = moe_tensors_end(t, first)};
  out->hash = XXH3_createState();
  return out->hash ? MOE_OK : moe_fail(MOE_NO_MEMORY, "%s: no memory for a hash", t->folder);
}

static void leave_slice(moe_tensor_reader *r) {
  if (!r->open) return;
  pthread_mutex_lock(&lock);
  moe_dataset_close(&r->dataset);
  r->from->place[r->place].readers--;
  pthread_mutex_unlock(&lock);
  r->open = false;
}

void moe_tensor_reader_close(moe_tensor_reader *r) {
  leave_slice(r);
  XXH3_freeState(r->hash);
  r->hash = NULL;
}

static moe_status enter_slice(moe_tensor_reader *r) {
  moe_tensors *t = r->from;
  pthread_mutex_lock(&lock);
  moe_status status = open_shard(t, slice_of(r)->file, &r->place);
  if (status == MOE_OK)
    status = moe_dataset_open(&t->place[r->place].file, slice_of(r), &r->dataset);
  r->open = status == MOE_OK;
  if (r->open) t->place[r->place].readers++;
  pthread_mutex_unlock(&lock);
  XXH3_128bits_reset(r->hash);
  r->done = 0;
  return status;
}

static moe_status end_slice(moe_tensor_reader *r) {
  const moe_slice *s = slice_of(r);
  moe_status status =
      moe_shard_compare_hash(&r->from->place[r->place].file, s, XXH3_128bits_digest(r->hash));
  leave_slice(r);
  r->slice++;
  return status;
}

moe_status moe_tensor_reader_next(moe_tensor_reader *r, int64_t count, void *out) {
  for (char *to = out; count > 0;) {
    if (r->slice >= r->end)
      return moe_fail(MOE_INVALID, "%s: read beyond a tensor's end", r->from->folder);
    if (!r->open) MOE_TRY(enter_slice(r));
    const moe_slice *s = slice_of(r);
    int64_t n = s->count - r->done < count ? s->count - r->done : count;
    int64_t bytes = n * moe_dtype_size(s->dtype);
    MOE_TRY(moe_dataset_read(&r->dataset, r->done, n, to));
    XXH3_128bits_update(r->hash, to, (size_t)bytes);
    to += bytes;
    count -= n;
    r->done += n;
    if (r->done == s->count) MOE_TRY(end_slice(r));
  }
  return MOE_OK;
}
