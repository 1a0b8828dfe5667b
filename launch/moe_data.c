/* moe-data: tokenizers and token files. The options are one table: it drives the parser, --help and
 * the check that an option belongs to the command. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/files.h"
#include "core/base/log.h"
#include "data/encode_pool.h"
#include "data/tokenize.h"
#include "launch/options.h"
#include "launch/program.h"

enum { TRAIN = 1, TOKENIZE = 2, INSPECT = 4, VERIFY = 8, TEXT = TRAIN | TOKENIZE, ANY = 15 };

/* id, name, argument (NULL: none), commands, help */
#define OPTIONS(X)                                                                                \
  X(INPUT, "input", "FILE", TEXT, "text to read, - for standard input; repeat for more files")    \
  X(OUTPUT, "output", "PREFIX", TEXT, "write PREFIX.model, or PREFIX.bin and PREFIX.idx")         \
  X(OVERWRITE, "overwrite", NULL, TEXT, "replace output files that exist")                        \
  X(TOKENIZER, "tokenizer", "MODEL", TOKENIZE | INSPECT | VERIFY,                                 \
    "SentencePiece .model, or bytes")                                                             \
  X(VOCAB, "vocab-size", "N", TRAIN | VERIFY, "pieces to learn (32000); ids must be below this")  \
  X(TYPE, "model-type", "TYPE", TRAIN, "unigram (default) or bpe")                                \
  X(COVERAGE, "character-coverage", "P", TRAIN, "share of characters not left to bytes (0.9995)") \
  X(SENTENCES, "max-sentences", "N", TRAIN, "learn from a random sample of N lines (1000000)")    \
  X(WORKERS, "workers", "N", TEXT, "processes, or threads that learn (all cores)")                \
  X(EOS, "append-eos", NULL, TOKENIZE, "end each document with <eos> (default)")                  \
  X(NO_EOS, "no-append-eos", NULL, TOKENIZE, "do not")                                            \
  X(BOS, "prepend-bos", NULL, TOKENIZE, "begin each document with <bos>")                         \
  X(NO_BOS, "no-prepend-bos", NULL, TOKENIZE, "do not (default)")                                 \
  X(FORMAT, "format", "FORMAT", TEXT, "text, jsonl, or auto (default: by the file's name)")       \
  X(SPLIT, "split-documents", "HOW", TEXT, "plain text's documents: file, blank-lines or lines")  \
  X(SEPARATOR, "separator", "LINE", TEXT, "documents end at this line, such as <|endoftext|>")    \
  X(JSON_KEY, "json-key", "KEY", TEXT, "where a JSON record has its text (text)")                 \
  X(SKIP, "skip-invalid", NULL, TEXT, "leave out and count lines that are not UTF-8 or not JSON") \
  X(HELP, "help", NULL, ANY, "print this")                                                        \
  X(VERSION, "version", NULL, ANY, "print the version")

enum { OPTIONS(MOE_OPTION_ID) };
static const moe_option option_table[] = {OPTIONS(MOE_OPTION_ROW)};

static const moe_command_row command_table[] = {
    {"train-tokenizer", TRAIN, NULL, "learn a SentencePiece model from text"},
    {"tokenize", TOKENIZE, NULL, "encode text as a token file that moe-train reads"},
    {"inspect", INSPECT, NULL, "print a token file's sizes and, with --tokenizer, its beginning"},
    {"verify", VERIFY, NULL, "check a token file's structure and every token id"},
};
enum { COMMANDS = sizeof command_table / sizeof command_table[0] };

static moe_status set_option(void *context, int id, const char *text);
static const moe_command_line command_line = {.program = "moe-data",
                                              .options = option_table,
                                              .option_count =
                                                  sizeof option_table / sizeof option_table[0],
                                              .commands = command_table,
                                              .command_count = COMMANDS,
                                              .any = ANY,
                                              .set = set_option};

typedef struct {
  int command; /* 0: none given */
  const char *command_name;
  const char **arguments; /* [argument_count] --input and plain arguments */
  int argument_count;
  moe_text_options text;
  moe_tokenizer_training training;
  const char *output, *tokenizer;
  int64_t vocab_size, workers;
  bool append_eos, prepend_bos, overwrite, help, version;
} request;

/* ---- help ---- */

static void print_help(int command) {
  printf("Usage: moe-data COMMAND [options] [FILE...]\n\n");
  for (int i = 0; i < COMMANDS; i++)
    if (!command || command == command_table[i].bit)
      printf("  %-16s %s\n", command_table[i].name, command_table[i].help);
  printf("\n");
  moe_option_print(&command_line, command, 24, stdout);
  printf("\nFiles of tokens are named by their prefix: PREFIX means PREFIX.bin and PREFIX.idx.\n"
         "Plain text is kept byte for byte. A document is a whole file unless --split-documents\n"
         "or --separator says otherwise; in JSON lines it is a record.\n"
         "Exit codes: 0 done, 1 failed, 2 bad usage, 3 damaged input file.\n");
}

