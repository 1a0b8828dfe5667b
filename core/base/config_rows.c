/* The configuration table unrolled into arrays, and access to a row's value. */
#include "core/base/config_rows.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(section, key) #section, #key
#define MEMBER(section, key) .offset = offsetof(moe_config, section.key)

const moe_config_row moe_config_rows[] = {
#define INT(s, k, def, min, max, help)                                          \
  {MOE_ROW_INT,      AT(s, k),        help, MEMBER(s, k), .int_default = (def), \
   .int_min = (min), .int_max = (max)},
#define REAL(s, k, def, min, max, help)                                            \
  {MOE_ROW_REAL,      AT(s, k),         help, MEMBER(s, k), .real_default = (def), \
   .real_min = (min), .real_max = (max)},
#define BOOL(s, k, def, help) {MOE_ROW_BOOL, AT(s, k), help, MEMBER(s, k), .int_default = (def)},
#define TEXT(s, k, def, help) {MOE_ROW_TEXT, AT(s, k), help, MEMBER(s, k), .text_default = (def)},
#define ENUM(s, k, def, list, help) \
  {MOE_ROW_ENUM, AT(s, k), help, MEMBER(s, k), .int_default = (def), .choices = (list)},
#include "core/base/config_table.h"
#undef INT
#undef REAL
#undef BOOL
#undef TEXT
#undef ENUM
};
const int moe_config_row_count = (int)(sizeof moe_config_rows / sizeof moe_config_rows[0]);
_Static_assert(sizeof moe_config_rows / sizeof moe_config_rows[0] <= MOE_CONFIG_MAX_KEYS,
               "moe_config.origin has too few places: raise MOE_CONFIG_MAX_KEYS");

const moe_config_section moe_config_sections[] = {
#define SECTION(name, help) {#name, help},
#define INT(s, k, def, min, max, help)
#define REAL(s, k, def, min, max, help)
#define BOOL(s, k, def, help)
#define TEXT(s, k, def, help)
#define ENUM(s, k, def, list, help)
#include "core/base/config_table.h"
#undef INT
#undef REAL
#undef BOOL
#undef TEXT
#undef ENUM
};
const int moe_config_section_count =
    (int)(sizeof moe_config_sections / sizeof moe_config_sections[0]);

int moe_config_find(const char *section, const char *key) {
  for (int i = 0; i < moe_config_row_count; i++)
    if (strcmp(moe_config_rows[i].section, section) == 0 &&
        strcmp(moe_config_rows[i].key, key) == 0)
      return i;
  return -1;
}

bool moe_config_has_section(const char *name) {
  for (int i = 0; i < moe_config_section_count; i++)
    if (strcmp(moe_config_sections[i].name, name) == 0) return true;
  return false;
}

const void *moe_config_member(const moe_config *c, int row) {
  return (const char *)c + moe_config_rows[row].offset;
}

void *moe_config_member_of(moe_config *c, int row) {
  return (char *)c + moe_config_rows[row].offset;
}

void moe_config_defaults(moe_config *c) {
  memset(c, 0, sizeof *c);
  for (int i = 0; i < moe_config_row_count; i++) {
    const moe_config_row *row = &moe_config_rows[i];
    void *member = moe_config_member_of(c, i);
    switch (row->kind) {
    case MOE_ROW_INT:
      *(int64_t *)member = row->int_default;
      break;
    case MOE_ROW_REAL:
      *(double *)member = row->real_default;
      break;
    case MOE_ROW_BOOL:
      *(bool *)member = row->int_default != 0;
      break;
    case MOE_ROW_TEXT:
      snprintf(member, MOE_CONFIG_TEXT, "%s", row->text_default);
      break;
    case MOE_ROW_ENUM:
      *(int *)member = (int)row->int_default;
      break;
    }
  }
}

const char *moe_config_real_text(double value, char text[MOE_CONFIG_REAL]) {
  /* Enough digits that numbers of everyday size have no exponent. */
  int digits = 1;
  double rest = value < 0.0 ? -value : value;
  while (rest >= 10.0 && rest < 1e9) {
    rest /= 10.0;
    digits++;
  }
  for (; digits <= 17; digits++) {
    snprintf(text, MOE_CONFIG_REAL, "%.*g", digits, value);
    if (strtod(text, NULL) == value) break;
  }
  return text;
}

bool moe_config_choice(const char *choices, int index, char text[MOE_CONFIG_TEXT]) {
  for (; index > 0; index--) {
    choices = strchr(choices, '|');
    if (choices == NULL) return false;
    choices++;
  }
  snprintf(text, MOE_CONFIG_TEXT, "%.*s", (int)strcspn(choices, "|"), choices);
  return true;
}

const char *moe_config_value_text(const moe_config *c, int row, char text[MOE_CONFIG_TEXT]) {
  const void *member = moe_config_member(c, row);
  switch (moe_config_rows[row].kind) {
  case MOE_ROW_INT:
    snprintf(text, MOE_CONFIG_TEXT, "%lld", (long long)*(const int64_t *)member);
    break;
  case MOE_ROW_REAL:
    moe_config_real_text(*(const double *)member, text);
    break;
  case MOE_ROW_BOOL:
    snprintf(text, MOE_CONFIG_TEXT, "%s", *(const bool *)member ? "true" : "false");
    break;
  case MOE_ROW_TEXT:
    snprintf(text, MOE_CONFIG_TEXT, "%s", (const char *)member);
    break;
  case MOE_ROW_ENUM:
    if (!moe_config_choice(moe_config_rows[row].choices, *(const int *)member, text)) *text = '\0';
    break;
  }
  return text;
}

const char *moe_config_origin(const moe_config *c, const char *section, const char *key) {
  int row = moe_config_find(section, key);
  return row >= 0 && c->origin[row][0] != '\0' ? c->origin[row] : "default";
}

moe_status moe_config_conflict(const moe_config *c, const char *section, const char *key,
                               const char *format, ...) {
  char rest[1024], value[MOE_CONFIG_TEXT];
  va_list args;
  va_start(args, format);
  vsnprintf(rest, sizeof rest, format, args);
  va_end(args);
  return moe_fail(MOE_USAGE, "%s: [%s] %s = %s: %s", moe_config_origin(c, section, key), section,
                  key, moe_config_value_text(c, moe_config_find(section, key), value), rest);
}
