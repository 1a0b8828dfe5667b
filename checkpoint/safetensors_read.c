/* Reading safetensors that anybody may have made.
 *
 * The header is checked as a whole before anything is believed: its length against the file, each
 * tensor's extent against its shape and type, and all extents against each other: sorted, they must
 * cover the data exactly, so none overlap and none reach outside. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/files.h"
#include "checkpoint/json.h"
#include "checkpoint/safetensors.h"

/* The format's types. Those we compute with have a moe_dtype; the others are known for their size,
 * so that a file that also holds such a tensor can be checked. */
static const struct {
  const char *name;
  int size;
  bool readable;
  moe_dtype dtype;
} types[] = {
    {"F32", 4, true, MOE_F32},   {"BF16", 2, true, MOE_BF16},    {"F16", 2, true, MOE_F16},
    {"F64", 8, false, MOE_F64},  {"I64", 8, false, MOE_F64},     {"U64", 8, false, MOE_F64},
    {"I32", 4, false, MOE_F32},  {"U32", 4, false, MOE_F32},     {"I16", 2, false, MOE_F16},
    {"U16", 2, false, MOE_F16},  {"I8", 1, false, MOE_F16},      {"U8", 1, false, MOE_F16},
    {"BOOL", 1, false, MOE_F16}, {"F8_E4M3", 1, false, MOE_F16}, {"F8_E5M2", 1, false, MOE_F16},
};
enum { TYPES = sizeof types / sizeof types[0] };

/* An extent while it is checked. */
typedef struct {
  int64_t from, to;
  const char *name;
} extent;

static int type_of(const char *name) {
  for (int i = 0; i < TYPES; i++)
    if (strcmp(types[i].name, name) == 0) return i;
  return -1;
}

static moe_status bad(const char *where, const char *name, const char *what) {
  return moe_fail(MOE_DAMAGED, "%s: tensor %.100s %s", where, name, what);
}

/* Shape and number of elements. */
static moe_status read_shape(const cJSON *entry, moe_safetensor *t, const char *where) {
  const cJSON *shape = moe_json_member(entry, "shape"), *item;
  if (!cJSON_IsArray(shape)) return bad(where, t->name, "has no shape");
  t->count = 1;
  cJSON_ArrayForEach(item, shape) {
    double value = cJSON_IsNumber(item) ? item->valuedouble : -1.0;
    if (!(value >= 0.0 && value <= 0x1p53) || value != (double)(int64_t)value)
      return bad(where, t->name, "has an impossible shape");
    if (t->dims == MOE_SAFETENSORS_DIMS) return bad(where, t->name, "has too many dimensions");
    t->shape[t->dims++] = (int64_t)value;
    if (__builtin_mul_overflow(t->count, (int64_t)value, &t->count))
      return bad(where, t->name, "has an impossible shape");
  }
  return MOE_OK;
}

static moe_status read_extent(const cJSON *entry, const moe_safetensor *t, int size,
                              const char *where, extent *out) {
  const cJSON *offsets = moe_json_member(entry, "data_offsets");
  int64_t bytes, place[2] = {0, 0};
  if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2)
    return bad(where, t->name, "has no data_offsets");
  for (int i = 0; i < 2; i++) {
    const cJSON *item = cJSON_GetArrayItem(offsets, i);
    double value = cJSON_IsNumber(item) ? item->valuedouble : -1.0;
    if (!(value >= 0.0 && value <= 0x1p53) || value != (double)(int64_t)value)
      return bad(where, t->name, "has impossible data_offsets");
    place[i] = (int64_t)value;
  }
  *out = (extent){place[0], place[1], t->name};
  if (__builtin_mul_overflow(t->count, (int64_t)size, &bytes) || out->to - out->from != bytes)
    return bad(where, t->name, "has data_offsets that do not fit its shape and dtype");
  return MOE_OK;
}

static moe_status read_tensor(const cJSON *entry, const char *where, moe_safetensor *t,
                              extent *place) {
  if (!(t->name = strdup(entry->string)))
    return moe_fail(MOE_NO_MEMORY, "%s: no memory for its header", where);
  const cJSON *dtype = moe_json_member(entry, "dtype");
  if (!cJSON_IsString(dtype)) return bad(where, t->name, "has no dtype");
  int type = type_of(dtype->valuestring);
  if (type < 0) return bad(where, t->name, "has an unknown dtype");
  t->readable = types[type].readable;
  t->dtype = types[type].dtype;
  MOE_TRY(read_shape(entry, t, where));
  MOE_TRY(read_extent(entry, t, types[type].size, where, place));
  t->offset = place->from;
  return MOE_OK;
}

static int by_place(const void *pa, const void *pb) {
  const extent *a = pa, *b = pb;
  if (a->from != b->from) return a->from < b->from ? -1 : 1;
  return (a->to > b->to) - (a->to < b->to); /* empty ones first */
}

static int by_name(const void *pa, const void *pb) {
  return strcmp(((const moe_safetensor *)pa)->name, ((const moe_safetensor *)pb)->name);
}