/* ---- the command line ---- */

static moe_status parse_share(const char *name, const char *text, double *out) {
  char *end;
  double value = strtod(text, &end);
  if (end == text || *end || !(value > 0 && value <= 1))
    return moe_fail(MOE_USAGE, "not a share above 0 and up to 1: --%s %s: see --help", name, text);
  *out = value;
  return MOE_OK;
}

static moe_status set_option(void *context, int id, const char *text) {
  request *r = context;
  static const char *const formats[] = {"auto", "text", "jsonl", NULL};
  static const char *const splits[] = {"file", "blank-lines", "lines", NULL};
  static const char *const types[] = {"unigram", "bpe", NULL};
  const char *name = option_table[id].name;
  int choice = 0;
  switch (id) {
  case OPTION_INPUT:
    r->arguments[r->argument_count++] = text;
    break;
  case OPTION_OUTPUT:
    r->output = text;
    break;
  case OPTION_OVERWRITE:
    r->overwrite = true;
    break;
  case OPTION_TOKENIZER:
    r->tokenizer = text;
    break;
  case OPTION_VOCAB:
    return moe_option_int(name, text, 1, 1 << 24, &r->vocab_size);
  case OPTION_TYPE:
    MOE_TRY(moe_option_choice(name, text, types, &choice));
    r->training.model_type = types[choice];
    break;
  case OPTION_COVERAGE:
    return parse_share(name, text, &r->training.character_coverage);
  case OPTION_SENTENCES:
    return moe_option_int(name, text, 1, 1 << 30, &r->training.max_sentences);
  case OPTION_WORKERS:
    return moe_option_int(name, text, 1, MOE_ENCODE_WORKERS, &r->workers);
  case OPTION_EOS:
    r->append_eos = true;
    break;
  case OPTION_NO_EOS:
    r->append_eos = false;
    break;
  case OPTION_BOS:
    r->prepend_bos = true;
    break;
  case OPTION_NO_BOS:
    r->prepend_bos = false;
    break;
  case OPTION_FORMAT:
    MOE_TRY(moe_option_choice(name, text, formats, &choice));
    r->text.format = (moe_text_format)choice;
    break;
  case OPTION_SPLIT:
    MOE_TRY(moe_option_choice(name, text, splits, &choice));
    r->text.documents = (moe_text_documents)choice;
    break;
  case OPTION_SEPARATOR:
    r->text.separator = text;
    r->text.documents = MOE_DOCUMENT_SEPARATOR;
    break;
  case OPTION_JSON_KEY:
    r->text.json_key = text;
    break;
  case OPTION_SKIP:
    r->text.skip_invalid = true;
    break;
  case OPTION_HELP:
    r->help = true;
    break;
  case OPTION_VERSION:
    r->version = true;
    break;
  default:
    return moe_fail(MOE_INVALID, "option %d is not handled", id);
  }
  return MOE_OK;
}

/* Before the command only --help and --version make sense. */
static moe_status parse(int argc, char **argv, request *r) {
  const moe_command_row *command;
  MOE_TRY(moe_command_read(&command_line, &argc, &argv, &command));
  if (command) {
    r->command = command->bit;
    r->command_name = command->name;
  }
  MOE_TRY(moe_option_read(&command_line, argc, argv, command, r));
  while (optind < argc) r->arguments[r->argument_count++] = argv[optind++];
  return MOE_OK;
}

/* ---- checks that need the whole command line ---- */

static moe_status check_output(const request *r) {
  static const char *const suffix[] = {".model", ".bin", ".idx"};
  if (!r->output)
    return moe_fail(MOE_USAGE, "no output: %s: give --output PREFIX", r->command_name);
  for (int i = r->command == TRAIN ? 0 : 1; i < (r->command == TRAIN ? 1 : 3); i++) {
    char *path = NULL;
    if (asprintf(&path, "%s%s", r->output, suffix[i]) < 0)
      return moe_fail(MOE_NO_MEMORY, "out of memory: command line");
    moe_status status = MOE_OK;
    if (!r->overwrite && access(path, F_OK) == 0)
      status =
          moe_fail(MOE_USAGE, "output exists: %s: choose another --output, or --overwrite", path);
    free(path);
    MOE_TRY(status);
  }
  return MOE_OK;
}

