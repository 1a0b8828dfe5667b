/* metrics.jsonl. Numbers are printed so that they read back to the same bits, which cJSON's printer
 * does not promise; cJSON reads. */
#include "core/train/metrics_log.h"

#include "core/base/log.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 4 << 20 }; /* 4096 layers need a tenth of it */

/* ---- writing ------------------------------------------------------------------------------- */

static void text(moe_json *j, const char *s) {
  moe_append_bytes(j->file, s, strlen(s));
}

static void key_text(moe_json *j, const char *key) {
  if (j->comma) text(j, ", ");
  j->comma = true;
  if (key == NULL) return;
  text(j, "\"");
  text(j, key);
  text(j, "\": ");
}

moe_json moe_json_line(moe_append_file *file) {
  return (moe_json){.file = file};
}

void moe_json_begin(moe_json *j, const char *key, char bracket) {
  key_text(j, key);
  text(j, bracket == '{' ? "{" : "[");
  j->comma = false;
}

void moe_json_end(moe_json *j, char bracket) {
  text(j, bracket == '}' ? "}" : "]");
  j->comma = true;
}

void moe_json_int(moe_json *j, const char *key, int64_t value) {
  char digits[32];
  snprintf(digits, sizeof digits, "%" PRId64, value);
  key_text(j, key);
  text(j, digits);
}

void moe_json_real(moe_json *j, const char *key, double value) {
  if (!isfinite(value)) {
    moe_json_null(j, key);
    return;
  }
  char digits[32];
  for (int precision = 15; precision <= 17; precision++) {
    snprintf(digits, sizeof digits, "%.*g", precision, value);
    if (strtod(digits, NULL) == value) break;
  }
  key_text(j, key);
  text(j, digits);
}

void moe_json_bool(moe_json *j, const char *key, bool value) {
  key_text(j, key);
  text(j, value ? "true" : "false");
}

void moe_json_null(moe_json *j, const char *key) {
  key_text(j, key);
  text(j, "null");
}

void moe_json_line_end(moe_json *j) {
  text(j, "\n");
  moe_append_flush(j->file);
}

/* ---- cutting ------------------------------------------------------------------------------- */

typedef enum { KEEP, LATER, NOT_A_RECORD } line_kind;

static line_kind judge(const char *line, size_t length, int64_t last_step) {
  if (length == 0 || line[length - 1] != '\n') return NOT_A_RECORD;
  cJSON *json = cJSON_ParseWithLength(line, length);
  const cJSON *step = cJSON_GetObjectItemCaseSensitive(json, "step");
  line_kind kind = NOT_A_RECORD;
  if (cJSON_IsNumber(step)) kind = step->valuedouble <= (double)last_step ? KEEP : LATER;
  cJSON_Delete(json);
  return kind;
}

/* Copies the lines to keep. Memory is bounded: pieces of an overlong line are no records. */
static moe_status copy_kept(FILE *in, FILE *out, const char *path, int64_t last_step) {
  char *line = malloc(LINE_MAX_BYTES);
  if (line == NULL) return moe_fail(MOE_NO_MEMORY, "out of memory: reading %s", path);
  int64_t damaged = 0;
  bool inside = false; /* an overlong line */
  while (fgets(line, LINE_MAX_BYTES, in) != NULL) {
    size_t length = strlen(line);
    line_kind kind = inside ? NOT_A_RECORD : judge(line, length, last_step);
    if (kind == KEEP) fwrite(line, 1, length, out);
    if (kind == NOT_A_RECORD && !inside) damaged++;
    inside = length == LINE_MAX_BYTES - 1 && line[length - 1] != '\n';
  }
  free(line);
  if (ferror(in)) return moe_fail(MOE_IO, "cannot read: %s: %s", path, strerror(errno));
  if (damaged > 0)
    moe_warn("removed %" PRId64 " line(s) that are not whole records (a crash may tear the last "
             "one): %s",
             damaged, path);
  return MOE_OK;
}

moe_status moe_metrics_log_cut(const char *path, int64_t last_step) {
  FILE *in = fopen(path, "re");
  if (in == NULL && errno == ENOENT) return MOE_OK;
  if (in == NULL) return moe_fail(MOE_IO, "cannot read: %s: %s", path, strerror(errno));

  moe_status status = MOE_OK;
  FILE *out = NULL;
  char *fresh = NULL;
  if (asprintf(&fresh, "%s.new", path) < 0) {
    fresh = NULL;
    status = moe_fail(MOE_NO_MEMORY, "out of memory: rewriting %s", path);
    goto done;
  }
  out = fopen(fresh, "we");
  if (out == NULL) {
    status = moe_fail(MOE_IO, "cannot write: %s: %s", fresh, strerror(errno));
    goto done;
  }
  MOE_TRY_OR(status, done, copy_kept(in, out, path, last_step));
  bool written = !ferror(out) && fflush(out) == 0 && fsync(fileno(out)) == 0;
  if (fclose(out) != 0) written = false;
  out = NULL;
  if (!written || rename(fresh, path) != 0)
    status = moe_fail(MOE_IO, "cannot replace: %s: %s", path, strerror(errno));
done:
  if (out != NULL) fclose(out);
  if (status != MOE_OK && fresh != NULL) unlink(fresh);
  free(fresh);
  fclose(in);
  return status;
}
