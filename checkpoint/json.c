/* JSON behind limits. */
#include "checkpoint/json.h"

#include <math.h>
#include <stdlib.h>

#include "checkpoint/files.h"

/* An upper bound of the values in the text, and how deep they nest: every value but the first
 * follows a bracket, a colon or a comma. */
static void measure(const char *text, int64_t length, int64_t *values, int64_t *depth) {
  bool quoted = false;
  int64_t now = 0;
  *values = 1;
  *depth = 0;
  for (int64_t i = 0; i < length; i++) {
    char c = text[i];
    if (quoted && c == '\\') i++;
    if (c == '"') quoted = !quoted;
    if (quoted) continue;
    *values += c == ',' || c == ':' || c == '[' || c == '{';
    now += (c == '[' || c == '{') - (c == ']' || c == '}');
    if (now > *depth) *depth = now;
  }
}

static bool only_blanks(const char *text, const char *end) {
  while (text < end && (*text == ' ' || *text == '\n' || *text == '\r' || *text == '\t')) text++;
  return text == end;
}

moe_status moe_json_parse(const char *text, int64_t length, const char *where, cJSON **out) {
  int64_t values, depth;
  *out = NULL;
  measure(text, length, &values, &depth);
  if (values > MOE_JSON_VALUES || depth > MOE_JSON_DEPTH)
    return moe_fail(MOE_DAMAGED,
                    "%s: its JSON has more than %d values, or nests more than %d deep: it is not "
                    "a file of this kind",
                    where, MOE_JSON_VALUES, MOE_JSON_DEPTH);
  const char *end = NULL;
  cJSON *root = cJSON_ParseWithLengthOpts(text, (size_t)length, &end, 0);
  if (cJSON_IsObject(root) && only_blanks(end, text + length)) {
    *out = root;
    return MOE_OK;
  }
  const char *fault = !root                   ? "is not well-formed JSON"
                      : !cJSON_IsObject(root) ? "is not a JSON object"
                                              : "has text after its JSON object";
  cJSON_Delete(root);
  return moe_fail(MOE_DAMAGED, "%s: %s", where, fault);
}

moe_status moe_json_read(const char *path, int64_t limit, cJSON **out) {
  char *text;
  int64_t length;
  *out = NULL;
  MOE_TRY(moe_files_read(path, limit, &text, &length));
  moe_status status = moe_json_parse(text, length, path, out);
  free(text);
  return status;
}

const cJSON *moe_json_member(const cJSON *object, const char *key) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
  return cJSON_IsNull(item) ? NULL : item;
}

void moe_json_fault(moe_json_reader *r, const char *key, const char *what) {
  if (r->status == MOE_OK) r->status = moe_fail(MOE_DAMAGED, "%s: \"%s\" %s", r->where, key, what);
}

int64_t moe_json_int(moe_json_reader *r, const cJSON *object, const char *key, int64_t low,
                     int64_t high) {
  const cJSON *item = moe_json_member(object, key);
  double value = cJSON_IsNumber(item) ? item->valuedouble : (double)NAN;
  /* 2^53: beyond it a double does not say which whole number was meant */
  if (value >= (double)low && value <= (double)high && fabs(value) <= 0x1p53 &&
      floor(value) == value)
    return (int64_t)value;
  moe_json_fault(r, key, item ? "is not a whole number in its range" : "is missing");
  return low;
}

double moe_json_positive(moe_json_reader *r, const cJSON *object, const char *key) {
  const cJSON *item = moe_json_member(object, key);
  if (cJSON_IsNumber(item) && item->valuedouble > 0.0 && isfinite(item->valuedouble))
    return item->valuedouble;
  moe_json_fault(r, key, item ? "is not a number above 0" : "is missing");
  return 1.0;
}

const char *moe_json_text(moe_json_reader *r, const cJSON *object, const char *key) {
  const cJSON *item = moe_json_member(object, key);
  if (cJSON_IsString(item)) return item->valuestring;
  moe_json_fault(r, key, item ? "is not a string" : "is missing");
  return "";
}
