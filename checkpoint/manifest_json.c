/* The manifest as text.
 *
 * JSON numbers are doubles, so 64-bit integers and floats travel as strings, which read back to the
 * same bits. Each tensor slice is one line. The last member is the XXH3-128 of all text before its
 * line, so a flipped bit anywhere shows before the text is parsed. docs/formats.md lists the
 * members. */
#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checkpoint/files.h"
#include "checkpoint/manifest.h"

#define FORMAT "moe-train checkpoint"
#define WRITER "moe-train " MOE_VERSION
#define HASH_KEY "  \"manifest_xxh3_128\": \""
enum {
  HEX = MOE_HASH_TEXT - 1,
  TAIL = sizeof HASH_KEY - 1 + HEX + 4, /* ..."\n}\n */
  MAX_FILES = 1 << 20
};

/* The last member, and the end of the object. */
static const char *own_hash_line(const char *body, int64_t length, char line[TAIL + 1]) {
  char text[MOE_HASH_TEXT];
  snprintf(line, TAIL + 1, HASH_KEY "%s\"\n}\n",
           moe_hash_text(XXH3_128bits(body, (size_t)length), text));
  return line;
}

/* ---- write
 * --------------------------------------------------------------------------------------- */

static void put_text(cJSON *object, const char *key, const char *text) {
  cJSON_AddStringToObject(object, key, text);
}

static void put_i64(cJSON *object, const char *key, int64_t value) {
  char text[24];
  snprintf(text, sizeof text, "%" PRId64, value);
  put_text(object, key, text);
}

static void put_u64(cJSON *object, const char *key, uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "%" PRIu64, value);
  put_text(object, key, text);
}

static void put_hash(cJSON *object, const char *key, XXH128_hash_t hash) {
  char text[MOE_HASH_TEXT];
  put_text(object, key, moe_hash_text(hash, text));
}

/* Print `object` on one line after `lead`, and free it. */
static bool put_line(FILE *out, const char *lead, cJSON *object) {
  char *text = cJSON_PrintUnformatted(object);
  bool done = text && fprintf(out, "%s%s", lead, text) > 0;
  free(text);
  cJSON_Delete(object);
  return done;
}

static cJSON *state_object(const moe_run_state *s) {
  cJSON *o = cJSON_CreateObject();
  char text[32];
  put_i64(o, "step", s->step);
  put_i64(o, "tokens", s->tokens);
  put_i64(o, "samples", s->samples);
  put_u64(o, "seed", s->seed);
  put_u64(o, "data_fingerprint", s->data_fingerprint);
  snprintf(text, sizeof text, "%.17g", s->loss_scale);
  put_text(o, "loss_scale", text);
  put_i64(o, "loss_scale_good_steps", s->loss_scale_good_steps);
  put_text(o, "config", s->config ? s->config : "");
  cJSON *bias = cJSON_AddArrayToObject(o, "router_bias");
  for (int64_t i = 0; i < s->router_bias_count; i++) {
    snprintf(text, sizeof text, "%.9g", (double)s->router_bias[i]);
    cJSON_AddItemToArray(bias, cJSON_CreateString(text));
  }
  return o;
}

static cJSON *file_object(const moe_shard_file *f) {
  cJSON *o = cJSON_CreateObject();
  put_text(o, "name", f->name);
  put_i64(o, "size", f->size);
  put_hash(o, "metadata_xxh3_128", f->metadata);
  return o;
}

static cJSON *slice_object(const moe_slice *s) {
  char path[MOE_DATASET_PATH];
  cJSON *o = cJSON_CreateObject();
  put_text(o, "role", moe_role_name(s->role));
  put_text(o, "name", s->name);
  put_text(o, "dtype", moe_dtype_name(s->dtype));
  put_i64(o, "rows", s->shape[0]);
  if (s->dims == 2) put_i64(o, "columns", s->shape[1]);
  put_i64(o, "begin", s->begin);
  put_i64(o, "count", s->count);
  cJSON_AddNumberToObject(o, "file", s->file);
  put_text(o, "dataset", moe_slice_dataset(s, path));
  put_i64(o, "offset", s->offset);
  put_hash(o, "xxh3_128", s->hash);
  return o;
}

