/* Writing configurations: as INI that reads back, as documentation, and as a list of what differs
 * from a checkpoint. */
#include <stdlib.h>
#include <string.h>

#include "core/base/config_rows.h"

void moe_config_print(const moe_config *c, FILE *out) {
  char text[MOE_CONFIG_TEXT];
  const char *section = "";
  for (int i = 0; i < moe_config_row_count; i++) {
    const moe_config_row *row = &moe_config_rows[i];
    if (strcmp(section, row->section) != 0) {
      fprintf(out, "%s[%s]\n", i > 0 ? "\n" : "", row->section);
      section = row->section;
    }
    const char *value = moe_config_value_text(c, i, text);
    fprintf(out, "%s =%s%s\n", row->key, *value ? " " : "", value);
  }
}

moe_status moe_config_get(const moe_config *c, const char *name, char text[MOE_CONFIG_TEXT]) {
  for (int i = 0; i < moe_config_row_count; i++) {
    const moe_config_row *row = &moe_config_rows[i];
    size_t section = strlen(row->section);
    if (strncmp(name, row->section, section) == 0 && name[section] == '.' &&
        strcmp(name + section + 1, row->key) == 0) {
      moe_config_value_text(c, i, text);
      return MOE_OK;
    }
  }
  return moe_fail(MOE_USAGE, "%s: no such setting: docs/config.md lists all as section.key", name);
}

char *moe_config_text(const moe_config *c) {
  char *text = NULL;
  size_t length = 0;
  FILE *out = open_memstream(&text, &length);
  if (out == NULL) return NULL;
  moe_config_print(c, out);
  bool failed = ferror(out) != 0;
  if (fclose(out) != 0 || failed) {
    free(text);
    return NULL;
  }
  return text;
}

/* ---- docs/config.md ------------------------------------------------------------------------ */

/* Powers of two from 2^16 up read better as such. */
static void print_int(int64_t value, FILE *out) {
  if (value >= 65536 && (value & (value - 1)) == 0)
    fprintf(out, "2^%d", __builtin_ctzll((unsigned long long)value));
  else
    fprintf(out, "%lld", (long long)value);
}

/* '|' ends a table cell. */
static void print_cell(const char *text, FILE *out) {
  for (; *text; text++) {
    if (*text == '|') fputc('\\', out);
    fputc(*text, out);
  }
}

static void print_range(const moe_config_row *row, FILE *out) {
  char text[MOE_CONFIG_TEXT];
  switch (row->kind) {
  case MOE_ROW_INT:
    print_int(row->int_min, out);
    fputs(" to ", out);
    print_int(row->int_max, out);
    break;
  case MOE_ROW_REAL:
    fprintf(out, "%s to ", moe_config_real_text(row->real_min, text));
    fputs(moe_config_real_text(row->real_max, text), out);
    break;
  case MOE_ROW_BOOL:
    fputs("`true`, `false`", out);
    break;
  case MOE_ROW_TEXT:
    fprintf(out, "up to %d bytes", MOE_CONFIG_TEXT - 1);
    break;
  case MOE_ROW_ENUM:
    for (int i = 0; moe_config_choice(row->choices, i, text); i++)
      fprintf(out, "%s`%s`", i > 0 ? ", " : "", text);
    break;
  }
}

static void print_row(const moe_config *defaults, int i, FILE *out) {
  static const char *const kinds[] = {"integer", "number", "yes/no", "text", "choice"};
  const moe_config_row *row = &moe_config_rows[i];
  char text[MOE_CONFIG_TEXT];
  moe_config_value_text(defaults, i, text);
  bool by_preset = strcmp(row->section, "model") == 0 && strcmp(text, "0") == 0;
  fprintf(out, "| `%s` | %s | ", row->key, kinds[row->kind]);
  if (by_preset)
    fputs("by preset", out);
  else if (*text == '\0')
    fputs("(empty)", out);
  else
    fprintf(out, "`%s`", text);
  fputs(" | ", out);
  print_range(row, out);
  fputs(" | ", out);
  print_cell(row->help, out);
  fputs(" |\n", out);
}

