/* Reading GGUF files that anyone may have made.
 *
 * The file is mapped, and a cursor that knows the end takes every byte of the front part from it;
 * a count is believed only as far as the bytes that are left could hold that many. Data is read
 * with pread, so that looking at a large file does not fill memory with it. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "checkpoint/gguf.h"
#include "core/base/tensor.h"

typedef struct {
  const char *key;
  int64_t length;
  moe_gguf_entry entry;
} keyed;

struct moe_gguf {
  char name[MOE_PATH];
  const unsigned char *data;
  int64_t size;
  int fd;      /* -1: from memory */
  bool mapped; /* data is ours to unmap */
  keyed *keys; /* sorted */
  int64_t key_count;
  moe_gguf_tensor *tensors; /* sorted by name */
  int64_t tensor_count;
};

typedef struct {
  moe_gguf *g;
  int64_t at;
} cursor;

/* ---- element types */

void moe_ggml_decode(moe_ggml_type type, const void *data, int64_t n, float *out) {
  const unsigned char *bytes = data;
  uint16_t bits;
  switch (type) {
  case MOE_GGML_F32:
    memcpy(out, data, (size_t)n * sizeof *out);
    break;
  case MOE_GGML_F16:
    moe_convert(data, MOE_F16, out, MOE_F32, n);
    break;
  case MOE_GGML_BF16:
    moe_convert(data, MOE_BF16, out, MOE_F32, n);
    break;
  case MOE_GGML_Q8_0:
    for (int64_t b = 0; b < n / 32; b++, bytes += 34) {
      memcpy(&bits, bytes, sizeof bits);
      float scale = moe_f16_to_f32(bits);
      for (int i = 0; i < 32; i++) out[32 * b + i] = scale * (float)(int8_t)bytes[2 + i];
    }
    break;
  }
}

/* ---- the cursor */

