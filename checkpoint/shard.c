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

#include "checkpoint/files.h"

/* ---- hashing the bytes between datasets
 * ---------------------------------------------------------- */

static moe_status hash_range(const moe_hdf5 *f, int64_t at, int64_t end, XXH3_state_t *hash) {
  char buffer[16 << 10];
  while (at < end) {
    int64_t want = end - at < (int64_t)sizeof buffer ? end - at : (int64_t)sizeof buffer;
    ssize_t n = pread(f->fd, buffer, (size_t)want, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return moe_fail(MOE_IO, "%s: cannot read: %s", f->path, strerror(errno));
    if (n == 0) return moe_fail(MOE_DAMAGED, "%s: shrank while it was read", f->path);
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

typedef struct {
  moe_hdf5 file;
  moe_device *dev; /* NULL: pieces are in host memory */
  void *staging;   /* MOE_SHARD_CHUNK bytes of host memory, with dev or for pieces that fetch */
  XXH3_state_t *hash;
} writer;

/* Elements [at, at + n) of a piece, on the host. */
static moe_status fetch(writer *w, const moe_piece *p, int64_t at, int64_t n, const void **out) {
  int64_t size = moe_dtype_size(p->dtype);
  *out = w->staging;
  if (p->fetch) return p->fetch(p->context, p, at, n, w->staging);
  const char *data = (const char *)p->data + at * size;
  if (w->dev) {
    MOE_TRY(moe_device_download(w->dev, w->staging, data, n * size));
    return moe_device_sync(w->dev);
  }
  *out = data;
  return MOE_OK;
}

static moe_status write_data(writer *w, const moe_piece *p, const moe_dataset *d,
                             XXH128_hash_t *hash) {
  int64_t size = moe_dtype_size(p->dtype), step = MOE_SHARD_CHUNK / size;
  XXH3_128bits_reset(w->hash);
  for (int64_t at = 0; at < p->count; at += step) {
    int64_t n = p->count - at < step ? p->count - at : step;
    const void *data = NULL;
    MOE_TRY(fetch(w, p, at, n, &data));
    XXH3_128bits_update(w->hash, data, (size_t)(n * size));
    MOE_TRY(moe_dataset_write(d, at, n, data));
  }
  *hash = XXH3_128bits_digest(w->hash);
  return MOE_OK;
}

static moe_status write_piece(writer *w, const moe_piece *p, moe_slice *s) {
  *s = (moe_slice){.role = p->role, .dtype = p->dtype, .dims = p->dims};
  memcpy(s->name, p->name, sizeof s->name);
  s->shape[0] = p->shape[0];
  s->shape[1] = p->dims == 2 ? p->shape[1] : 1;
  s->begin = p->begin;
  s->count = p->count;
  if (moe_slice_total(s) < 0 || s->begin < 0 || s->count > moe_slice_total(s) - s->begin ||
      strnlen(s->name, sizeof s->name) == sizeof s->name)
    return moe_fail(MOE_INVALID, "piece %.95s: its name, shape or range is impossible", s->name);
  moe_dataset d;
  MOE_TRY(moe_dataset_create(&w->file, s, &d));
  moe_status status = write_data(w, p, &d, &s->hash);
  if (status == MOE_OK) status = moe_dataset_describe(&d, s);
  moe_status closed = moe_dataset_close(&d);
  return status == MOE_OK ? closed : status;
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

moe_status moe_shard_write(const char *path, moe_device *dev, const moe_piece *pieces, int n,
                           moe_slice *slices, int64_t *written, moe_shard_file *file) {
  writer w = {.file = {.id = -1, .fd = -1}};
  moe_status status = MOE_OK;
  int64_t room = 0;
  *written = 0;
  if (dev && !moe_device_is_host(dev)) w.dev = dev;
  bool staged = w.dev != NULL;
  for (int i = 0; i < n; i++) {
    room += pieces[i].count * moe_dtype_size(pieces[i].dtype);
    staged = staged || pieces[i].fetch;
  }
  w.hash = XXH3_createState();
  if (staged)
    w.staging = w.dev ? moe_device_alloc_host(dev, MOE_SHARD_CHUNK) : malloc(MOE_SHARD_CHUNK);
  if (!w.hash || (staged && !w.staging)) {
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path);
    goto done;
  }
  MOE_TRY_OR(status, done, moe_hdf5_create(path, room, &w.file));
  for (int i = 0; i < n; i++) {
    if (pieces[i].count == 0) continue;
    MOE_TRY_OR(status, done, write_piece(&w, &pieces[i], &slices[*written]));
    ++*written;
  }
  status = seal(&w, slices, *written, file);
done:
  moe_hdf5_release(&w.file);
  if (w.dev && w.staging)
    moe_device_free_host(dev, w.staging);
  else
    free(w.staging);
  XXH3_freeState(w.hash);
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

moe_status moe_shard_verify_slice(const moe_hdf5 *f, const moe_slice *s, void *buffer,
                                  XXH3_state_t *hash) {
  moe_dataset d;
  MOE_TRY(moe_dataset_open(f, s, &d));
  moe_status status = MOE_OK;
  int64_t size = moe_dtype_size(s->dtype), step = MOE_SHARD_CHUNK / size;
  XXH3_128bits_reset(hash);
  for (int64_t at = 0; at < s->count && status == MOE_OK; at += step) {
    int64_t n = s->count - at < step ? s->count - at : step;
    status = moe_dataset_read(&d, at, n, buffer);
    if (status == MOE_OK) XXH3_128bits_update(hash, buffer, (size_t)(n * size));
  }
  moe_dataset_close(&d);
  return status == MOE_OK ? moe_shard_compare_hash(f, s, XXH3_128bits_digest(hash)) : status;
}

moe_status moe_shard_verify(const char *dir, const moe_manifest *m, int i) {
  moe_hdf5 file;
  MOE_TRY(moe_shard_open(dir, m, i, &file));
  moe_status status = MOE_OK;
  XXH3_state_t *hash = XXH3_createState();
  void *buffer = malloc(MOE_SHARD_CHUNK);
  if (!hash || !buffer) status = moe_fail(MOE_NO_MEMORY, "%s: no memory to verify it", file.path);
  for (int64_t k = m->first[i]; k < m->first[i + 1] && status == MOE_OK; k++)
    status = moe_shard_verify_slice(&file, m->by_offset[k], buffer, hash);
  free(buffer);
  XXH3_freeState(hash);
  moe_hdf5_release(&file);
  return status;
}
