/* Event files, read back by a decoder that knows only the two specifications: TFRecord framing and
 * protobuf's wire format. */
#include "core/train/tfevents.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
  double wall_time;
  int64_t step;
  char version[32];
  int session;
  int scalars;
  char tag[8][32];
  float value[8];
} event;

/* ---- decoder ------------------------------------------------------------------------------- */

typedef struct {
  const unsigned char *at, *end;
} span;

static uint64_t little_endian(span *s, int bytes) {
  cr_assert(ge(i64, s->end - s->at, bytes), "record cut short");
  uint64_t v = 0;
  for (int i = 0; i < bytes; i++) v |= (uint64_t)*s->at++ << (8 * i);
  return v;
}

static uint64_t varint(span *s) {
  uint64_t v = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    uint64_t byte = little_endian(s, 1);
    v |= (byte & 0x7f) << shift;
    if (byte < 0x80) return v;
  }
  cr_fatal("varint too long");
  return 0;
}

static span bytes_field(span *s) {
  uint64_t n = varint(s);
  cr_assert(le(u64, n, (uint64_t)(s->end - s->at)));
  span inner = {s->at, s->at + n};
  s->at += n;
  return inner;
}

static void copy_text(span from, char *to, size_t size) {
  size_t n = (size_t)(from.end - from.at);
  cr_assert(lt(sz, n, size));
  memcpy(to, from.at, n);
  to[n] = '\0';
}

static void decode_value(span s, event *e) {
  cr_assert(lt(int, e->scalars, 8));
  while (s.at < s.end) {
    uint64_t key = varint(&s);
    if (key == (1 << 3 | 2)) { /* tag, bytes */
      copy_text(bytes_field(&s), e->tag[e->scalars], sizeof e->tag[0]);
    } else {
      cr_assert(eq(u64, key, 2 << 3 | 5)); /* simple_value, 32 bits */
      uint32_t bits = (uint32_t)little_endian(&s, 4);
      memcpy(&e->value[e->scalars], &bits, 4);
    }
  }
  e->scalars++;
}

static event decode_event(span s) {
  event e = {0};
  while (s.at < s.end) {
    uint64_t key = varint(&s);
    span inner;
    switch (key) {
    case 1 << 3 | 1: {
      uint64_t bits = little_endian(&s, 8);
      memcpy(&e.wall_time, &bits, 8);
      break;
    }
    case 2 << 3 | 0:
      e.step = (int64_t)varint(&s);
      break;
    case 3 << 3 | 2:
      copy_text(bytes_field(&s), e.version, sizeof e.version);
      break;
    case 5 << 3 | 2:
      inner = bytes_field(&s);
      while (inner.at < inner.end) {
        cr_assert(eq(u64, varint(&inner), 1 << 3 | 2));
        decode_value(bytes_field(&inner), &e);
      }
      break;
    case 7 << 3 | 2:
      inner = bytes_field(&s);
      cr_assert(eq(u64, varint(&inner), 1 << 3 | 0));
      e.session = (int)varint(&inner);
      break;
    default:
      cr_fatal("field %llu is not expected", (unsigned long long)key);
    }
  }
  return e;
}

static uint32_t unmask(uint32_t masked) {
  uint32_t rotated = masked - 0xa282ead8u;
  return rotated >> 17 | rotated << 15;
}

/* Reads every record of the only event file in `folder`; returns how many. */
static int read_events(const char *folder, event *events, int room) {
  char pattern[256];
  snprintf(pattern, sizeof pattern, "%s/events.out.tfevents.*", folder);
  glob_t found;
  cr_assert(eq(int, glob(pattern, 0, NULL, &found), 0));
  cr_assert(eq(sz, found.gl_pathc, 1));
  FILE *f = fopen(found.gl_pathv[0], "rb");
  globfree(&found);
  static unsigned char data[1 << 20];
  size_t size = fread(data, 1, sizeof data, f);
  fclose(f);

  span s = {data, data + size};
  int n = 0;
  for (; s.at < s.end; n++) {
    cr_assert(lt(int, n, room));
    const unsigned char *length_at = s.at;
    uint64_t length = little_endian(&s, 8);
    cr_assert(eq(u32, unmask((uint32_t)little_endian(&s, 4)), moe_crc32c(length_at, 8)));
    cr_assert(le(u64, length, (uint64_t)(s.end - s.at)));
    span record = {s.at, s.at + length};
    s.at += length;
    cr_assert(eq(u32, unmask((uint32_t)little_endian(&s, 4)), moe_crc32c(record.at, length)));
    events[n] = decode_event(record);
  }
  return n;
}

