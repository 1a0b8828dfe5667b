/* Shards: every byte of a file is under some hash.
 *
 * Dataset bytes are hashed in memory before they are written; all other bytes, HDF5's metadata and
 * padding, after the file is closed. So a flipped bit anywhere is found, and the metadata is known
 * to be ours before HDF5 parses it. */
#include "checkpoint/shard.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/crew.h"
#include "checkpoint/files.h"

/* ---- hashing the bytes between datasets
 * ---------------------------------------------------------- */

static moe_status hash_range(const moe_hdf5 *f, int64_t at, int64_t end, XXH3_state_t *hash) {
  char buffer[16 << 10];
  while (at < end) {
    int64_t n = end - at < (int64_t)sizeof buffer ? end - at : (int64_t)sizeof buffer;
    MOE_TRY(moe_files_read_at(f->fd, f->path, at, n, buffer));
    XXH3_128bits_update(hash, buffer, (size_t)n);
    at += n;
  }
  return MOE_OK;
}

/* Hash all bytes of the file that lie in none of the slices, which are in ascending order. */
static moe_status hash_metadata(const moe_hdf5 *f, int64_t size, const moe_slice *const *slices,
                                int64_t n, XXH128_hash_t *out) {
  XXH3_state_t *hash = XXH3_createState();
  if (!hash) return moe_fail(MOE_NO_MEMORY, "no memory for a hash");
  XXH3_128bits_reset(hash);
  moe_status status = MOE_OK;
  int64_t at = 0;
  for (int64_t i = 0; i < n && status == MOE_OK; i++) {
    status = hash_range(f, at, slices[i]->offset, hash);
    at = slices[i]->offset + moe_slice_bytes(slices[i]);
  }
  if (status == MOE_OK) status = hash_range(f, at, size, hash);
  *out = XXH3_128bits_digest(hash);
  XXH3_freeState(hash);
  return status;
}

/* ---- write
 * --------------------------------------------------------------------------------------- */

/* What a thread writes with. */
typedef struct {
  void *staging; /* a part in host memory, with dev or for pieces that fetch */
  float *joined; /* a part, for pieces in halves */
  XXH3_state_t *hash;
} hand;

typedef struct {
  moe_hdf5 file;
  moe_device *dev;         /* NULL: pieces are in host memory */
  const moe_piece **piece; /* [n]: those with elements */
  moe_dataset *dataset;    /* [n] */
  moe_slice *slice;        /* [n] */
  int64_t n, made;         /* of them, open datasets */
  hand hand[MOE_CREW_MOST];
  int hands;
  int64_t begun; /* bytes of the file that are on their way to the disk, with one hand */
} writer;

/* Memory of the device as the host sees it: copied to `room`, if need be. */
static moe_status look(writer *w, const void *data, int64_t bytes, void *room, const void **out) {
  *out = w->dev ? room : data;
  if (!w->dev) return MOE_OK;
  MOE_TRY(moe_device_download(w->dev, room, data, bytes));
  return moe_device_sync(w->dev);
}

/* Elements [at, at + n) of a piece, on the host. */
static moe_status fetch(writer *w, hand *h, const moe_piece *p, int64_t at, int64_t n,
                        const void **out) {
  int64_t size = moe_dtype_size(p->low ? MOE_BF16 : p->dtype), bytes = n * size;
  char *staging = h->staging;
  const void *low = staging + bytes;
  *out = staging;
  if (p->fetch)
    MOE_TRY(p->fetch(p->context, p, at, n, staging));
  else
    MOE_TRY(look(w, (const char *)p->data + at * size, bytes, staging, out));
  if (!p->low) return MOE_OK;
  if (!p->fetch) MOE_TRY(look(w, (const char *)p->low + at * size, bytes, staging + bytes, &low));
  moe_join_halves(*out, low, h->joined, n);
  *out = h->joined;
  return MOE_OK;
}

/* Hands that share a file hand over to the disk each part by itself: what lies between may not be
 * written yet. */
static moe_status put(writer *w, const moe_dataset *d, int64_t at, int64_t n, const void *data) {
  int64_t place = d->offset + at * d->size, bytes = n * d->size;
  if (w->hands > 1) return moe_files_write_part(d->fd, d->path, place, bytes, data);
  MOE_TRY(moe_dataset_write(d, at, n, data));
  moe_files_sync_soon(d->fd, place + bytes, &w->begun);
  return MOE_OK;
}

static moe_status write_data(void *context, int worker, int64_t i) {
  writer *w = context;
  hand *h = &w->hand[worker];
  const moe_piece *p = w->piece[i];
  int64_t step = moe_shard_step(p);
  XXH3_128bits_reset(h->hash);
  for (int64_t at = 0; at < p->count; at += step) {
    int64_t n = p->count - at < step ? p->count - at : step;
    const void *data = NULL;
    MOE_TRY(fetch(w, h, p, at, n, &data));
    XXH3_128bits_update(h->hash, data, (size_t)(n * moe_dtype_size(p->dtype)));
    MOE_TRY(put(w, &w->dataset[i], at, n, data));
  }
  w->slice[i].hash = XXH3_128bits_digest(h->hash);
  return MOE_OK;
}

