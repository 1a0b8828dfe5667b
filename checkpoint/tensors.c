/* A checkpoint's tensors, streamed.
 *
 * Readers stand where the last request for their tensor ended, so that the next one goes on there.
 * There are as many as tensors may be in reading at a time; a request takes the one that stands
 * nearest before its beginning, or one of another tensor that was left alone for longest. */
#include "checkpoint/tensors.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/shard.h"
#include "checkpoint/verify.h"

/* A shard that is open: it stays so until its place is needed and nobody reads it. */
typedef struct {
  moe_hdf5 file;
  int held;    /* the shard's number + 1; 0: the place is empty */
  int readers; /* in the middle of one of its slices */
} place;

/* Somewhere in a tensor. */
typedef struct {
  int64_t first, end; /* its slices; first < 0: in none */
  int64_t at;         /* elements of the tensor that were read */
  int64_t slice;      /* the one being read */
  int64_t done;       /* elements of that slice that were read */
  bool open;          /* in its middle: dataset and place are its */
  moe_dataset dataset;
  place *place;
  XXH3_state_t *hash;
  bool busy;    /* some thread reads */
  int64_t turn; /* when it was last taken */
} reader;

struct moe_tensors {
  char folder[MOE_PATH];
  moe_manifest manifest;
  place place[MOE_TENSORS_READ];
  reader reader[MOE_TENSORS_READ];
  int64_t turns;
};

/* Of the places and readers of all open checkpoints, and of HDF5. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

moe_status moe_tensors_open(const char *step_folder, moe_tensors **out) {
  *out = NULL;
  if (strlen(step_folder) >= MOE_PATH)
    return moe_fail(MOE_USAGE, "%.60s...: the path is too long", step_folder);
  moe_tensors *t = calloc(1, sizeof *t);
  if (!t) return moe_fail(MOE_NO_MEMORY, "%s: no memory to open it", step_folder);
  strcpy(t->folder, step_folder);
  for (int i = 0; i < MOE_TENSORS_READ; i++) t->reader[i].first = -1;
  moe_status status = moe_manifest_read(step_folder, &t->manifest);
  if (status == MOE_OK) status = moe_checkpoint_check_model(&t->manifest, step_folder);
  if (status == MOE_OK)
    *out = t;
  else
    moe_tensors_close(t);
  return status;
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

/* ---- shards */

/* The place of an open shard, or of one that may be closed for it. (A reader is in one at most, so
 * there is one.) */
static place *find_place(moe_tensors *t, int number) {
  place *found = NULL;
  for (place *p = t->place; p < t->place + MOE_TENSORS_READ; p++) {
    if (p->held == number + 1) return p;
    if (p->readers == 0 && (!found || found->held)) found = p;
  }
  return found;
}

static moe_status open_shard(moe_tensors *t, int number, place **out) {
  place *p = *out = find_place(t, number);
  if (p->held == number + 1) return MOE_OK;
  if (p->held) moe_hdf5_release(&p->file);
  p->held = 0;
  MOE_TRY(moe_shard_open(t->folder, &t->manifest, number, &p->file));
  p->held = number + 1;
  return MOE_OK;
}

/* ---- a reader */

static const moe_slice *slice_of(const moe_tensors *t, const reader *r) {
  return &t->manifest.slice[r->slice];
}

static moe_status enter_slice(moe_tensors *t, reader *r) {
  const moe_slice *s = slice_of(t, r);
  pthread_mutex_lock(&lock);
  moe_status status = open_shard(t, s->file, &r->place);
  if (status == MOE_OK) status = moe_dataset_open(&r->place->file, s, &r->dataset);
  r->open = status == MOE_OK;
  if (r->open) r->place->readers++;
  pthread_mutex_unlock(&lock);
  XXH3_128bits_reset(r->hash);
  r->done = 0;
  return status;
}

static void leave_slice(reader *r) {
  if (!r->open) return;
  pthread_mutex_lock(&lock);
  moe_dataset_close(&r->dataset);
  r->place->readers--;
  pthread_mutex_unlock(&lock);
  r->open = false;
}