__attribute__((format(printf, 3, 4))) static moe_status damaged(const cursor *c, int64_t at,
                                                                const char *format, ...) {
  char what[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  return moe_fail(MOE_DAMAGED, "%s, byte %" PRId64 ": %s", c->g->name, at, what);
}

static int64_t left(const cursor *c) {
  return c->g->size - c->at;
}

static moe_status take(cursor *c, void *out, int64_t bytes, const char *what) {
  if (left(c) < bytes) return damaged(c, c->at, "the file ends within %s", what);
  memcpy(out, c->g->data + c->at, (size_t)bytes);
  c->at += bytes;
  return MOE_OK;
}

/* A count of things that take at least `each` bytes. */
static moe_status take_count(cursor *c, int64_t each, int64_t *out, const char *what) {
  uint64_t count = 0;
  int64_t at = c->at;
  *out = 0;
  MOE_TRY(take(c, &count, sizeof count, what));
  if (count > (uint64_t)(left(c) / each))
    return damaged(c, at, "%s is %" PRIu64 ", more than the rest of the file can hold", what,
                   count);
  *out = (int64_t)count;
  return MOE_OK;
}

static moe_status take_text(cursor *c, const char **text, int64_t *length, const char *what) {
  MOE_TRY(take_count(c, 1, length, what));
  *text = (const char *)c->g->data + c->at;
  c->at += *length;
  return MOE_OK;
}

/* Bytes of a value of fixed size; 0 for strings and arrays, -1 for what is none. */
static int64_t value_bytes(uint32_t type) {
  static const int8_t sizes[MOE_GGUF_VALUES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < MOE_GGUF_VALUES ? sizes[type] : -1;
}

/* ---- keys */

static moe_status take_array(cursor *c, moe_gguf_entry *e) {
  uint32_t type = 0;
  int64_t at = c->at, unused;
  const char *text;
  MOE_TRY(take(c, &type, sizeof type, "an array's type"));
  int64_t each = value_bytes(type);
  if (each < 0 || type == MOE_GGUF_ARRAY)
    return damaged(c, at, "type %" PRIu32 " is not one that arrays have", type);
  e->element = (moe_gguf_value)type;
  MOE_TRY(take_count(c, each ? each : 8, &e->count, "an array's length"));
  e->data = c->g->data + c->at;
  c->at += each * e->count;
  for (int64_t i = 0; each == 0 && i < e->count; i++)
    MOE_TRY(take_text(c, &text, &unused, "a string's length"));
  return MOE_OK;
}

static moe_status take_key(cursor *c, keyed *k) {
  uint32_t type = 0;
  const char *text = NULL;
  MOE_TRY(take_text(c, &k->key, &k->length, "a key's length"));
  int64_t at = c->at;
  MOE_TRY(take(c, &type, sizeof type, "a key's type"));
  if (value_bytes(type) < 0) return damaged(c, at, "there is no value type %" PRIu32, type);
  k->entry = (moe_gguf_entry){.type = (moe_gguf_value)type, .count = 1};
  if (type == MOE_GGUF_ARRAY) return take_array(c, &k->entry);
  if (type == MOE_GGUF_STRING) {
    MOE_TRY(take_text(c, &text, &k->entry.count, "a string's length"));
    k->entry.data = text;
    return MOE_OK;
  }
  k->entry.data = c->g->data + c->at;
  if (left(c) < value_bytes(type)) return damaged(c, c->at, "the file ends within a value");
  c->at += value_bytes(type);
  return MOE_OK;
}

static int compare_keys(const void *pa, const void *pb) {
  const keyed *a = pa, *b = pb;
  int order = memcmp(a->key, b->key, (size_t)(a->length < b->length ? a->length : b->length));
  return order ? order : (a->length > b->length) - (a->length < b->length);
}

static moe_status take_keys(cursor *c, int64_t n) {
  moe_gguf *g = c->g;
  g->keys = calloc((size_t)n + 1, sizeof *g->keys);
  if (!g->keys) return moe_fail(MOE_NO_MEMORY, "%s: no memory for %" PRId64 " keys", g->name, n);
  for (; g->key_count < n; g->key_count++) MOE_TRY(take_key(c, &g->keys[g->key_count]));
  qsort(g->keys, (size_t)n, sizeof *g->keys, compare_keys);
  for (int64_t i = 1; i < n; i++)
    if (compare_keys(&g->keys[i - 1], &g->keys[i]) == 0)
      return damaged(c, (const unsigned char *)g->keys[i].key - g->data, "this key is there twice");
  return MOE_OK;
}

/* ---- tensors */

static moe_status take_shape(cursor *c, moe_gguf_tensor *t) {
  uint32_t dims = 0;
  int64_t at = c->at;
  MOE_TRY(take(c, &dims, sizeof dims, "a tensor's dimensions"));
  if (dims < 1 || dims > MOE_GGUF_DIMS)
    return damaged(c, at, "%s has %" PRIu32 " dimensions", t->name, dims);
  t->dims = (int)dims;
  t->elements = 1;
  for (int i = 0; i < MOE_GGUF_DIMS; i++) {
    t->ne[i] = 1;
    at = c->at;
    if (i < t->dims) MOE_TRY(take(c, &t->ne[i], sizeof t->ne[i], "a tensor's shape"));
    if (t->ne[i] < 1 || __builtin_mul_overflow(t->elements, t->ne[i], &t->elements) ||
        t->elements > INT64_MAX / 8)
      return damaged(c, at, "%s has an impossible extent %" PRId64, t->name, t->ne[i]);
  }
  return MOE_OK;
}

static moe_status take_tensor(cursor *c, moe_gguf_tensor *t) {
  const char *text = NULL;
  int64_t length = 0, at = c->at;
  uint32_t type = 0;
  MOE_TRY(take_text(c, &text, &length, "a tensor name's length"));
  if (length < 1 || length >= MOE_GGUF_NAME)
    return damaged(c, at, "a tensor's name has %" PRId64 " bytes, not 1 to %d", length,
                   MOE_GGUF_NAME - 1);
  for (int64_t i = 0; i < length; i++) { /* it is printed and compared as text */
    if (text[i] <= ' ' || text[i] > '~') return damaged(c, at, "a tensor's name is not plain text");
    t->name[i] = text[i];
  }
  MOE_TRY(take_shape(c, t));
  at = c->at;
  MOE_TRY(take(c, &type, sizeof type, "a tensor's type"));
  if (!moe_ggml_name(type))
    return damaged(c, at, "%s has type %" PRIu32 ", not one of F32, F16, BF16, Q8_0", t->name,
                   type);
  t->type = (moe_ggml_type)type;
  if (t->ne[0] % moe_ggml_block(t->type) != 0)
    return damaged(c, at, "%s: rows of %" PRId64 " are not whole blocks of %s", t->name, t->ne[0],
                   moe_ggml_name(type));
  t->bytes = moe_ggml_bytes(t->type, t->elements);
  return take(c, &t->offset, sizeof t->offset, "a tensor's offset");
}

static int by_offset(const void *pa, const void *pb) {
  const moe_gguf_tensor *a = pa, *b = pb;
  return (a->offset > b->offset) - (a->offset < b->offset);
}

static int by_name(const void *pa, const void *pb) {
  return strcmp(((const moe_gguf_tensor *)pa)->name, ((const moe_gguf_tensor *)pb)->name);
}

static moe_status alignment_of(const moe_gguf *g, int64_t *out) {
  moe_gguf_entry unused;
  *out = MOE_GGUF_ALIGNMENT;
  if (!moe_gguf_find(g, "general.alignment", &unused)) return MOE_OK;
  MOE_TRY(moe_gguf_int(g, "general.alignment", out));
  if (*out >= 1 && *out <= 1 << 20 && (*out & (*out - 1)) == 0) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "%s: general.alignment %" PRId64 " is not a power of two up to 2^20",
                  g->name, *out);
}

/* Make offsets those in the file, and check that no two tensors share a byte. */
static moe_status place_tensors(cursor *c) {
  moe_gguf *g = c->g;
  int64_t alignment;
  MOE_TRY(alignment_of(g, &alignment));
  int64_t begin = (c->at + alignment - 1) / alignment * alignment, end = begin;
  qsort(g->tensors, (size_t)g->tensor_count, sizeof *g->tensors, by_offset);
  for (int64_t i = 0; i < g->tensor_count; i++) {
    moe_gguf_tensor *t = &g->tensors[i];
    const char *fault = NULL;
    if (t->offset < 0 || t->offset % alignment != 0)
      fault = "not a multiple of the alignment";
    else if (__builtin_add_overflow(t->offset, begin, &t->offset) || t->offset > g->size ||
             t->bytes > g->size - t->offset)
      fault = "beyond the end of the file";
    else if (t->offset < end)
      fault = "over another tensor";
    if (fault)
      return moe_fail(MOE_DAMAGED, "%s: %s: its %" PRId64 " bytes at byte %" PRId64 " are %s",
                      g->name, t->name, t->bytes, t->offset, fault);
    end = t->offset + t->bytes;
  }
  qsort(g->tensors, (size_t)g->tensor_count, sizeof *g->tensors, by_name);
  for (int64_t i = 1; i < g->tensor_count; i++)
    if (strcmp(g->tensors[i - 1].name, g->tensors[i].name) == 0)
      return moe_fail(MOE_DAMAGED, "%s: %s is there twice", g->name, g->tensors[i].name);
  return MOE_OK;
}

static moe_status take_tensors(cursor *c, int64_t n) {
  moe_gguf *g = c->g;
  g->tensors = calloc((size_t)n + 1, sizeof *g->tensors);
  if (!g->tensors)
    return moe_fail(MOE_NO_MEMORY, "%s: no memory for %" PRId64 " tensors", g->name, n);
  for (; g->tensor_count < n; g->tensor_count++)
    MOE_TRY(take_tensor(c, &g->tensors[g->tensor_count]));
  return place_tensors(c);
}

/* ---- the file */

static moe_status parse(moe_gguf *g) {
  enum { KEY = 8 + 4 + 1, TENSOR = 8 + 4 + 8 + 4 + 8 }; /* bytes of the smallest */
  enum { MOST = 1 << 20 }; /* keys and tensors; models have thousands */
  cursor c = {g, 0};
  char magic[4];
  uint32_t version = 0;
  int64_t tensors, keys;
  MOE_TRY(take(&c, magic, sizeof magic, "the header"));
  if (memcmp(magic, "GGUF", 4) != 0) return damaged(&c, 0, "not a GGUF file");
  MOE_TRY(take(&c, &version, sizeof version, "the header"));
  if (version != 2 && version != MOE_GGUF_VERSION)
    return damaged(&c, 4, "GGUF version %" PRIu32 ", not 2 or 3 (little-endian)", version);
  MOE_TRY(take_count(&c, TENSOR, &tensors, "the number of tensors"));
  MOE_TRY(take_count(&c, KEY, &keys, "the number of keys"));
  if (tensors > MOST || keys > MOST)
    return damaged(&c, 8, "%" PRId64 " tensors and %" PRId64 " keys: more than %d are refused",
                   tensors, keys, MOST);
  MOE_TRY(take_keys(&c, keys));
  return take_tensors(&c, tensors);
}

static moe_status create(const char *name, moe_gguf **out) {
  moe_gguf *g = *out = calloc(1, sizeof *g);
  if (!g) return moe_fail(MOE_NO_MEMORY, "no memory to open %s", name);
  snprintf(g->name, sizeof g->name, "%s", name);
  g->fd = -1;
  return MOE_OK;
}

/* Parse what `g` holds, or give it up. */
static moe_status finish(moe_gguf **out) {
  moe_status status = parse(*out);
  if (status == MOE_OK) return MOE_OK;
  moe_gguf_close(*out);
  *out = NULL;
  return status;
}

moe_status moe_gguf_parse(const void *data, int64_t size, const char *name, moe_gguf **out) {
  MOE_TRY(create(name, out));
  (*out)->data = data;
  (*out)->size = size;
  return finish(out);
}

moe_status moe_gguf_open(const char *path, moe_gguf **out) {
  MOE_TRY(create(path, out));
  moe_gguf *g = *out;
  moe_status status = moe_files_open(path, &g->fd, &g->size);
  if (status == MOE_OK && g->size > 0) {
    void *map = mmap(NULL, (size_t)g->size, PROT_READ, MAP_PRIVATE, g->fd, 0);
    if (map == MAP_FAILED)
      status = moe_fail(MOE_IO, "%s: cannot map: %s", path, strerror(errno));
    else
      g->data = map;
    g->mapped = map != MAP_FAILED;
  }
  if (status == MOE_OK) return finish(out);
  moe_gguf_close(g);
  *out = NULL;
  return status;
}

void moe_gguf_close(moe_gguf *g) {
  if (!g) return;
  if (g->mapped) munmap((void *)(uintptr_t)g->data, (size_t)g->size);
  if (g->fd >= 0) close(g->fd);
  free(g->keys);
  free(g->tensors);
  free(g);
}

/* ---- looking things up */

bool moe_gguf_find(const moe_gguf *g, const char *key, moe_gguf_entry *out) {
  keyed wanted = {.key = key, .length = (int64_t)strlen(key)};
  const keyed *k = bsearch(&wanted, g->keys, (size_t)g->key_count, sizeof *g->keys, compare_keys);
  if (k) *out = k->entry;
  return k != NULL;
}

static moe_status wrong_kind(const moe_gguf *g, const char *key, bool there, const char *kind) {
  return moe_fail(MOE_DAMAGED, "%s: its key %s is %s", g->name, key, there ? kind : "missing");
}

moe_status moe_gguf_int(const moe_gguf *g, const char *key, int64_t *out) {
  moe_gguf_entry e = {.type = MOE_GGUF_STRING};
  bool there = moe_gguf_find(g, key, &e);
  uint64_t bits = 0; /* little-endian: the low bytes of the value */
  bool is_signed = e.type == MOE_GGUF_I8 || e.type == MOE_GGUF_I16 || e.type == MOE_GGUF_I32 ||
                   e.type == MOE_GGUF_I64;
  bool is_unsigned = e.type == MOE_GGUF_U8 || e.type == MOE_GGUF_U16 || e.type == MOE_GGUF_U32 ||
                     e.type == MOE_GGUF_U64;
  if (!is_signed && !is_unsigned) return wrong_kind(g, key, there, "not an integer");
  int64_t bytes = value_bytes(e.type);
  memcpy(&bits, e.data, (size_t)bytes);
  bool high = bits >> (8 * bytes - 1) & 1;
  if (high && (is_signed || bytes == 8)) return wrong_kind(g, key, there, "out of range");
  *out = (int64_t)bits;
  return MOE_OK;
}

moe_status moe_gguf_number(const moe_gguf *g, const char *key, double *out) {
  moe_gguf_entry e = {.type = MOE_GGUF_STRING};
  bool there = moe_gguf_find(g, key, &e);
  float single;
  if (e.type != MOE_GGUF_F32 && e.type != MOE_GGUF_F64)
    return wrong_kind(g, key, there, "not a number");
  if (e.type == MOE_GGUF_F64) {
    memcpy(out, e.data, sizeof *out);
  } else {
    memcpy(&single, e.data, sizeof single);
    *out = (double)single;
  }
  return MOE_OK;
}

moe_status moe_gguf_text(const moe_gguf *g, const char *key, char **out) {
  moe_gguf_entry e = {.type = MOE_GGUF_U8};
  bool there = moe_gguf_find(g, key, &e);
  if (e.type != MOE_GGUF_STRING) return wrong_kind(g, key, there, "not text");
  *out = malloc((size_t)e.count + 1);
  if (!*out) return moe_fail(MOE_NO_MEMORY, "%s: no memory for %s", g->name, key);
  memcpy(*out, e.data, (size_t)e.count);
  (*out)[e.count] = 0;
  return MOE_OK;
}

int64_t moe_gguf_tensors(const moe_gguf *g) {
  return g->tensor_count;
}

const moe_gguf_tensor *moe_gguf_tensor_find(const moe_gguf *g, const char *name) {
  moe_gguf_tensor wanted = {.name = ""};
  if (strlen(name) >= sizeof wanted.name) return NULL;
  strcpy(wanted.name, name);
  return bsearch(&wanted, g->tensors, (size_t)g->tensor_count, sizeof *g->tensors, by_name);
}

moe_status moe_gguf_read(const moe_gguf *g, const moe_gguf_tensor *t, int64_t begin, int64_t count,
                         void *out) {
  if (begin < 0 || count < 0 || count > t->elements - begin)
    return moe_fail(MOE_INVALID, "%s: %s: elements outside the tensor", g->name, t->name);
  int64_t at = t->offset + moe_ggml_bytes(t->type, begin), bytes = moe_ggml_bytes(t->type, count);
  if (g->fd >= 0) return moe_files_read_at(g->fd, g->name, at, bytes, out);
  memcpy(out, g->data + at, (size_t)bytes);
  return MOE_OK;
}
