/* What a manifest must satisfy, and looking things up in it.
 *
 * After sorting, every check is one walk: neighbours in (role, name, begin) must continue each
 * other from 0 to the tensor's end, neighbours in (file, offset) must not overlap. */
#include "checkpoint/manifest.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

const char *moe_role_name(moe_role role) {
  static const char *const names[MOE_ROLES] = {"param", "master", "adam_m", "adam_v"};
  return (unsigned)role < MOE_ROLES ? names[role] : "?";
}

const char *moe_hash_text(XXH128_hash_t hash, char text[MOE_HASH_TEXT]) {
  snprintf(text, MOE_HASH_TEXT, "%016" PRIx64 "%016" PRIx64, (uint64_t)hash.high64,
           (uint64_t)hash.low64);
  return text;
}

int64_t moe_slice_total(const moe_slice *s) {
  if (s->dims < 1 || s->dims > 2) return -1;
  int64_t total = 1, bytes;
  for (int i = 0; i < s->dims; i++)
    if (s->shape[i] < 1 || __builtin_mul_overflow(total, s->shape[i], &total)) return -1;
  return __builtin_mul_overflow(total, moe_dtype_size(s->dtype), &bytes) ? -1 : total;
}

int64_t moe_slice_bytes(const moe_slice *s) {
  return s->count * moe_dtype_size(s->dtype);
}

const char *moe_slice_dataset(const moe_slice *s, char path[MOE_DATASET_PATH]) {
  if (s->count == moe_slice_total(s))
    snprintf(path, MOE_DATASET_PATH, "/%s/%s", moe_role_name(s->role), s->name);
  else
    snprintf(path, MOE_DATASET_PATH, "/%s/%s@%" PRId64, moe_role_name(s->role), s->name, s->begin);
  return path;
}

void moe_run_state_clear(moe_run_state *s) {
  free(s->router_bias);
  free(s->config);
  memset(s, 0, sizeof *s);
}

void moe_manifest_clear(moe_manifest *m) {
  moe_run_state_clear(&m->state);
  free(m->file);
  free(m->slice);
  free(m->by_offset);
  free(m->first);
  memset(m, 0, sizeof *m);
}

/* ---- order
 * --------------------------------------------------------------------------------------- */

static int compare_i64(int64_t a, int64_t b) {
  return (a > b) - (a < b);
}

static int compare_tensor(const moe_slice *a, const moe_slice *b) {
  return a->role != b->role ? (int)a->role - (int)b->role : strcmp(a->name, b->name);
}

static int by_tensor(const void *pa, const void *pb) {
  const moe_slice *a = pa, *b = pb;
  int order = compare_tensor(a, b);
  return order ? order : compare_i64(a->begin, b->begin);
}

static int by_place(const void *pa, const void *pb) {
  const moe_slice *a = *(const moe_slice *const *)pa, *b = *(const moe_slice *const *)pb;
  return a->file != b->file ? a->file - b->file : compare_i64(a->offset, b->offset);
}

