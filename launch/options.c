/* Reading command lines. */
#include "launch/options.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

void moe_option_print(const moe_command_line *line, int command, int width, FILE *out) {
  for (int i = 0; i < line->option_count; i++) {
    const moe_option *o = &line->options[i];
    char name[64];
    if (command && !(o->commands & command)) continue;
    snprintf(name, sizeof name, "--%s%s%s", o->name, o->argument ? " " : "",
             o->argument ? o->argument : "");
    fprintf(out, "  %-*s %s\n", width, name, o->help);
  }
}

moe_status moe_command_read(const moe_command_line *line, int *argc, char ***argv,
                            const moe_command_row **command) {
  *command = NULL;
  if (*argc < 2 || (*argv)[1][0] == '-') return MOE_OK;
  const char *name = (*argv)[1];
  for (int i = 0; i < line->command_count; i++)
    if (strcmp(line->commands[i].name, name) == 0) *command = &line->commands[i];
  if (!*command)
    return moe_fail(MOE_USAGE, "unknown command: %s: see %s --help", name, line->program);
  ++*argv;
  --*argc;
  return MOE_OK;
}

enum { MOST_OPTIONS = 64, FIRST = 256 }; /* FIRST: above every character, so above getopt's '?' */

static moe_status take(const moe_command_line *line, int option, const moe_command_row *command,
                       void *request) {
  const moe_option *o = &line->options[option];
  if (o->commands != line->any && !(command && (o->commands & command->bit)))
    return moe_fail(MOE_USAGE, "--%s is no option of this command: %s: see %s %s --help", o->name,
                    command ? command->name : "none", line->program, command ? command->name : "");
  return line->set(request, option, optarg);
}

moe_status moe_option_read(const moe_command_line *line, int argc, char **argv,
                           const moe_command_row *command, void *request) {
  struct option options[MOST_OPTIONS + 1] = {{0}};
  if (line->option_count > MOST_OPTIONS)
    return moe_fail(MOE_INVALID, "%d options: this program reads at most %d", line->option_count,
                    MOST_OPTIONS);
  for (int i = 0; i < line->option_count; i++)
    options[i] =
        (struct option){line->options[i].name, line->options[i].argument != NULL, NULL, FIRST + i};
  opterr = 0;
  for (int id; (id = getopt_long(argc, argv, "", options, NULL)) != -1;) {
    if (id < FIRST)
      return moe_fail(MOE_USAGE, "unknown or incomplete option: %s: see %s --help",
                      argv[optind - 1], line->program);
    MOE_TRY(take(line, id - FIRST, command, request));
  }
  return MOE_OK;
}

moe_status moe_option_int(const char *name, const char *text, int64_t low, int64_t high,
                          int64_t *out) {
  char *end;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (end == text || *end || errno || value < low || value > high)
    return moe_fail(MOE_USAGE, "not a number from %" PRId64 " to %" PRId64 ": --%s %s: see --help",
                    low, high, name, text);
  *out = value;
  return MOE_OK;
}

moe_status moe_option_real(const char *name, const char *text, double low, double high,
                           double *out) {
  char *end;
  double value = strtod(text, &end);
  if (end == text || *end || !(value >= low && value <= high))
    return moe_fail(MOE_USAGE, "not a number from %g to %g: --%s %s: see --help", low, high, name,
                    text);
  *out = value;
  return MOE_OK;
}

moe_status moe_option_choice(const char *name, const char *text, const char *const *choices,
                             int *out) {
  for (int i = 0; choices[i]; i++) {
    if (strcmp(choices[i], text) != 0) continue;
    *out = i;
    return MOE_OK;
  }
  return moe_fail(MOE_USAGE, "unknown choice: --%s %s: see --help", name, text);
}