static bool print_body(const moe_manifest *m, FILE *out) {
  char stamp[32];
  time_t now = time(NULL);
  struct tm utc;
  gmtime_r(&now, &utc);
  strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &utc);
  fprintf(out,
          "{\n  \"format\": \"" FORMAT "\",\n  \"schema\": \"%d.%d\",\n  \"writer\": \"" WRITER
          "\",\n  \"time\": \"%s\",\n  \"ranks\": %d,\n",
          MOE_SCHEMA_MAJOR, MOE_SCHEMA_MINOR, stamp, m->ranks);
  bool done = put_line(out, "  \"state\": ", state_object(&m->state));
  fprintf(out, ",\n  \"files\": [");
  for (int i = 0; i < m->files && done; i++)
    done = put_line(out, i ? ",\n    " : "\n    ", file_object(&m->file[i]));
  fprintf(out, "\n  ],\n  \"tensors\": [");
  for (int64_t i = 0; i < m->slices && done; i++)
    done = put_line(out, i ? ",\n    " : "\n    ", slice_object(&m->slice[i]));
  fprintf(out, "\n  ],\n");
  return done;
}

static moe_status check_writable(const moe_run_state *s) {
  bool finite = isfinite(s->loss_scale);
  for (int64_t i = 0; i < s->router_bias_count; i++) finite = finite && isfinite(s->router_bias[i]);
  if (!finite)
    return moe_fail(MOE_DIVERGED, "the loss scale or router bias is not finite: nothing was saved");
  return MOE_OK;
}

moe_status moe_manifest_write(const moe_manifest *m, const char *dir) {
  MOE_TRY(check_writable(&m->state));
  char path[MOE_PATH + 32], *text = NULL;
  size_t length = 0;
  snprintf(path, sizeof path, "%s/manifest.json", dir);
  FILE *out = open_memstream(&text, &length);
  if (!out) return moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path);
  bool done = print_body(m, out) && fflush(out) == 0;
  if (done) {
    char tail[TAIL + 1];
    fputs(own_hash_line(text, (int64_t)length, tail), out);
  }
  done = fclose(out) == 0 && done;
  moe_status status = MOE_OK;
  if (!done)
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory to write it", path);
  else if (length > MOE_MANIFEST_LIMIT)
    status = moe_fail(MOE_FAILED, "%s: would be %zu bytes, more than any reader accepts (%d)", path,
                      length, MOE_MANIFEST_LIMIT);
  else
    status = moe_files_write_new(path, text, (int64_t)length);
  free(text);
  return status;
}

/* ---- read
 * ---------------------------------------------------------------------------------------- */

/* Reading stops at the first fault; `where` is the file and, inside lists, the item. */
typedef struct {
  const char *where;
  moe_status status;
} reader;

static void fault(reader *r, const char *key, const char *what) {
  if (r->status == MOE_OK) r->status = moe_fail(MOE_DAMAGED, "%s: \"%s\" %s", r->where, key, what);
}

static const char *get_text(reader *r, const cJSON *object, const char *key) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
  if (!cJSON_IsString(item)) {
    fault(r, key, item ? "is not a string" : "is missing");
    return "";
  }
  return item->valuestring;
}

/* A non-negative decimal without sign, blanks or leading zeros: one spelling per number. */
static uint64_t get_u64(reader *r, const cJSON *object, const char *key) {
  const char *text = get_text(r, object, key);
  size_t digits = strspn(text, "0123456789");
  errno = 0;
  uint64_t value = strtoull(text, NULL, 10);
  if (digits == 0 || text[digits] || (text[0] == '0' && digits > 1) || errno)
    fault(r, key, "is not a number from 0 to 2^64 - 1 in a string");
  return value;
}

static int64_t get_i64(reader *r, const cJSON *object, const char *key) {
  uint64_t value = get_u64(r, object, key);
  if (value > INT64_MAX) fault(r, key, "is beyond 2^63 - 1");
  return value > INT64_MAX ? 0 : (int64_t)value;
}

