/* Writing GGUF: keys and tensor descriptions grow in memory, data streams through.
 *
 * All sizes are known before the first byte is written, so the file's room is set aside at once and
 * a full disk shows at the start. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "checkpoint/gguf.h"
#include "core/base/tensor.h"

typedef struct {
  char *data;
  int64_t size, room;
} text;

struct moe_gguf_writer {
  text keys, tensors; /* as they stand in the file */
  int64_t key_count, tensor_count;
  int64_t data_bytes; /* with padding */
  int64_t left;       /* bytes of tensors that are still to be written */
  bool no_memory;
  /* once open */
  int fd; /* -1: not open */
  char path[MOE_PATH];
};

/* ---- element types */

const char *moe_ggml_name(int64_t type) {
  switch (type) {
#define X(id, number, name, elements, bytes) \
  case number:                               \
    return name;
    MOE_GGML_MAP(X)
#undef X
  default:
    return NULL;
  }
}

int64_t moe_ggml_block(moe_ggml_type type) {
  return type == MOE_GGML_Q8_0 ? 32 : 1;
}

int64_t moe_ggml_bytes(moe_ggml_type type, int64_t elements) {
  switch (type) {
#define X(id, number, name, count, bytes) \
  case MOE_GGML_##id:                     \
    return elements / (count) * (bytes);
    MOE_GGML_MAP(X)
#undef X
  default:
    return -1;
  }
}

/* The largest |x| of 32, but for what is no number. Floats that are not negative are in the order
 * of their bits, whose maximum, unlike that of floats, is one of vectors. */
static float largest_of(const float *x) {
  int32_t bits[32], most = 0;
  float largest;
  memcpy(bits, x, sizeof bits);
  for (int i = 0; i < 32; i++) {
    int32_t size = bits[i] & 0x7fffffff;
    size = size > 0x7f800000 ? 0 : size;
    most = size > most ? size : most;
  }
  memcpy(&largest, &most, sizeof largest);
  return largest;
}

/* The largest of 32 becomes +-127; the scale that is divided by is the unrounded one, as in ggml.
 * Halves round away from zero: the largest float below a half, added before the rest is cut off,
 * takes no smaller one along. 0 for what is no number. */
static void encode_q8_0(const float *x, int64_t blocks, unsigned char *out) {
  for (int64_t b = 0; b < blocks; b++, x += 32, out += 34) {
    float scale = largest_of(x) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    uint16_t bits = moe_f32_to_f16(scale);
    memcpy(out, &bits, sizeof bits);
    for (int i = 0; i < 32; i++) {
      float q = x[i] * inverse;
      q = fabsf(q) < 127.5f ? q : 0.0f;
      out[2 + i] = (unsigned char)(int32_t)(q + copysignf(0x1.fffffep-2f, q));
    }
  }
}

void moe_ggml_encode(moe_ggml_type type, const float *x, int64_t n, void *out) {
  switch (type) {
  case MOE_GGML_F32:
    memcpy(out, x, (size_t)n * sizeof *x);
    break;
  case MOE_GGML_F16:
    moe_convert(x, MOE_F32, out, MOE_F16, n);
    break;
  case MOE_GGML_BF16:
    moe_convert(x, MOE_F32, out, MOE_BF16, n);
    break;
  case MOE_GGML_Q8_0:
    encode_q8_0(x, n / 32, out);
    break;
  }
}

/* ---- keys and tensors */

static void put(moe_gguf_writer *w, text *t, const void *data, int64_t bytes) {
  if (bytes == 0) return;
  if (!t->data || t->size + bytes > t->room) {
    int64_t room = 2 * (t->size + bytes) + 4096;
    char *bigger = realloc(t->data, (size_t)room);
    if (!bigger) {
      w->no_memory = true;
      return;
    }
    t->data = bigger;
    t->room = room;
  }
  memcpy(t->data + t->size, data, (size_t)bytes);
  t->size += bytes;
}

static void put_u32(moe_gguf_writer *w, text *t, uint32_t value) {
  put(w, t, &value, sizeof value);
}

static void put_u64(moe_gguf_writer *w, text *t, int64_t value) {
  put(w, t, &value, sizeof value);
}

static void put_text(moe_gguf_writer *w, text *t, const char *value) {
  put_u64(w, t, (int64_t)strlen(value));
  put(w, t, value, (int64_t)strlen(value));
}

static void put_key(moe_gguf_writer *w, const char *key, moe_gguf_value type) {
  put_text(w, &w->keys, key);
  put_u32(w, &w->keys, type);
  w->key_count++;
}

void moe_gguf_put_u32(moe_gguf_writer *w, const char *key, uint32_t value) {
  put_key(w, key, MOE_GGUF_U32);
  put_u32(w, &w->keys, value);
}

void moe_gguf_put_f32(moe_gguf_writer *w, const char *key, float value) {
  put_key(w, key, MOE_GGUF_F32);
  put(w, &w->keys, &value, sizeof value);
}

void moe_gguf_put_bool(moe_gguf_writer *w, const char *key, bool value) {
  uint8_t byte = value;
  put_key(w, key, MOE_GGUF_BOOL);
  put(w, &w->keys, &byte, sizeof byte);
}

void moe_gguf_put_string(moe_gguf_writer *w, const char *key, const char *value) {
  put_key(w, key, MOE_GGUF_STRING);
  put_text(w, &w->keys, value);
}

