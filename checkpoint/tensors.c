/* A checkpoint's tensors, streamed. */
#include "checkpoint/tensors.h"

#include <stdlib.h>
#include <string.h>

#include "checkpoint/verify.h"

enum { OPEN_SHARDS = 64 }; /* shard i is kept in place i modulo this */

struct moe_tensors {
  char folder[MOE_PATH];
  moe_manifest manifest;
  moe_hdf5 file[OPEN_SHARDS];
  int held[OPEN_SHARDS]; /* the shard's number + 1 */
};

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
  for (int i = 0; i < OPEN_SHARDS; i++)
    if (t->held[i]) moe_hdf5_release(&t->file[i]);
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

/* The shard stays open until another one needs its place. */
static moe_status open_shard(moe_tensors *t, int number, moe_hdf5 **out) {
  int place = number % OPEN_SHARDS;
  *out = &t->file[place];
  if (t->held[place] == number + 1) return MOE_OK;
  if (t->held[place]) moe_hdf5_release(&t->file[place]);
  t->held[place] = 0;
  MOE_TRY(moe_shard_open(t->folder, &t->manifest, number, &t->file[place]));
  t->held[place] = number + 1;
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
  moe_dataset_close(&r->dataset);
  r->open = false;
}

void moe_tensor_reader_close(moe_tensor_reader *r) {
  leave_slice(r);
  XXH3_freeState(r->hash);
  r->hash = NULL;
}

static moe_status enter_slice(moe_tensor_reader *r) {
  moe_hdf5 *file;
  MOE_TRY(open_shard(r->from, slice_of(r)->file, &file));
  MOE_TRY(moe_dataset_open(file, slice_of(r), &r->dataset));
  XXH3_128bits_reset(r->hash);
  r->open = true;
  r->done = 0;
  return MOE_OK;
}

static moe_status end_slice(moe_tensor_reader *r) {
  const moe_slice *s = slice_of(r);
  moe_status status = moe_shard_compare_hash(&r->from->file[s->file % OPEN_SHARDS], s,
                                             XXH3_128bits_digest(r->hash));
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