static int get_int(reader *r, const cJSON *object, const char *key, int limit) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
  double value = cJSON_IsNumber(item) ? item->valuedouble : -1;
  if (!(value >= 0 && value <= limit && floor(value) == value)) {
    fault(r, key, "is not a number in its range");
    return 0;
  }
  return (int)value;
}

static XXH128_hash_t get_hash(reader *r, const cJSON *object, const char *key) {
  const char *text = get_text(r, object, key);
  XXH128_hash_t hash = {0, 0};
  if (strlen(text) != HEX || strspn(text, "0123456789abcdef") != HEX) {
    fault(r, key, "is not a 32-digit hash");
    return hash;
  }
  char high[HEX / 2 + 1] = {0};
  memcpy(high, text, HEX / 2);
  hash.high64 = strtoull(high, NULL, 16);
  hash.low64 = strtoull(text + HEX / 2, NULL, 16);
  return hash;
}

static double real(reader *r, const char *text, const char *key, bool single) {
  char *end;
  double value = single ? (double)strtof(text, &end) : strtod(text, &end);
  if (end == text || *end || !isfinite(value)) fault(r, key, "is not a finite number in a string");
  return value;
}

static const cJSON *get_list(reader *r, const cJSON *object, const char *key) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
  if (!cJSON_IsArray(item)) fault(r, key, item ? "is not a list" : "is missing");
  return item;
}

static void *room(reader *r, int64_t count, size_t size) {
  void *memory = calloc((size_t)count + 1, size);
  if (!memory && r->status == MOE_OK)
    r->status = moe_fail(MOE_NO_MEMORY, "%s: no memory for %" PRId64 " entries", r->where, count);
  return memory;
}

static void read_state(reader *r, const cJSON *o, moe_run_state *s) {
  s->step = get_i64(r, o, "step");
  s->tokens = get_i64(r, o, "tokens");
  s->samples = get_i64(r, o, "samples");
  s->seed = get_u64(r, o, "seed");
  s->data_fingerprint = get_u64(r, o, "data_fingerprint");
  s->loss_scale = real(r, get_text(r, o, "loss_scale"), "loss_scale", false);
  s->loss_scale_good_steps = get_i64(r, o, "loss_scale_good_steps");
  const char *config = get_text(r, o, "config");
  if ((s->config = room(r, (int64_t)strlen(config), 1))) strcpy(s->config, config);
  const cJSON *list = get_list(r, o, "router_bias"), *item;
  s->router_bias_count = cJSON_GetArraySize(list);
  if (s->router_bias_count == 0 || !(s->router_bias = room(r, s->router_bias_count, sizeof(float))))
    return;
  int64_t i = 0;
  cJSON_ArrayForEach(item, list) {
    const char *text = cJSON_IsString(item) ? item->valuestring : "";
    s->router_bias[i++] = (float)real(r, text, "router_bias", true);
  }
}

static void read_files(reader *r, const cJSON *root, moe_manifest *m) {
  const cJSON *list = get_list(r, root, "files"), *o;
  int n = cJSON_GetArraySize(list);
  if (n > MAX_FILES) fault(r, "files", "has too many entries");
  if (r->status != MOE_OK || !(m->file = room(r, n, sizeof *m->file))) return;
  cJSON_ArrayForEach(o, list) {
    moe_shard_file *f = &m->file[m->files++];
    const char *name = get_text(r, o, "name");
    if (strlen(name) >= sizeof f->name) fault(r, "name", "is too long for a shard file");
    snprintf(f->name, sizeof f->name, "%s", name);
    f->size = get_i64(r, o, "size");
    f->metadata = get_hash(r, o, "metadata_xxh3_128");
  }
}

static int name_index(reader *r, const cJSON *o, const char *key, const char *(*name)(int), int n) {
  const char *text = get_text(r, o, key);
  for (int i = 0; i < n; i++)
    if (strcmp(text, name(i)) == 0) return i;
  fault(r, key, "is not known");
  return 0;
}

static const char *role_name(int i) {
  return moe_role_name((moe_role)i);
}
static const char *dtype_name(int i) {
  return moe_dtype_name((moe_dtype)i);
}