static void put_array(moe_gguf_writer *w, const char *key, moe_gguf_value type, int64_t n) {
  put_key(w, key, MOE_GGUF_ARRAY);
  put_u32(w, &w->keys, type);
  put_u64(w, &w->keys, n);
}

void moe_gguf_put_strings(moe_gguf_writer *w, const char *key, const char *const *values,
                          int64_t n) {
  put_array(w, key, MOE_GGUF_STRING, n);
  for (int64_t i = 0; i < n; i++) put_text(w, &w->keys, values[i]);
}

void moe_gguf_put_f32s(moe_gguf_writer *w, const char *key, const float *values, int64_t n) {
  put_array(w, key, MOE_GGUF_F32, n);
  put(w, &w->keys, values, n * (int64_t)sizeof *values);
}

void moe_gguf_put_i32s(moe_gguf_writer *w, const char *key, const int32_t *values, int64_t n) {
  put_array(w, key, MOE_GGUF_I32, n);
  put(w, &w->keys, values, n * (int64_t)sizeof *values);
}

static int64_t padding(int64_t bytes) {
  return (MOE_GGUF_ALIGNMENT - bytes % MOE_GGUF_ALIGNMENT) % MOE_GGUF_ALIGNMENT;
}

int64_t moe_gguf_put_tensor(moe_gguf_writer *w, const char *name, moe_ggml_type type, int dims,
                            const int64_t *ne) {
  int64_t elements = 1;
  put_text(w, &w->tensors, name);
  put_u32(w, &w->tensors, (uint32_t)dims);
  for (int i = 0; i < dims; i++) {
    put_u64(w, &w->tensors, ne[i]);
    elements *= ne[i];
  }
  put_u32(w, &w->tensors, type);
  put_u64(w, &w->tensors, w->data_bytes);
  w->tensor_count++;
  int64_t at = w->data_bytes, bytes = moe_ggml_bytes(type, elements);
  w->left += bytes;
  w->data_bytes += bytes + padding(bytes);
  return at;
}

/* ---- the file */

enum { HEADER = 4 + 4 + 8 + 8 };

static int64_t front_bytes(const moe_gguf_writer *w) {
  int64_t bytes = HEADER + w->keys.size + w->tensors.size;
  return bytes + padding(bytes);
}

int64_t moe_gguf_writer_size(const moe_gguf_writer *w) {
  return front_bytes(w) + w->data_bytes;
}

moe_status moe_gguf_writer_create(moe_gguf_writer **out) {
  *out = calloc(1, sizeof **out);
  if (!*out) return moe_fail(MOE_NO_MEMORY, "no memory to write a GGUF file");
  (*out)->fd = -1;
  return MOE_OK;
}

void moe_gguf_writer_destroy(moe_gguf_writer *w) {
  if (!w) return;
  if (w->fd >= 0) close(w->fd);
  free(w->keys.data);
  free(w->tensors.data);
  free(w);
}

moe_status moe_gguf_writer_open(moe_gguf_writer *w, const char *path) {
  if (w->no_memory) return moe_fail(MOE_NO_MEMORY, "%s: no memory for its keys", path);
  if (snprintf(w->path, sizeof w->path, "%s", path) >= (int)sizeof w->path)
    return moe_fail(MOE_USAGE, "%.60s...: the path is too long", path);
  w->fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (w->fd < 0) return moe_fail(MOE_IO, "%s: cannot create: %s", path, strerror(errno));
  int64_t size = moe_gguf_writer_size(w);
  int full = posix_fallocate(w->fd, 0, size);
  if (full != ENOSPC && full != EFBIG) full = ftruncate(w->fd, size) == 0 ? 0 : errno;
  if (full)
    return moe_fail(MOE_IO, "%s: no room for its %" PRId64 " bytes: %s", path, size,
                    strerror(full));
  text header = {0};
  put(w, &header, "GGUF", 4);
  put_u32(w, &header, MOE_GGUF_VERSION);
  put_u64(w, &header, w->tensor_count);
  put_u64(w, &header, w->key_count);
  put(w, &header, w->keys.data, w->keys.size);
  put(w, &header, w->tensors.data, w->tensors.size);
  moe_status status = w->no_memory ? moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path)
                                   : moe_files_write_at(w->fd, path, 0, header.size, header.data);
  free(header.data);
  return status;
}

/* What is not written, padding, is zeros. */
moe_status moe_gguf_writer_write(moe_gguf_writer *w, int64_t at, int64_t bytes, const void *data) {
  if (at < 0 || bytes > w->data_bytes - at)
    return moe_fail(MOE_INVALID, "%s: more data than its tensors have", w->path);
  MOE_TRY(moe_files_write_part(w->fd, w->path, front_bytes(w) + at, bytes, data));
  __atomic_sub_fetch(&w->left, bytes, __ATOMIC_RELAXED);
  return MOE_OK;
}

moe_status moe_gguf_writer_finish(moe_gguf_writer *w) {
  if (w->left != 0)
    return moe_fail(MOE_INVALID, "%s: %" PRId64 " bytes of its tensors were not written", w->path,
                    w->left);
  int failed = fsync(w->fd) != 0 ? errno : 0;
  if (close(w->fd) != 0 && !failed) failed = errno;
  w->fd = -1;
  return failed ? moe_fail(MOE_IO, "%s: cannot fsync: %s", w->path, strerror(failed)) : MOE_OK;
}