/* Sorted, each extent must begin where the one before ended, and the last end with the file. */
static moe_status check_extents(extent *places, int64_t n, int64_t data_bytes, const char *where) {
  int64_t at = 0;
  qsort(places, (size_t)n, sizeof *places, by_place);
  for (int64_t i = 0; i < n; at = places[i++].to) {
    if (places[i].to > data_bytes)
      return bad(where, places[i].name, "has data beyond the end of the file");
    if (places[i].from < at) return bad(where, places[i].name, "shares bytes with another");
    if (places[i].from > at) return bad(where, places[i].name, "has unused bytes before it");
  }
  if (at == data_bytes) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "%s: has %" PRId64 " bytes that belong to no tensor", where,
                  data_bytes - at);
}

static moe_status read_entries(const cJSON *root, int64_t data_bytes, extent *places,
                               moe_safetensors *out) {
  const cJSON *entry;
  const char *where = out->path;
  cJSON_ArrayForEach(entry, root) {
    if (strcmp(entry->string, "__metadata__") == 0) continue;
    if (!cJSON_IsObject(entry)) return bad(where, entry->string, "is not described by an object");
    moe_safetensor *t = &out->list[out->count++];
    MOE_TRY(read_tensor(entry, where, t, &places[out->count - 1]));
  }
  MOE_TRY(check_extents(places, out->count, data_bytes, where));
  qsort(out->list, (size_t)out->count, sizeof *out->list, by_name);
  for (int64_t i = 1; i < out->count; i++)
    if (by_name(&out->list[i - 1], &out->list[i]) == 0)
      return bad(where, out->list[i].name, "is there twice");
  return MOE_OK;
}

moe_status moe_safetensors_parse(const char *header, int64_t length, int64_t data_bytes,
                                 const char *where, moe_safetensors *out) {
  cJSON *root;
  *out = (moe_safetensors){.fd = -1};
  snprintf(out->path, sizeof out->path, "%s", where);
  MOE_TRY(moe_json_parse(header, length, where, &root));
  size_t n = (size_t)cJSON_GetArraySize(root) + 1;
  extent *places = calloc(n, sizeof *places);
  out->list = calloc(n, sizeof *out->list);
  moe_status status = places && out->list
                          ? read_entries(root, data_bytes, places, out)
                          : moe_fail(MOE_NO_MEMORY, "%s: no memory for its header", where);
  free(places);
  cJSON_Delete(root);
  if (status != MOE_OK) moe_safetensors_close(out);
  return status;
}

static moe_status read_file(int fd, int64_t size, const char *path, moe_safetensors *out) {
  uint64_t prefix = 0;
  int64_t start = (int64_t)sizeof prefix;
  if (size < start) return moe_fail(MOE_DAMAGED, "%s: is too short for a safetensors file", path);
  MOE_TRY(moe_files_read_at(fd, path, 0, start, &prefix));
  if (prefix > MOE_SAFETENSORS_HEADER || (int64_t)prefix > size - start)
    return moe_fail(MOE_DAMAGED,
                    "%s: says that its header has %" PRIu64 " bytes, in a file of %" PRId64
                    ": it is damaged, or no safetensors file",
                    path, prefix, size);
  int64_t length = (int64_t)prefix;
  char *header = malloc((size_t)length + 1);
  if (!header) return moe_fail(MOE_NO_MEMORY, "%s: no memory for its header", path);
  moe_status status = moe_files_read_at(fd, path, start, length, header);
  if (status == MOE_OK)
    status = moe_safetensors_parse(header, length, size - start - length, path, out);
  free(header);
  MOE_TRY(status);
  for (int64_t i = 0; i < out->count; i++) out->list[i].offset += start + length;
  return MOE_OK;
}

moe_status moe_safetensors_open(const char *path, moe_safetensors *out) {
  int fd;
  int64_t size;
  *out = (moe_safetensors){.fd = -1};
  MOE_TRY(moe_files_open(path, &fd, &size));
  moe_status status = read_file(fd, size, path, out);
  if (status == MOE_OK)
    out->fd = fd;
  else
    close(fd);
  return status;
}

void moe_safetensors_close(moe_safetensors *f) {
  if (f->list) { /* a zeroed one has no list, and its 0 is no file */
    if (f->fd >= 0) close(f->fd);
    for (int64_t i = 0; i < f->count; i++) free(f->list[i].name);
    free(f->list);
  }
  *f = (moe_safetensors){.fd = -1};
}

const moe_safetensor *moe_safetensors_find(const moe_safetensors *f, const char *name) {
  moe_safetensor key = {.name = (char *)(uintptr_t)name};
  if (!f->list) return NULL;
  return bsearch(&key, f->list, (size_t)f->count, sizeof key, by_name);
}

moe_status moe_safetensors_read(const moe_safetensors *f, const moe_safetensor *t, int64_t begin,
                                int64_t count, void *out) {
  if (begin < 0 || count < 0 || begin > t->count - count || !t->readable)
    return moe_fail(MOE_INVALID, "%s: %s: its range is outside the tensor", f->path, t->name);
  int64_t size = moe_dtype_size(t->dtype);
  return moe_files_read_at(f->fd, f->path, t->offset + begin * size, count * size, out);
}
