/* The configuration table as data: one moe_config_row per key. Private to core/base/config*.c (and
 * the tests); everyone else uses config.h. */
#ifndef MOE_CORE_BASE_CONFIG_ROWS_H
#define MOE_CORE_BASE_CONFIG_ROWS_H

#include "core/base/config.h"

enum { MOE_CONFIG_REAL = 32 }; /* room for the text of any double */

typedef enum { MOE_ROW_INT, MOE_ROW_REAL, MOE_ROW_BOOL, MOE_ROW_TEXT, MOE_ROW_ENUM } moe_row_kind;

typedef struct {
  moe_row_kind kind;
  const char *section, *key, *help;
  size_t offset;                         /* of the member in moe_config */
  int64_t int_default, int_min, int_max; /* INT; default also of BOOL and ENUM */
  double real_default, real_min, real_max;
  const char *text_default;
  const char *choices; /* ENUM: "a|b|c" */
} moe_config_row;

typedef struct {
  const char *name, *help;
} moe_config_section;

extern const moe_config_row moe_config_rows[];
extern const int moe_config_row_count;
extern const moe_config_section moe_config_sections[];
extern const int moe_config_section_count;

/* Index of a row, -1 when there is none. */
int moe_config_find(const char *section, const char *key);
bool moe_config_has_section(const char *name);

/* The row's member in c. */
const void *moe_config_member(const moe_config *c, int row);
void *moe_config_member_of(moe_config *c, int row);

/* A row's value as it is written in an INI file; numbers in the fewest digits that read back to the
 * same. Returns `text`. */
const char *moe_config_value_text(const moe_config *c, int row, char text[MOE_CONFIG_TEXT]);
const char *moe_config_real_text(double value, char text[MOE_CONFIG_REAL]);
/* Copy choice number `index` of "a|b|c" into text; false past the end. */
bool moe_config_choice(const char *choices, int index, char text[MOE_CONFIG_TEXT]);

/* moe_fail(MOE_USAGE) as "ORIGIN: [section] key = value: " and the formatted rest. */
moe_status moe_config_conflict(const moe_config *c, const char *section, const char *key,
                               const char *format, ...) __attribute__((format(printf, 4, 5)));

#endif