/* ---- tests --------------------------------------------------------------------------------- */

static char folder[] = "/tmp/moe-tfevents-XXXXXX";

static void make_folder(void) {
  cr_assert(ne(ptr, mkdtemp(folder), NULL));
}
static void remove_folder(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf %s", folder);
  cr_assert(eq(int, system(command), 0));
}
TestSuite(tfevents, .init = make_folder, .fini = remove_folder);

Test(crc32c, gives_the_published_values) {
  unsigned char zeros[32] = {0}, ones[32], up[32];
  memset(ones, 0xff, 32);
  for (int i = 0; i < 32; i++) up[i] = (unsigned char)i;
  cr_assert(eq(u32, moe_crc32c("123456789", 9), 0xe3069283u));
  cr_assert(eq(u32, moe_crc32c(zeros, 32), 0x8a9136aau)); /* RFC 3720, B.4 */
  cr_assert(eq(u32, moe_crc32c(ones, 32), 0x62a8ab43u));
  cr_assert(eq(u32, moe_crc32c(up, 32), 0x46dd794eu));
  cr_assert(eq(u32, moe_crc32c("", 0), 0u));
}

Test(tfevents, begins_with_the_version_and_what_to_forget) {
  moe_tfevents *w;
  cr_assert(eq(int, moe_tfevents_create(folder, 41, &w), MOE_OK));
  moe_tfevents_destroy(w);
  event e[4];
  cr_assert(eq(int, read_events(folder, e, 4), 2));
  cr_assert(eq(str, e[0].version, "brain.Event:2"));
  cr_assert(eq(int, e[1].session, 1));
  cr_assert(eq(i64, e[1].step, 42));
  cr_assert(gt(dbl, e[1].wall_time, 1.7e9));
}

Test(tfevents, holds_the_scalars_of_each_step_in_order) {
  moe_tfevents *w;
  cr_assert(eq(int, moe_tfevents_create(folder, 0, &w), MOE_OK));
  for (int step = 1; step <= 3; step++) {
    moe_tfevents_scalar(w, 5.0 / step, "loss/ce");
    moe_tfevents_scalar(w, 0.0, "load/%03d", step);
    moe_tfevents_commit(w, step);
  }
  moe_tfevents_destroy(w);
  event e[8];
  cr_assert(eq(int, read_events(folder, e, 8), 5));
  for (int step = 1; step <= 3; step++) {
    const event *got = &e[step + 1];
    char tag[32];
    snprintf(tag, sizeof tag, "load/%03d", step);
    cr_assert(eq(i64, got->step, step));
    cr_assert(eq(int, got->scalars, 2));
    cr_assert(eq(str, (char *)got->tag[0], "loss/ce"));
    cr_assert(eq(flt, got->value[0], (float)(5.0 / step)));
    cr_assert(eq(str, (char *)got->tag[1], tag));
    cr_assert(eq(flt, got->value[1], 0.0f));
  }
}

Test(tfevents, names_the_folder_it_cannot_make) {
  moe_tfevents *w;
  cr_assert(eq(int, moe_tfevents_create("/nonexistent/tensorboard", 0, &w), MOE_IO));
  cr_assert(eq(ptr, w, NULL));
  cr_assert(ne(ptr, strstr(moe_error_message(), "/nonexistent/tensorboard"), NULL));
}

/* TensorBoard itself, where it is installed. */
Test(tfevents, is_read_by_tensorboard) {
  if (system("python3 -c 'import tensorboard' 2>/dev/null") != 0)
    cr_skip_test("no tensorboard for python3");
  moe_tfevents *w;
  cr_assert(eq(int, moe_tfevents_create(folder, 0, &w), MOE_OK));
  moe_tfevents_scalar(w, 2.5, "loss/ce");
  moe_tfevents_commit(w, 7);
  moe_tfevents_destroy(w);
  char command[512];
  snprintf(command, sizeof command,
           "python3 -c \"from tensorboard.backend.event_processing.event_accumulator import "
           "EventAccumulator as A; a = A('%s'); a.Reload(); s, = a.Scalars('loss/ce'); "
           "assert (s.step, s.value) == (7, 2.5)\"",
           folder);
  cr_assert(eq(int, system(command), 0));
}
