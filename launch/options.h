/* Command lines: tables of options and commands that drive parser and --help, and values read whole
 * and checked, refused with the option's name. */
#ifndef MOE_LAUNCH_OPTIONS_H
#define MOE_LAUNCH_OPTIONS_H

#include <stdint.h>
#include <stdio.h>

#include "core/base/status.h"

/* A program draws its rows as an X-macro OPTIONS(X) of X(ID, name, argument, commands, help), with
 *     enum { OPTIONS(MOE_OPTION_ID) };  static const moe_option rows[] = {OPTIONS(MOE_OPTION_ROW)};
 * so that OPTION_ID is the number of its row. */
typedef struct {
  const char *name, *argument; /* NULL: takes none */
  int commands;                /* bits of those it belongs to */
  const char *help;
} moe_option;
#define MOE_OPTION_ID(id, name, argument, commands, help) OPTION_##id,
#define MOE_OPTION_ROW(id, name, argument, commands, help) {name, argument, commands, help},

typedef struct {
  const char *name;
  int bit;
  const char *usage, *help; /* usage: what follows the name; NULL where the program's says it */
} moe_command_row;

typedef struct {
  const char *program;
  const moe_option *options;
  int option_count;
  const moe_command_row *commands; /* NULL: the program has none */
  int command_count;
  int any; /* the bits of an option that may stand without a command */
  moe_status (*set)(void *request, int option, const char *text);
} moe_command_line;

/* The options of `command` (its bit; 0: all), a line each, names in `width` columns. */
void moe_option_print(const moe_command_line *line, int command, int width, FILE *out);
/* If the first word is no option it names a command: *command is its row, else NULL, and the word
 * is passed over in *argc and *argv. MOE_USAGE: an unknown one. */
moe_status moe_command_read(const moe_command_line *line, int *argc, char ***argv,
                            const moe_command_row **command);
/* Give the options to line->set; getopt's optind is then at what is left. `command` may be NULL.
 * MOE_USAGE: unknown, incomplete, or of another command. */
moe_status moe_option_read(const moe_command_line *line, int argc, char **argv,
                           const moe_command_row *command, void *request);

/* Values. All local; MOE_USAGE. */
moe_status moe_option_int(const char *name, const char *text, int64_t low, int64_t high,
                          int64_t *out);
moe_status moe_option_real(const char *name, const char *text, double low, double high,
                           double *out);
/* The place of `text` in a list of choices that ends in NULL. */
moe_status moe_option_choice(const char *name, const char *text, const char *const *choices,
                             int *out);

#endif