int64_t moe_manifest_find(const moe_manifest *m, moe_role role, const char *name) {
  moe_slice key = {.role = role};
  if (strlen(name) >= sizeof key.name) return -1;
  strcpy(key.name, name);
  int64_t low = 0, high = m->slices;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (compare_tensor(&m->slice[middle], &key) < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return low < m->slices && compare_tensor(&m->slice[low], &key) == 0 ? low : -1;
}

bool moe_manifest_has_role(const moe_manifest *m, moe_role role) {
  for (int64_t i = 0; i < m->slices; i++)
    if (m->slice[i].role == role) return true;
  return false;
}

/* ---- checks
 * -------------------------------------------------------------------------------------- */

/* A name becomes one component of a dataset's path, and is quoted in messages. */
static bool name_is_plain(const char *name) {
  if (!name[0] || !strcmp(name, ".") || !strcmp(name, "..")) return false;
  for (const char *c = name; *c; c++)
    if (*c <= ' ' || *c > '~' || *c == '/' || *c == '@') return false;
  return true;
}

static moe_status check_file(const moe_manifest *m, int i, const char *where) {
  const moe_shard_file *f = &m->file[i];
  if (!name_is_plain(f->name) || f->name[0] == '.')
    return moe_fail(MOE_DAMAGED, "%s: files[%d]: its name is not a plain file name", where, i);
  if (f->size < 1)
    return moe_fail(MOE_DAMAGED, "%s: %s: impossible size %" PRId64, where, f->name, f->size);
  if (i > 0 && strcmp(m->file[i - 1].name, f->name) >= 0)
    return moe_fail(MOE_DAMAGED, "%s: %s: file names are not in ascending order", where, f->name);
  return MOE_OK;
}

/* One slice by itself. */
static moe_status check_slice(const moe_manifest *m, const moe_slice *s, const char *where) {
  if (!name_is_plain(s->name))
    return moe_fail(MOE_DAMAGED, "%s: a tensor's name has unusable characters", where);
  const char *fault = NULL;
  int64_t total = moe_slice_total(s), end;
  if (total < 0)
    fault = "impossible shape";
  else if (s->begin < 0 || s->count < 1 || __builtin_add_overflow(s->begin, s->count, &end) ||
           end > total)
    fault = "a range outside the tensor";
  else if (s->file < 0 || s->file >= m->files)
    fault = "a file number that is not in the list";
  else if (s->offset < 1 || s->offset > m->file[s->file].size ||
           moe_slice_bytes(s) > m->file[s->file].size - s->offset)
    fault = "bytes beyond the end of its file";
  if (fault)
    return moe_fail(MOE_DAMAGED,
                    "%s: %s %s has %s (shape [%" PRId64 ", %" PRId64 "], begin %" PRId64
                    ", count %" PRId64 ", file %d, offset %" PRId64 ")",
                    where, moe_role_name(s->role), s->name, fault, s->shape[0], s->shape[1],
                    s->begin, s->count, s->file, s->offset);
  return MOE_OK;
}

/* Slices [first, end) are those of one tensor: they must continue each other from 0 to its end. */
static moe_status check_tensor(const moe_manifest *m, int64_t first, int64_t end,
                               const char *where) {
  const moe_slice *t = &m->slice[first];
  const char *role = moe_role_name(t->role);
  int64_t at = 0;
  for (int64_t i = first; i < end; at += m->slice[i++].count) {
    const moe_slice *s = &m->slice[i];
    if (s->dtype != t->dtype || s->dims != t->dims || s->shape[0] != t->shape[0] ||
        s->shape[1] != t->shape[1])
      return moe_fail(MOE_DAMAGED, "%s: %s %s: its slices disagree on shape or type", where, role,
                      t->name);
    if (s->begin < at)
      return moe_fail(MOE_DAMAGED, "%s: %s %s: element %" PRId64 " is there twice", where, role,
                      t->name, s->begin);
    if (s->begin > at) break;
  }
  int64_t total = moe_slice_total(t);
  if (at != total)
    return moe_fail(MOE_DAMAGED, "%s: %s %s: element %" PRId64 " of %" PRId64 " is missing", where,
                    role, t->name, at, total);
  return MOE_OK;
}

static moe_status check_tensors(const moe_manifest *m, const char *where) {
  for (int64_t first = 0, end; first < m->slices; first = end) {
    for (end = first + 1; end < m->slices; end++)
      if (compare_tensor(&m->slice[first], &m->slice[end]) != 0) break;
    MOE_TRY(check_tensor(m, first, end, where));
  }
  return MOE_OK;
}

static moe_status check_no_shared_bytes(const moe_manifest *m, const char *where) {
  for (int64_t i = 1; i < m->slices; i++) {
    const moe_slice *a = m->by_offset[i - 1], *b = m->by_offset[i];
    if (a->file == b->file && b->offset - a->offset < moe_slice_bytes(a))
      return moe_fail(MOE_DAMAGED, "%s: %s and %s share bytes of %s", where, a->name, b->name,
                      m->file[a->file].name);
  }
  return MOE_OK;
}

static moe_status index_by_file(moe_manifest *m) {
  free(m->by_offset);
  free(m->first);
  m->by_offset = calloc((size_t)m->slices + 1, sizeof *m->by_offset);
  m->first = calloc((size_t)m->files + 1, sizeof *m->first);
  if (!m->by_offset || !m->first) return moe_fail(MOE_NO_MEMORY, "no memory for a manifest");
  for (int64_t i = 0; i < m->slices; i++) {
    m->by_offset[i] = &m->slice[i];
    m->first[m->slice[i].file + 1]++;
  }
  for (int i = 0; i < m->files; i++) m->first[i + 1] += m->first[i];
  qsort(m->by_offset, (size_t)m->slices, sizeof *m->by_offset, by_place);
  return MOE_OK;
}

moe_status moe_manifest_check(moe_manifest *m, const char *where) {
  if (m->files < 1 || m->slices < 1)
    return moe_fail(MOE_DAMAGED, "%s: lists no files or no tensors", where);
  for (int i = 0; i < m->files; i++) MOE_TRY(check_file(m, i, where));
  for (int64_t i = 0; i < m->slices; i++) MOE_TRY(check_slice(m, &m->slice[i], where));
  qsort(m->slice, (size_t)m->slices, sizeof *m->slice, by_tensor);
  MOE_TRY(check_tensors(m, where));
  MOE_TRY(index_by_file(m));
  return check_no_shared_bytes(m, where);
}