static moe_status make_dataset(writer *w, const moe_piece *p) {
  moe_slice *s = &w->slice[w->made];
  *s = (moe_slice){.role = p->role, .dtype = p->dtype, .dims = p->dims};
  memcpy(s->name, p->name, sizeof s->name);
  s->shape[0] = p->shape[0];
  s->shape[1] = p->dims == 2 ? p->shape[1] : 1;
  s->begin = p->begin;
  s->count = p->count;
  if (moe_slice_total(s) < 0 || s->begin < 0 || s->count > moe_slice_total(s) - s->begin ||
      strnlen(s->name, sizeof s->name) == sizeof s->name)
    return moe_fail(MOE_INVALID, "piece %.95s: its name, shape or range is impossible", s->name);
  MOE_TRY(moe_dataset_create(&w->file, s, &w->dataset[w->made]));
  w->made++;
  return MOE_OK;
}

/* Also when something failed. */
static moe_status close_datasets(writer *w, moe_status status) {
  for (int64_t i = 0; i < w->made; i++) {
    if (status == MOE_OK) status = moe_dataset_describe(&w->dataset[i], &w->slice[i]);
    moe_status closed = moe_dataset_close(&w->dataset[i]);
    if (status == MOE_OK) status = closed;
  }
  w->made = 0;
  return status;
}

/* First the places of all data, which HDF5 alone gives, then the data, which nobody need wait for
 * another to write, then what is known only then: its hashes. */
static moe_status write_pieces(writer *w) {
  moe_status status = MOE_OK;
  for (int64_t i = 0; i < w->n && status == MOE_OK; i++) status = make_dataset(w, w->piece[i]);
  if (status == MOE_OK) status = moe_crew_work(w->hands, w->n, write_data, w);
  return close_datasets(w, status);
}

static int by_offset(const void *a, const void *b) {
  int64_t x = (*(const moe_slice *const *)a)->offset, y = (*(const moe_slice *const *)b)->offset;
  return (x > y) - (x < y);
}

/* Close the file in HDF5, hash the rest of it, and bring it to the disk. */
static moe_status seal(writer *w, const moe_slice *slices, int64_t n, moe_shard_file *file) {
  MOE_TRY(moe_hdf5_close(&w->file));
  file->size = lseek(w->file.fd, 0, SEEK_END);
  const moe_slice **order = calloc((size_t)n + 1, sizeof *order);
  if (!order) return moe_fail(MOE_NO_MEMORY, "no memory for %" PRId64 " slices", n);
  for (int64_t i = 0; i < n; i++) order[i] = &slices[i];
  qsort(order, (size_t)n, sizeof *order, by_offset);
  moe_status status = hash_metadata(&w->file, file->size, order, n, &file->metadata);
  free(order);
  if (status == MOE_OK && fsync(w->file.fd) != 0)
    status = moe_fail(MOE_IO, "%s: cannot fsync: %s", w->file.path, strerror(errno));
  return status;
}

/* The pieces with elements, and hands with what such pieces need. */
static moe_status prepare(writer *w, const char *path, const moe_piece *pieces, int n) {
  bool staged = w->dev != NULL, halves = false, any_thread = true, all = true;
  w->piece = calloc((size_t)n + 1, sizeof(moe_piece *));
  w->dataset = calloc((size_t)n + 1, sizeof *w->dataset);
  if (!w->piece || !w->dataset) return moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path);
  for (int i = 0; i < n; i++) {
    if (pieces[i].count == 0) continue;
    w->piece[w->n++] = &pieces[i];
    staged = staged || pieces[i].fetch;
    halves = halves || pieces[i].low;
    any_thread = any_thread && pieces[i].any_thread;
  }
  w->hands = any_thread && w->n > 0 ? moe_crew_cores() : 1;
  for (hand *h = w->hand; h < w->hand + w->hands; h++) {
    h->hash = XXH3_createState();
    if (staged)
      h->staging = w->dev ? moe_device_alloc_host(w->dev, MOE_SHARD_PART) : malloc(MOE_SHARD_PART);
    if (halves) h->joined = malloc(MOE_SHARD_PART);
    all = all && h->hash && (!staged || h->staging) && (!halves || h->joined);
  }
  return all ? MOE_OK : moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path);
}

static void release(writer *w) {
  moe_hdf5_release(&w->file);
  for (hand *h = w->hand; h < w->hand + w->hands; h++) {
    if (w->dev && h->staging)
      moe_device_free_host(w->dev, h->staging);
    else
      free(h->staging);
    free(h->joined);
    XXH3_freeState(h->hash);
  }
  free(w->piece);
  free(w->dataset);
}

