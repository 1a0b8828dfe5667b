/* Reading configurations: libinih splits lines into section, key and value; the table says what
 * each must be.
 *
 * libinih is fed through a reader of ours, one whole line at a time, because it neither tells its
 * handler line numbers nor notices section lines without keys, NUL bytes, or lines it cuts. */
#include "core/base/config.h"

#include <errno.h>
#include <ini.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/config_rows.h"

enum { FILE_LIMIT = 1 << 20, LINE_LIMIT = 2 * MOE_CONFIG_TEXT, SHOWN = 80 };

/* ---- one value ----------------------------------------------------------------------------- */

/* What a message says of the value it rejects: "cfg.ini:12: [train] steps = abc: ". */
typedef struct {
  const char *origin;
  const moe_config_row *row;
  const char *value;
} assignment;

__attribute__((format(printf, 2, 3))) static moe_status reject(assignment a, const char *format,
                                                               ...) {
  char rest[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(rest, sizeof rest, format, args);
  va_end(args);
  return moe_fail(MOE_USAGE, "%s: [%s] %s = %.*s%s: %s", a.origin, a.row->section, a.row->key,
                  SHOWN, a.value, strlen(a.value) > SHOWN ? "..." : "", rest);
}

static moe_status set_int(assignment a, int64_t *member) {
  long long min = a.row->int_min, max = a.row->int_max;
  const char *digits = a.value + (a.value[0] == '-' || a.value[0] == '+');
  if (*digits == '\0' || strspn(digits, "0123456789") != strlen(digits))
    return reject(a, "not an integer: give a whole number from %lld to %lld", min, max);
  errno = 0;
  long long value = strtoll(a.value, NULL, 10);
  if (errno == ERANGE || value < min || value > max)
    return reject(a, "out of range: give a whole number from %lld to %lld", min, max);
  *member = value;
  return MOE_OK;
}

static moe_status set_real(assignment a, double *member) {
  char min[MOE_CONFIG_REAL], max[MOE_CONFIG_REAL];
  moe_config_real_text(a.row->real_min, min);
  moe_config_real_text(a.row->real_max, max);
  char *end = NULL;
  errno = 0;
  double value = strtod(a.value, &end);
  /* strtod also takes hexadecimal, "inf" and "nan"; the digits' test leaves plain decimals. */
  if (*a.value == '\0' || strspn(a.value, "0123456789+-.eE") != strlen(a.value) || *end != '\0')
    return reject(a, "not a number: give a decimal number from %s to %s", min, max);
  if (errno == ERANGE || !(value >= a.row->real_min && value <= a.row->real_max))
    return reject(a, "out of range: give a number from %s to %s", min, max);
  *member = value;
  return MOE_OK;
}

static moe_status set_bool(assignment a, bool *member) {
  static const char *const words[] = {"false", "true", "no", "yes", "0", "1"};
  for (int i = 0; i < 6; i++) {
    if (strcmp(a.value, words[i]) != 0) continue;
    *member = i % 2 == 1;
    return MOE_OK;
  }
  return reject(a, "neither true nor false: give one of true, false, yes, no, 1, 0");
}

static moe_status set_enum(assignment a, int *member) {
  char choice[MOE_CONFIG_TEXT], list[MOE_CONFIG_TEXT] = "";
  size_t used = 0;
  for (int i = 0; moe_config_choice(a.row->choices, i, choice); i++) {
    if (strcmp(a.value, choice) == 0) {
      *member = i;
      return MOE_OK;
    }
    used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i > 0 ? ", " : "", choice);
  }
  return reject(a, "not one of the choices: give one of %s", list);
}

static moe_status set_text(assignment a, char member[MOE_CONFIG_TEXT]) {
  size_t length = strlen(a.value);
  if (length >= MOE_CONFIG_TEXT)
    return reject(a, "%zu bytes long: give at most %d", length, MOE_CONFIG_TEXT - 1);
  for (size_t i = 0; i < length; i++) {
    unsigned char byte = (unsigned char)a.value[i];
    if (byte < 0x20 || byte == 0x7f)
      return reject(a, "control character %d at byte %zu: remove it", byte, i + 1);
    /* An INI file could not hold it, and the configuration is stored as one. */
    if ((byte == ';' || byte == '#') && (i == 0 || a.value[i - 1] == ' '))
      return reject(a, "'%c' after a space begins a comment: remove the space or the '%c'", byte,
                    byte);
  }
  memcpy(member, a.value, length + 1);
  return MOE_OK;
}

static moe_status set_row(moe_config *c, int row, const char *value, const char *origin) {
  assignment a = {origin, &moe_config_rows[row], value};
  void *member = moe_config_member_of(c, row);
  switch (a.row->kind) {
  case MOE_ROW_INT:
    MOE_TRY(set_int(a, member));
    break;
  case MOE_ROW_REAL:
    MOE_TRY(set_real(a, member));
    break;
  case MOE_ROW_BOOL:
    MOE_TRY(set_bool(a, member));
    break;
  case MOE_ROW_TEXT:
    MOE_TRY(set_text(a, member));
    break;
  case MOE_ROW_ENUM:
    MOE_TRY(set_enum(a, member));
    break;
  }
  snprintf(c->origin[row], MOE_CONFIG_TEXT, "%s", origin);
  return MOE_OK;
}