/* What each preset gives, from the presets themselves. */
static void print_presets(FILE *out) {
  static const char *const keys[] = {"vocab_size",   "hidden_size", "num_layers",  "num_heads",
                                     "num_kv_heads", "head_dim",    "num_experts", "top_k",
                                     "ffn_size",     "context"};
  enum { KEYS = sizeof keys / sizeof keys[0] };
  static moe_config c;
  char text[MOE_CONFIG_TEXT];
  int preset = moe_config_find("model", "preset");
  fputs("\n| preset |", out);
  for (int k = 0; k < KEYS; k++) fprintf(out, " %s |", keys[k]);
  fputs("\n|---|---|---|---|---|---|---|---|---|---|---|\n", out);
  for (int i = 0; moe_config_choice(moe_config_rows[preset].choices, i, text); i++) {
    moe_config_defaults(&c);
    c.model.preset = i;
    if (moe_config_resolve(&c, 0) != MOE_OK) continue; /* a test resolves every preset */
    fprintf(out, "| `%s` |", text);
    for (int k = 0; k < KEYS; k++)
      fprintf(out, " %s |", moe_config_value_text(&c, moe_config_find("model", keys[k]), text));
    fputs("\n", out);
  }
}

void moe_config_print_markdown(FILE *out) {
  static moe_config defaults; /* too large for small stacks */
  moe_config_defaults(&defaults);
  fputs("# Configuration\n\n"
        "<!-- Generated from core/base/config_table.h; change it there. -->\n\n"
        "A configuration is an INI file: `[section]` lines, `key = value` lines, comments after\n"
        "`;` or `#`. Every key is optional. `--set section.key=value` overrides the file. Unknown\n"
        "or repeated keys, values out of range and contradictions are errors that name file and\n"
        "line. `moe-train CFG --dry-run` prints every key as it will be used.\n",
        out);
  for (int s = 0; s < moe_config_section_count; s++) {
    const moe_config_section *section = &moe_config_sections[s];
    fprintf(out, "\n## [%s]\n\n%s\n\n", section->name, section->help);
    fputs("| key | type | default | range | meaning |\n|---|---|---|---|---|\n", out);
    for (int i = 0; i < moe_config_row_count; i++)
      if (strcmp(moe_config_rows[i].section, section->name) == 0) print_row(&defaults, i, out);
    if (strcmp(section->name, "model") == 0) print_presets(out);
  }
}

/* ---- resuming ------------------------------------------------------------------------------ */

/* What may not change under a run: keys that decide which function is trained and which tokens it
 * sees at which step. All of [model] but the preset, which is only a source of defaults, and: */
static const char *const resume_keys[][2] = {
    {"data", "train"},
    {"data", "valid_fraction"},
    {"data", "sequence_length"},
    {"data", "document_mask"},
    {"train", "global_batch"},
    {"train", "seed"},
    {"train", "aux_coef"},
    {"train", "aux_scope"},
    {"train", "z_coef"},
    {"train", "bias_update_rate"},
    {"train", "capacity_factor"},
};

static bool decides_the_run(const moe_config_row *row) {
  if (strcmp(row->section, "model") == 0) return strcmp(row->key, "preset") != 0;
  for (size_t i = 0; i < sizeof resume_keys / sizeof resume_keys[0]; i++)
    if (strcmp(row->section, resume_keys[i][0]) == 0 && strcmp(row->key, resume_keys[i][1]) == 0)
      return true;
  return false;
}

int moe_config_diff_for_resume(const moe_config *saved, const moe_config *now, FILE *out) {
  int different = 0;
  for (int i = 0; i < moe_config_row_count; i++) {
    const moe_config_row *row = &moe_config_rows[i];
    if (!decides_the_run(row)) continue;
    char before[MOE_CONFIG_TEXT], after[MOE_CONFIG_TEXT];
    moe_config_value_text(saved, i, before);
    moe_config_value_text(now, i, after);
    if (strcmp(before, after) == 0) continue;
    fprintf(out, "%s.%s: saved %s, now %s\n", row->section, row->key, before, after);
    different++;
  }
  return different;
}