moe_status moe_shard_write(const char *path, moe_device *dev, const moe_piece *pieces, int n,
                           moe_slice *slices, int64_t *written, moe_shard_file *file) {
  writer w = {.file = {.id = -1, .fd = -1}, .slice = slices};
  moe_status status;
  int64_t room = 0;
  *written = 0;
  if (dev && !moe_device_is_host(dev)) w.dev = dev;
  MOE_TRY_OR(status, done, prepare(&w, path, pieces, n));
  for (int64_t i = 0; i < w.n; i++) room += w.piece[i]->count * moe_dtype_size(w.piece[i]->dtype);
  MOE_TRY_OR(status, done, moe_hdf5_create(path, room, &w.file));
  MOE_TRY_OR(status, done, write_pieces(&w));
  *written = w.n;
  status = seal(&w, slices, w.n, file);
done:
  release(&w);
  return status;
}

/* ---- check
 * --------------------------------------------------------------------------------------- */

static moe_status check_bytes(const moe_hdf5 *f, const moe_manifest *m, int i, int64_t size) {
  const moe_shard_file *file = &m->file[i];
  if (size != file->size)
    return moe_fail(MOE_DAMAGED, "%s: has %" PRId64 " bytes, the manifest says %" PRId64, f->path,
                    size, file->size);
  XXH128_hash_t hash;
  MOE_TRY(hash_metadata(f, size, m->by_offset + m->first[i], m->first[i + 1] - m->first[i], &hash));
  if (!XXH128_isEqual(hash, file->metadata))
    return moe_fail(MOE_DAMAGED, "%s: its metadata does not have the hash in the manifest",
                    f->path);
  return MOE_OK;
}

moe_status moe_shard_open(const char *dir, const moe_manifest *m, int i, moe_hdf5 *out) {
  *out = (moe_hdf5){.id = -1, .fd = -1};
  int64_t size;
  snprintf(out->path, sizeof out->path, "%s/%s", dir, m->file[i].name);
  MOE_TRY(moe_files_open(out->path, &out->fd, &size));
  moe_status status = check_bytes(out, m, i, size);
  if (status == MOE_OK) status = moe_hdf5_open(out);
  if (status != MOE_OK) moe_hdf5_release(out);
  return status;
}

moe_status moe_shard_compare_hash(const moe_hdf5 *f, const moe_slice *s, XXH128_hash_t got) {
  char path[MOE_DATASET_PATH];
  if (XXH128_isEqual(got, s->hash)) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "%s: the data of %s does not have the hash in the manifest", f->path,
                  moe_slice_dataset(s, path));
}

/* ---- all of a file
 * --------------------------------------------------------------------------------------- */

/* Read one slice of an open file and check its hash. buffer: MOE_SHARD_PART bytes; both are work
 * space. */
static moe_status check_data(const moe_hdf5 *f, const moe_slice *s, void *buffer,
                             XXH3_state_t *hash) {
  int64_t end = s->offset + moe_slice_bytes(s);
  XXH3_128bits_reset(hash);
  for (int64_t at = s->offset; at < end; at += MOE_SHARD_PART) {
    int64_t n = end - at < MOE_SHARD_PART ? end - at : MOE_SHARD_PART;
    MOE_TRY(moe_files_read_at(f->fd, f->path, at, n, buffer));
    XXH3_128bits_update(hash, buffer, (size_t)n);
  }
  return moe_shard_compare_hash(f, s, XXH3_128bits_digest(hash));
}

typedef struct {
  const moe_hdf5 *file;
  const moe_slice *const *slice;
  void *buffer[MOE_CREW]; /* MOE_SHARD_PART bytes each, from a worker's first slice on */
  XXH3_state_t *hash[MOE_CREW];
} checking;

static moe_status check_slice(void *context, int worker, int64_t i) {
  checking *c = context;
  if (!c->buffer[worker]) c->buffer[worker] = malloc(MOE_SHARD_PART);
  if (!c->hash[worker]) c->hash[worker] = XXH3_createState();
  if (!c->buffer[worker] || !c->hash[worker])
    return moe_fail(MOE_NO_MEMORY, "%s: no memory to verify it", c->file->path);
  return check_data(c->file, c->slice[i], c->buffer[worker], c->hash[worker]);
}

/* The data of all slices of an open file. */
static moe_status check_all_data(const moe_hdf5 *f, const moe_slice *const *slice, int64_t n) {
  checking c = {.file = f, .slice = slice};
  moe_status status = moe_crew_work(MOE_CREW, n, check_slice, &c);
  for (int w = 0; w < MOE_CREW; w++) {
    free(c.buffer[w]);
    XXH3_freeState(c.hash[w]);
  }
  return status;
}

/* First what HDF5 says of each dataset, then the bytes that this was said of. */
moe_status moe_shard_verify(const char *dir, const moe_manifest *m, int i) {
  moe_hdf5 file;
  MOE_TRY(moe_shard_open(dir, m, i, &file));
  const moe_slice *const *slice = m->by_offset + m->first[i];
  int64_t n = m->first[i + 1] - m->first[i];
  moe_status status = MOE_OK;
  for (int64_t k = 0; k < n && status == MOE_OK; k++) {
    moe_dataset d;
    status = moe_dataset_open(&file, slice[k], &d);
    if (status == MOE_OK) moe_dataset_close(&d);
  }
  if (status == MOE_OK) status = check_all_data(&file, slice, n);
  moe_hdf5_release(&file);
  return status;
}