/* ---- names that do not exist --------------------------------------------------------------- */

/* Levenshtein distance of two short names. */
static int distance(const char *a, const char *b) {
  enum { LONGEST = 63 };
  int row[LONGEST + 1];
  size_t n = strlen(a), m = strlen(b);
  if (n > LONGEST || m > LONGEST) return LONGEST;
  for (size_t j = 0; j <= m; j++) row[j] = (int)j;
  for (size_t i = 1; i <= n; i++) {
    int diagonal = row[0];
    row[0] = (int)i;
    for (size_t j = 1; j <= m; j++) {
      int best = diagonal + (a[i - 1] != b[j - 1]);
      if (row[j] + 1 < best) best = row[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      diagonal = row[j];
      row[j] = best;
    }
  }
  return row[m];
}

static moe_status unknown_section(const char *origin, const char *section) {
  char list[256] = "";
  size_t used = 0;
  for (int i = 0; i < moe_config_section_count; i++)
    used += (size_t)snprintf(list + used, sizeof list - used, " [%s]", moe_config_sections[i].name);
  return moe_fail(MOE_USAGE, "%s: [%.*s]: no such section: use one of%s", origin, SHOWN, section,
                  list);
}

static moe_status unknown_key(const char *origin, const char *section, const char *key) {
  /* The same key elsewhere beats a similar key here. */
  int best = -1, best_distance = 4;
  for (int i = 0; i < moe_config_row_count; i++) {
    bool here = strcmp(moe_config_rows[i].section, section) == 0;
    int d = distance(moe_config_rows[i].key, key);
    if (!here && d > 0) continue;
    if (d < best_distance) {
      best = i;
      best_distance = d;
    }
  }
  if (best >= 0)
    return moe_fail(MOE_USAGE, "%s: [%s] %.*s: no such key: did you mean [%s] %s?", origin, section,
                    SHOWN, key, moe_config_rows[best].section, moe_config_rows[best].key);
  return moe_fail(MOE_USAGE, "%s: [%s] %.*s: no such key: docs/config.md lists those of [%s]",
                  origin, section, SHOWN, key, section);
}

static moe_status find_row(const char *origin, const char *section, const char *key, int *row) {
  if (*section == '\0')
    return moe_fail(MOE_USAGE, "%s: %.*s: key outside a section: put a line like [train] above it",
                    origin, SHOWN, key);
  if (!moe_config_has_section(section)) return unknown_section(origin, section);
  *row = moe_config_find(section, key);
  return *row >= 0 ? MOE_OK : unknown_key(origin, section, key);
}

/* ---- a whole file -------------------------------------------------------------------------- */

typedef struct {
  moe_config *config;
  const char *name;
  const char *next, *end;          /* text not yet read */
  int line;                        /* of the last line handed to libinih */
  int set_at[MOE_CONFIG_MAX_KEYS]; /* line that set a row, 0: none */
  moe_status status;
  char origin[MOE_CONFIG_TEXT];
} parse;

/* "[section]" alone on its line, and one that exists: libinih would ignore what follows the
 * bracket, cut long names, and says nothing of a section without keys. */
static moe_status check_section_line(const parse *p, const char *line) {
  const char *close = strchr(line, ']');
  if (close == NULL) return MOE_OK; /* libinih reports it */
  const char *rest = close + 1 + strspn(close + 1, " \t\r\n");
  if (*rest != '\0' && *rest != ';' && *rest != '#')
    return moe_fail(MOE_USAGE, "%s: text after ']': put each key on a line of its own", p->origin);
  char name[LINE_LIMIT];
  snprintf(name, sizeof name, "%.*s", (int)(close - line - 1), line + 1);
  p->config->unknown_key = !moe_config_has_section(name);
  return p->config->unknown_key ? unknown_section(p->origin, name) : MOE_OK;
}

/* Copy the next line, at most `size` bytes with its end, and check what libinih would not. */
static moe_status next_line(parse *p, char *line, int size) {
  p->line++;
  /* Of an over-long path the tail is kept: it is what people recognise. */
  size_t length = strlen(p->name), most = MOE_CONFIG_TEXT - 16;
  snprintf(p->origin, sizeof p->origin, "%s:%d", p->name + (length > most ? length - most : 0),
           p->line);

  const char *newline = memchr(p->next, '\n', (size_t)(p->end - p->next));
  const char *stop = newline != NULL ? newline + 1 : p->end;
  size_t bytes = (size_t)(stop - p->next);
  if (bytes + 1 > (size_t)size)
    return moe_fail(MOE_USAGE, "%s: line of %zu bytes: give at most %d", p->origin, bytes,
                    size - 2);
  if (memchr(p->next, '\0', bytes) != NULL)
    return moe_fail(MOE_USAGE, "%s: a zero byte: this is not a text file, give an INI file",
                    p->origin);
  memcpy(line, p->next, bytes);
  line[bytes] = '\0';
  p->next = stop;
  const char *text = line + strspn(line, " \t");
  return *text == '[' ? check_section_line(p, text) : MOE_OK;
}

static char *read_line(char *line, int size, void *stream) {
  parse *p = stream;
  if (p->status != MOE_OK || p->next == p->end) return NULL;
  p->status = next_line(p, line, size);
  return p->status == MOE_OK ? line : NULL;
}

static moe_status set_from_file(parse *p, const char *section, const char *key, const char *value) {
  int row = -1;
  moe_status found = find_row(p->origin, section, key, &row);
  p->config->unknown_key = found != MOE_OK;
  MOE_TRY(found);
  if (p->set_at[row] > 0)
    return moe_fail(MOE_USAGE, "%s: [%s] %s: set before in line %d: keep one of the two", p->origin,
                    section, key, p->set_at[row]);
  p->set_at[row] = p->line;
  return set_row(p->config, row, value, p->origin);
}

static int handle_pair(void *user, const char *section, const char *key, const char *value) {
  parse *p = user;
  if (p->status == MOE_OK) p->status = set_from_file(p, section, key, value);
  return p->status == MOE_OK;
}

/* libinih's options are its global variables. */
static void set_ini_options(void) {
  static char comments[] = ";#";
  ini_use_stack = false; /* lines on the heap, and long enough for any value */
  ini_initial_alloc = LINE_LIMIT;
  ini_max_line = LINE_LIMIT;
  ini_allow_realloc = false;
  ini_allow_multiline = false;
  ini_allow_inline_comments = true;
  ini_inline_comment_prefixes = comments;
  ini_stop_on_first_error = true;
}

moe_status moe_config_parse(moe_config *c, const char *text, int64_t length, const char *name) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, set_ini_options);
  parse p = {.config = c, .name = name, .next = text, .end = text + length};
  int bad_line = ini_parse_stream(read_line, &p, handle_pair, &p);
  if (p.status != MOE_OK) return p.status;
  if (bad_line < 0) return moe_fail(MOE_NO_MEMORY, "%s: out of memory", name);
  if (bad_line > 0)
    return moe_fail(MOE_USAGE, "%s: neither [section] nor key = value: mend or remove the line",
                    p.origin);
  return MOE_OK;
}