static void read_slice(reader *r, const cJSON *o, moe_slice *s) {
  const char *name = get_text(r, o, "name");
  if (strlen(name) >= sizeof s->name) fault(r, "name", "is too long for a tensor");
  snprintf(s->name, sizeof s->name, "%s", name);
  s->role = (moe_role)name_index(r, o, "role", role_name, MOE_ROLES);
  s->dtype = (moe_dtype)name_index(r, o, "dtype", dtype_name, MOE_F64 + 1);
  s->dims = cJSON_GetObjectItemCaseSensitive(o, "columns") ? 2 : 1;
  s->shape[0] = get_i64(r, o, "rows");
  s->shape[1] = s->dims == 2 ? get_i64(r, o, "columns") : 1;
  s->begin = get_i64(r, o, "begin");
  s->count = get_i64(r, o, "count");
  s->file = get_int(r, o, "file", MAX_FILES);
  s->offset = get_i64(r, o, "offset");
  s->hash = get_hash(r, o, "xxh3_128");
  char path[MOE_DATASET_PATH];
  if (strcmp(get_text(r, o, "dataset"), moe_slice_dataset(s, path)) != 0)
    fault(r, "dataset", "is not /ROLE/NAME or /ROLE/NAME@BEGIN of its slice");
}

static void read_slices(reader *r, const cJSON *root, moe_manifest *m) {
  const cJSON *list = get_list(r, root, "tensors"), *o;
  if (r->status != MOE_OK || !(m->slice = room(r, cJSON_GetArraySize(list), sizeof *m->slice)))
    return;
  const char *where = r->where;
  char here[MOE_PATH + 64];
  cJSON_ArrayForEach(o, list) {
    snprintf(here, sizeof here, "%s: tensors[%" PRId64 "]", where, m->slices);
    r->where = here;
    read_slice(r, o, &m->slice[m->slices++]);
    if (r->status != MOE_OK) break;
  }
  r->where = where;
}

static void read_root(reader *r, const cJSON *root, moe_manifest *m) {
  if (strcmp(get_text(r, root, "format"), FORMAT) != 0) fault(r, "format", "is not '" FORMAT "'");
  int major = -1, minor = -1;
  char rest;
  if (sscanf(get_text(r, root, "schema"), "%d.%d%c", &major, &minor, &rest) != 2 ||
      major != MOE_SCHEMA_MAJOR || minor < 0)
    fault(r, "schema", "is not one this program reads: use the version that wrote it");
  m->ranks = get_int(r, root, "ranks", 1 << 24);
  const cJSON *state = cJSON_GetObjectItemCaseSensitive(root, "state");
  read_state(r, state, &m->state);
  read_files(r, root, m);
  read_slices(r, root, m);
}

static bool own_hash_agrees(const char *text, int64_t length) {
  char tail[TAIL + 1];
  return length >= TAIL &&
         memcmp(text + length - TAIL, own_hash_line(text, length - TAIL, tail), TAIL) == 0;
}

moe_status moe_manifest_parse(const char *text, int64_t length, const char *where,
                              moe_manifest *out) {
  memset(out, 0, sizeof *out);
  if (!own_hash_agrees(text, length))
    return moe_fail(MOE_DAMAGED, "%s: its text does not have the hash it ends with: it was damaged",
                    where);
  cJSON *root = cJSON_ParseWithLength(text, (size_t)length);
  if (!cJSON_IsObject(root)) {
    cJSON_Delete(root);
    return moe_fail(MOE_DAMAGED, "%s: is not a JSON object", where);
  }
  reader r = {where, MOE_OK};
  read_root(&r, root, out);
  cJSON_Delete(root);
  moe_status status = r.status;
  if (status == MOE_OK) status = moe_manifest_check(out, where);
  if (status != MOE_OK) moe_manifest_clear(out);
  return status;
}

moe_status moe_manifest_read(const char *dir, moe_manifest *out) {
  char path[MOE_PATH + 32], *text;
  int64_t length;
  memset(out, 0, sizeof *out);
  snprintf(path, sizeof path, "%s/manifest.json", dir);
  MOE_TRY(moe_files_read(path, MOE_MANIFEST_LIMIT, &text, &length));
  moe_status status = moe_manifest_parse(text, length, path, out);
  free(text);
  return status;
}
