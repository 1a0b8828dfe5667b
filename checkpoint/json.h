/* JSON from files nobody vouches for: cJSON behind limits, and checked ways to ask for members.
 *
 * cJSON makes 64 bytes of every value, so a file of a few MB could ask for a thousand times its
 * size in memory, and nesting for all of the stack: text is counted before it is parsed. Questions
 * stop at the first fault, which names `where` and the member. All functions are local. */
#ifndef MOE_CHECKPOINT_JSON_H
#define MOE_CHECKPOINT_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_JSON_VALUES = 2 << 20, MOE_JSON_DEPTH = 32 };

/* Parse an object. MOE_DAMAGED: not JSON, not an object, text after its end, too many values or too
 * deep. The caller frees *out with cJSON_Delete. */
moe_status moe_json_parse(const char *text, int64_t length, const char *where, cJSON **out);
/* A file of at most `limit` bytes. */
moe_status moe_json_read(const char *path, int64_t limit, cJSON **out);

typedef struct {
  const char *where;
  moe_status status; /* of the first fault; later questions answer with their default */
} moe_json_reader;

/* NULL when the member is missing or null. */
const cJSON *moe_json_member(const cJSON *object, const char *key);
void moe_json_fault(moe_json_reader *r, const char *key, const char *what);
/* A whole number from low to high. */
int64_t moe_json_int(moe_json_reader *r, const cJSON *object, const char *key, int64_t low,
                     int64_t high);
/* A number above 0. */
double moe_json_positive(moe_json_reader *r, const cJSON *object, const char *key);
const char *moe_json_text(moe_json_reader *r, const cJSON *object, const char *key);

#ifdef __cplusplus
}
#endif
#endif
