/* TensorBoard event files: protobuf-c packs the messages, this file frames them as TFRecords. */
#include "core/train/tfevents.h"

#include "core/base/log.h"
#include "core/train/append_file.h"
#include "core/train/tfevents.pb-c.h"

#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { TAG_BYTES = 64 };
static const double FLUSH_INTERVAL_S = 5.0;

typedef struct {
  Moe__Summary__Value message;
  char tag[TAG_BYTES];
} scalar;

struct moe_tfevents {
  moe_append_file file;
  double flushed_s;
  scalar *scalars; /* of the event in the making */
  size_t count, capacity;
};

uint32_t moe_crc32c(const void *data, size_t bytes) {
  static uint32_t table[256];
  if (table[1] == 0) {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0x82f63b78u : 0u);
      table[i] = c;
    }
  }
  const unsigned char *p = data;
  uint32_t crc = ~0u;
  for (size_t i = 0; i < bytes; i++) crc = crc >> 8 ^ table[(crc ^ p[i]) & 0xff];
  return ~crc;
}

static uint32_t masked_crc(const void *data, size_t bytes) {
  uint32_t crc = moe_crc32c(data, bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

static void write_event(moe_tfevents *w, Moe__Event *event) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  event->wall_time = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;

  size_t bytes = moe__event__get_packed_size(event);
  uint8_t *packed = malloc(bytes);
  if (packed == NULL) return;
  moe__event__pack(event, packed);
  uint64_t length = htole64(bytes);
  uint32_t length_crc = htole32(masked_crc(&length, sizeof length));
  uint32_t data_crc = htole32(masked_crc(packed, bytes));
  moe_append_bytes(&w->file, &length, sizeof length);
  moe_append_bytes(&w->file, &length_crc, sizeof length_crc);
  moe_append_bytes(&w->file, packed, bytes);
  moe_append_bytes(&w->file, &data_crc, sizeof data_crc);
  free(packed);
}

static void write_preamble(moe_tfevents *w, int64_t first_step) {
  char version[] = "brain.Event:2";
  Moe__Event event = MOE__EVENT__INIT;
  event.what_case = MOE__EVENT__WHAT_FILE_VERSION;
  event.file_version = version;
  write_event(w, &event);

  Moe__SessionLog session = MOE__SESSION_LOG__INIT;
  session.status = MOE__SESSION_LOG__STATUS__START;
  moe__event__init(&event);
  event.what_case = MOE__EVENT__WHAT_SESSION_LOG;
  event.session_log = &session;
  event.step = first_step + 1; /* TensorBoard purges this step and later ones */
  write_event(w, &event);
  moe_append_flush(&w->file);
}

moe_status moe_tfevents_create(const char *folder, int64_t first_step, moe_tfevents **out) {
  *out = NULL;
  if (mkdir(folder, 0777) != 0 && errno != EEXIST)
    return moe_fail(MOE_IO, "cannot create folder: %s: %s", folder, strerror(errno));
  moe_tfevents *w = calloc(1, sizeof *w);
  if (w == NULL) return moe_fail(MOE_NO_MEMORY, "out of memory: opening event files");

  /* TensorBoard reads files in the order of their names: time first, then what makes them unique.
   */
  char host[65] = "localhost", *path = NULL;
  gethostname(host, sizeof host - 1);
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  moe_status status;
  if (asprintf(&path, "%s/events.out.tfevents.%010lld.%s.%d.%09ld", folder, (long long)now.tv_sec,
               host, (int)getpid(), now.tv_nsec) < 0) {
    path = NULL;
    status = moe_fail(MOE_NO_MEMORY, "out of memory: opening event files in %s", folder);
  } else {
    status = moe_append_open(&w->file, path);
  }
  free(path);
  if (status != MOE_OK) {
    moe_tfevents_destroy(w);
    return status;
  }
  write_preamble(w, first_step);
  w->flushed_s = moe_clock_s();
  *out = w;
  return MOE_OK;
}

void moe_tfevents_destroy(moe_tfevents *w) {
  if (w == NULL) return;
  moe_append_close(&w->file);
  free(w->scalars);
  free(w);
}

void moe_tfevents_scalar(moe_tfevents *w, double value, const char *tag_format, ...) {
  if (w->count == w->capacity) {
    size_t capacity = 2 * w->capacity + 16;
    scalar *grown = realloc(w->scalars, capacity * sizeof *grown);
    if (grown == NULL) return;
    w->scalars = grown;
    w->capacity = capacity;
  }
  scalar *s = &w->scalars[w->count++];
  va_list args;
  va_start(args, tag_format);
  vsnprintf(s->tag, sizeof s->tag, tag_format, args);
  va_end(args);
  moe__summary__value__init(&s->message);
  s->message.value_case = MOE__SUMMARY__VALUE__VALUE_SIMPLE_VALUE;
  s->message.simple_value = (float)value;
}

void moe_tfevents_commit(moe_tfevents *w, int64_t step) {
  Moe__Summary__Value **values = malloc((w->count + 1) * sizeof(void *));
  if (values != NULL) {
    for (size_t i = 0; i < w->count; i++) {
      values[i] = &w->scalars[i].message;
      values[i]->tag = w->scalars[i].tag; /* set here: the array may have moved */
    }
    Moe__Summary summary = MOE__SUMMARY__INIT;
    summary.n_value = w->count;
    summary.value = values;
    Moe__Event event = MOE__EVENT__INIT;
    event.step = step;
    event.what_case = MOE__EVENT__WHAT_SUMMARY;
    event.summary = &summary;
    write_event(w, &event);
    free(values);
  }
  w->count = 0;

  double now_s = moe_clock_s();
  if (now_s - w->flushed_s < FLUSH_INTERVAL_S) return;
  moe_append_flush(&w->file);
  w->flushed_s = now_s;
}