moe_status moe_config_read(moe_config *c, const char *path) {
  moe_status status = MOE_OK;
  char *text = NULL;
  size_t length = 0;
  FILE *file = fopen(path, "rb");
  if (file == NULL)
    return moe_fail(MOE_USAGE, "cannot open configuration: %s: %s: check the path and permissions",
                    path, strerror(errno));
  text = malloc(FILE_LIMIT + 1);
  if (text == NULL) {
    status = moe_fail(MOE_NO_MEMORY, "%s: out of memory", path);
    goto done;
  }
  length = fread(text, 1, FILE_LIMIT + 1, file);
  if (ferror(file)) {
    status = moe_fail(MOE_USAGE, "cannot read configuration: %s: %s: give a readable INI file",
                      path, strerror(errno));
    goto done;
  }
  if (length > FILE_LIMIT) {
    status = moe_fail(MOE_USAGE,
                      "%s: larger than %d bytes: this is no configuration, give an INI "
                      "file",
                      path, FILE_LIMIT);
    goto done;
  }
  MOE_TRY_OR(status, done, moe_config_parse(c, text, (int64_t)length, path));
done:
  free(text);
  fclose(file);
  return status;
}

/* ---- --set --------------------------------------------------------------------------------- */

/* The part of [begin, end) without spaces at its ends, as a string. */
static bool trimmed(const char *begin, const char *end, char *out, size_t size) {
  while (begin < end && (*begin == ' ' || *begin == '\t')) begin++;
  while (begin < end && (end[-1] == ' ' || end[-1] == '\t')) end--;
  size_t length = (size_t)(end - begin);
  if (length >= size) return false;
  memcpy(out, begin, length);
  out[length] = '\0';
  return true;
}

moe_status moe_config_set(moe_config *c, const char *assignment_text) {
  const char *text = assignment_text;
  const char *equals = strchr(text, '=');
  const char *dot = strchr(text, '.');
  char section[64], key[64], value[LINE_LIMIT];
  if (equals == NULL || dot == NULL || dot > equals)
    return moe_fail(MOE_USAGE, "--set: %.*s: give section.key=value, as in train.steps=100", SHOWN,
                    text);
  if (!trimmed(text, dot, section, sizeof section) || !trimmed(dot + 1, equals, key, sizeof key) ||
      !trimmed(equals + 1, equals + 1 + strlen(equals + 1), value, sizeof value))
    return moe_fail(MOE_USAGE, "--set: %.*s...: too long: give a shorter value", SHOWN, text);
  int row = -1;
  MOE_TRY(find_row("--set", section, key, &row));
  return set_row(c, row, value, "--set");
}