static moe_status end_slice(const moe_tensors *t, reader *r) {
  moe_status status =
      moe_shard_compare_hash(&r->place->file, slice_of(t, r), XXH3_128bits_digest(r->hash));
  leave_slice(r);
  r->slice++;
  return status;
}

static void stop_reading(reader *r) {
  leave_slice(r);
  r->first = -1;
}

static moe_status start_reading(const moe_tensors *t, reader *r, int64_t first) {
  stop_reading(r);
  if (!r->hash) r->hash = XXH3_createState();
  if (!r->hash) return moe_fail(MOE_NO_MEMORY, "%s: no memory for a hash", t->folder);
  r->first = r->slice = first;
  r->end = moe_tensors_end(t, first);
  r->at = 0;
  return MOE_OK;
}

/* The next `count` elements. */
static moe_status read_next(moe_tensors *t, reader *r, int64_t count, void *out) {
  for (char *to = out; count > 0;) {
    if (r->slice >= r->end)
      return moe_fail(MOE_INVALID, "%s: read beyond a tensor's end", t->folder);
    if (!r->open) MOE_TRY(enter_slice(t, r));
    const moe_slice *s = slice_of(t, r);
    int64_t n = s->count - r->done < count ? s->count - r->done : count;
    int64_t bytes = n * moe_dtype_size(s->dtype);
    MOE_TRY(moe_dataset_read(&r->dataset, r->done, n, to));
    XXH3_128bits_update(r->hash, to, (size_t)bytes);
    to += bytes;
    count -= n;
    r->at += n;
    r->done += n;
    if (r->done == s->count) MOE_TRY(end_slice(t, r));
  }
  return MOE_OK;
}

/* On to element `begin`: what lies before it is hashed, too. */
static moe_status skip_to(moe_tensors *t, reader *r, int64_t begin) {
  double room[4096]; /* elements of any type */
  while (r->at < begin) {
    int64_t n = begin - r->at < 4096 ? begin - r->at : 4096;
    MOE_TRY(read_next(t, r, n, room));
  }
  return MOE_OK;
}

/* ---- all readers */

/* Which of two rather begins to read at element `begin` of tensor `first`. */
static bool is_better(const reader *a, const reader *b, int64_t first, int64_t begin) {
  bool fits_a = a->first == first && a->at <= begin, fits_b = b->first == first && b->at <= begin;
  if (fits_a != fits_b) return fits_a;
  return fits_a ? a->at > b->at : a->turn < b->turn;
}

static reader *take(moe_tensors *t, int64_t first, int64_t begin) {
  reader *best = NULL;
  pthread_mutex_lock(&lock);
  for (reader *r = t->reader; r < t->reader + MOE_TENSORS_READ; r++)
    if (!r->busy && (!best || is_better(r, best, first, begin))) best = r;
  if (best) {
    best->busy = true;
    best->turn = ++t->turns;
  }
  pthread_mutex_unlock(&lock);
  return best;
}

static void give_back(reader *r) {
  pthread_mutex_lock(&lock);
  r->busy = false;
  pthread_mutex_unlock(&lock);
}

moe_status moe_tensors_read(moe_tensors *t, int64_t first, int64_t begin, int64_t count,
                            void *out) {
  reader *r = take(t, first, begin);
  if (!r) return moe_fail(MOE_INVALID, "%s: too many threads read it", t->folder);
  moe_status status = MOE_OK;
  if (r->first != first || r->at > begin) status = start_reading(t, r, first);
  if (status == MOE_OK) status = skip_to(t, r, begin);
  if (status == MOE_OK) status = read_next(t, r, count, out);
  if (status != MOE_OK || r->slice == r->end) stop_reading(r);
  give_back(r);
  return status;
}

void moe_tensors_close(moe_tensors *t) {
  if (!t) return;
  for (int i = 0; i < MOE_TENSORS_READ; i++) {
    stop_reading(&t->reader[i]);
    XXH3_freeState(t->reader[i].hash);
  }
  for (int i = 0; i < MOE_TENSORS_READ; i++)
    if (t->place[i].held) moe_hdf5_release(&t->place[i].file);
  moe_manifest_clear(&t->manifest);
  free(t);
}