static moe_status check(const request *r) {
  if (!r->command) return moe_fail(MOE_USAGE, "no command: see moe-data --help");
  if (r->argument_count == 0)
    return moe_fail(MOE_USAGE, "no %s: %s: %s", r->command & TEXT ? "input" : "token file",
                    r->command_name, r->command & TEXT ? "give --input FILE" : "name its PREFIX");
  if (r->text.documents == MOE_DOCUMENT_SEPARATOR && (!r->text.separator || !*r->text.separator))
    return moe_fail(MOE_USAGE, "--separator is empty: use --split-documents=blank-lines");
  if (r->command & TEXT) MOE_TRY(check_output(r));
  if (r->command == TOKENIZE && !r->tokenizer)
    return moe_fail(MOE_USAGE, "no tokenizer: tokenize: give --tokenizer MODEL, or bytes");
  if (r->command == VERIFY && !r->tokenizer && r->vocab_size == 0)
    return moe_fail(MOE_USAGE, "no vocabulary: verify: give --vocab-size N or --tokenizer MODEL");
  return MOE_OK;
}

/* ---- the commands ---- */

/* Before work that may take minutes. */
static moe_status make_output_folder(const request *r) {
  const char *slash = r->output ? strrchr(r->output, '/') : NULL;
  if (!slash || slash == r->output) return MOE_OK;
  char *folder = strndup(r->output, (size_t)(slash - r->output));
  if (!folder) return moe_fail(MOE_NO_MEMORY, "out of memory: command line");
  moe_status status = moe_files_make_folders(folder);
  free(folder);
  return status;
}

static moe_status train(const request *r) {
  moe_train_tokenizer_options o = {
      .inputs = r->arguments,
      .input_count = r->argument_count,
      .text = r->text,
      .output = r->output,
      .training = r->training,
  };
  if (r->vocab_size > 0) o.training.vocab_size = r->vocab_size;
  o.training.threads = (int)r->workers;
  return moe_train_tokenizer(&o);
}

static moe_status tokenize(const request *r) {
  const moe_tokenize_options o = {
      .inputs = r->arguments,
      .input_count = r->argument_count,
      .text = r->text,
      .tokenizer = r->tokenizer,
      .output = r->output,
      .workers = (int)r->workers,
      .append_eos = r->append_eos,
      .prepend_bos = r->prepend_bos,
  };
  return moe_tokenize(&o);
}

static moe_status inspect(const request *r) {
  for (int i = 0; i < r->argument_count; i++) {
    if (i > 0) printf("\n");
    MOE_TRY(moe_inspect_tokens(r->arguments[i], r->tokenizer, stdout));
  }
  return MOE_OK;
}

static moe_status verify(const request *r) {
  int64_t vocab_size = r->vocab_size;
  if (r->tokenizer) {
    moe_tokenizer *t;
    MOE_TRY(moe_tokenizer_open(r->tokenizer, &t));
    vocab_size = moe_tokenizer_vocab_size(t);
    moe_tokenizer_close(t);
  }
  for (int i = 0; i < r->argument_count; i++)
    MOE_TRY(moe_verify_tokens(r->arguments[i], vocab_size, &moe_stop_asked));
  return MOE_OK;
}

static moe_status execute(const request *r) {
  if (r->help) print_help(r->command);
  if (r->version) printf("moe-data %s\n", MOE_VERSION);
  if (r->help || r->version) return MOE_OK;
  MOE_TRY(check(r));
  if (r->command & TEXT) MOE_TRY(make_output_folder(r));
  switch (r->command) {
  case TRAIN:
    return train(r);
  case TOKENIZE:
    return tokenize(r);
  case INSPECT:
    return inspect(r);
  default:
    return verify(r);
  }
}

int main(int argc, char **argv) {
  moe_log_init("moe-data", -1);
  moe_program_catch_stop();
  long cores = sysconf(_SC_NPROCESSORS_ONLN);
  if (cores < 1) cores = 1;
  request r = {
      .text = {.json_key = "text", .stop = &moe_stop_asked},
      .training = {.model_type = "unigram",
                   .vocab_size = 32000,
                   .character_coverage = 0.9995,
                   .max_sentences = 1000000},
      .workers = cores < MOE_ENCODE_WORKERS ? cores : MOE_ENCODE_WORKERS,
      .append_eos = true,
      .arguments = calloc((size_t)argc + 1, sizeof *r.arguments),
  };
  moe_status status =
      r.arguments ? parse(argc, argv, &r) : moe_fail(MOE_NO_MEMORY, "out of memory: command line");
  if (status == MOE_OK) status = execute(&r);
  if (status == MOE_OK && fflush(stdout) != 0)
    status = moe_fail(MOE_IO, "cannot write: standard output: %s", strerror(errno));
  free(r.arguments);
  return moe_report(status);
}
