/* moe-convert: checkpoints for inference and back, and looking into them. The options are one
 * table: it drives the parser, --help and the check that an option belongs to the command. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/audit.h"
#include "checkpoint/diff.h"
#include "checkpoint/files.h"
#include "checkpoint/gguf_export.h"
#include "checkpoint/inspect.h"
#include "checkpoint/reshard.h"
#include "core/base/log.h"
#include "launch/options.h"
#include "launch/program.h"

enum {
  EXPORT_HF = 1,
  EXPORT_GGUF = 2,
  IMPORT_HF = 4,
  RESHARD = 8,
  INSPECT = 16,
  VERIFY = 32,
  DIFF = 64,
  EXPORT = EXPORT_HF | EXPORT_GGUF,
  WRITES = EXPORT | IMPORT_HF | RESHARD,
  ANY = 127
};

/* id, name, argument (NULL: none), commands, help */
#define OPTIONS(X)                                                                                \
  X(OUTPUT, "output", "PATH", WRITES, "the folder, file or run to make")                          \
  X(DTYPE, "dtype", "TYPE", EXPORT | IMPORT_HF,                                                   \
    "bf16, fp16, fp32; GGUF: q8_0 too (the run's compute type)")                                  \
  X(ALPHA, "alpha", "X", EXPORT, "NTK factor for longer contexts, folded into the rotary base")   \
  X(TOKENIZER, "tokenizer", "MODEL", EXPORT, "SentencePiece .model, bytes or none (the run's)")   \
  X(VOCAB, "vocab", "KIND", EXPORT_GGUF, "llama.cpp's tokenizer: auto, llama, t5 or none")        \
  X(NAME, "name", "TEXT", EXPORT_GGUF, "the model's name in the file (the run's folder)")         \
  X(NO_BIAS, "drop-router-bias", NULL, EXPORT, "export without the router's selection bias")      \
  X(SHARD, "shard-size", "BYTES", EXPORT_HF, "largest file; 5GB, 500MB, ... (5GB)")               \
  X(STEP, "step", "N", IMPORT_HF, "number of the new checkpoint (0)")                             \
  X(OVERWRITE, "overwrite", NULL, EXPORT, "replace the output when it exists")                    \
  X(RANKS, "ranks", "N", RESHARD, "files to write, as N ranks would (1)")                         \
  X(VALUES, "no-values", NULL, INSPECT, "do not read the data: no norms")                         \
  X(TENSORS, "tensors", NULL, INSPECT, "list every tensor")                                       \
  X(CONFIG, "config", NULL, INSPECT, "print the run's configuration")                             \
  X(ALL, "all", NULL, VERIFY | DIFF, "verify: all checkpoints of a run; diff: all tensors")       \
  X(TOLERANCE, "tolerance", "R", DIFF, "equal: |a - b| is at most R |a| over a tensor (0: bits)") \
  X(HELP, "help", NULL, ANY, "print this")                                                        \
  X(VERSION, "version", NULL, ANY, "print the version")

enum { OPTIONS(MOE_OPTION_ID) };
static const moe_option option_table[] = {OPTIONS(MOE_OPTION_ROW)};

static const moe_command_row command_table[] = {
    {"export-hf", EXPORT_HF, "RUN|STEP --output FOLDER",
     "a folder for transformers and vLLM (Mixtral), proven against the checkpoint"},
    {"export-gguf", EXPORT_GGUF, "RUN|STEP --output FILE.gguf",
     "one file for llama.cpp, proven against the checkpoint"},
    {"import-hf", IMPORT_HF, "FOLDER --output RUN",
     "a Mixtral-layout folder as a checkpoint that moe-train --resume goes on from"},
    {"reshard", RESHARD, "RUN|STEP --output NEWRUN --ranks N",
     "rewrite a checkpoint, optimizer state and all, as the files of N ranks"},
    {"inspect", INSPECT, "RUN|STEP", "print what a checkpoint holds, norms and experts' spread"},
    {"verify", VERIFY, "RUN|STEP", "check that a checkpoint is complete, and every hash"},
    {"diff", DIFF, "A B",
     "compare tensor by tensor; exit code 1 when they differ; also with exports"},
};
enum { COMMANDS = sizeof command_table / sizeof command_table[0] };

static moe_status set_option(void *context, int id, const char *text);
static const moe_command_line command_line = {.program = "moe-convert",
                                              .options = option_table,
                                              .option_count =
                                                  sizeof option_table / sizeof option_table[0],
                                              .commands = command_table,
                                              .command_count = COMMANDS,
                                              .any = ANY,
                                              .set = set_option};

typedef struct {
  int command; /* its bit; 0: none given */
  const moe_command_row *row;
  const char *arguments[2];
  int argument_count;
  const char *output;
  moe_gguf_options export;
  int dtype; /* index into dtypes */
  int64_t ranks, step;
  double tolerance;
  bool all, no_values, tensors, config, help, version;
  bool differ; /* diff's answer */
} request;

/* ---- help ---- */

static void print_help(int command) {
  printf("Usage: moe-convert COMMAND [options] PATH...\n\n");
  for (int i = 0; i < COMMANDS; i++)
    if (!command || command == command_table[i].bit)
      printf("  %-12s %s\n  %-12s %s\n", command_table[i].name, command_table[i].usage, "",
             command_table[i].help);
  printf("\n");
  moe_option_print(&command_line, command, 22, stdout);
  printf("\nRUN is a run's folder: its newest checkpoint that verifies is taken. STEP is a\n"
         "checkpoint, RUN/checkpoints/step-N.\n"
         "Exit codes: 0 done, 1 failed (diff: they differ), 2 bad usage, 3 damaged input file.\n");
}

/* ---- the command line ---- */

/* "5GB", "500MB", "4096": units of 1000, as others write file sizes. */
static moe_status parse_bytes(const char *name, const char *text, int64_t *out) {
  static const char *const units[] = {"", "KB", "MB", "GB", "TB", NULL};
  char *end;
  double value = strtod(text, &end), unit = 1.0;
  for (int i = 0; units[i]; i++, unit *= 1000.0) {
    if (end == text || strcmp(end, units[i]) != 0 || !(value * unit >= 1.0 && value * unit < 1e15))
      continue;
    *out = (int64_t)(value * unit);
    return MOE_OK;
  }
  return moe_fail(MOE_USAGE, "not a size such as 5GB: --%s %s: see --help", name, text);
}

/* What --dtype may be, and what the two kinds of export call it. */
static const struct {
  const char *name;
  int dtype, ggml;
} dtypes[] = {
    {"run", MOE_EXPORT_RUN_DTYPE, MOE_GGUF_RUN_TYPE},
    {"bf16", MOE_BF16, MOE_GGML_BF16},
    {"fp16", MOE_F16, MOE_GGML_F16},
    {"fp32", MOE_F32, MOE_GGML_F32},
    {"q8_0", -2, MOE_GGML_Q8_0},
};

static moe_status parse_dtype(const request *r, const char *text, int *out) {
  for (int i = 1; i < (int)(sizeof dtypes / sizeof dtypes[0]); i++) {
    if (strcmp(dtypes[i].name, text) != 0 || (dtypes[i].dtype < -1 && r->command != EXPORT_GGUF))
      continue;
    *out = i;
    return MOE_OK;
  }
  return moe_fail(MOE_USAGE, "unknown choice: --dtype %s: see --help", text);
}

static moe_status set_option(void *context, int id, const char *text) {
  request *r = context;
  static const char *const vocabs[] = {"auto", "llama", "t5", "none", NULL};
  int choice = 0;
  const char *name = option_table[id].name;
  switch (id) {
  case OPTION_OUTPUT:
    r->output = text;
    break;
  case OPTION_DTYPE:
    return parse_dtype(r, text, &r->dtype);
  case OPTION_ALPHA:
    return moe_option_real(name, text, 0.01, 1e6, &r->export.common.alpha);
  case OPTION_TOKENIZER:
    r->export.common.tokenizer = text;
    break;
  case OPTION_VOCAB:
    MOE_TRY(moe_option_choice(name, text, vocabs, &choice));
    r->export.vocab = (moe_gguf_vocab)choice;
    break;
  case OPTION_NAME:
    r->export.name = text;
    break;
  case OPTION_NO_BIAS:
    r->export.common.drop_router_bias = true;
    break;
  case OPTION_SHARD:
    return parse_bytes(name, text, &r->export.common.shard_bytes);
  case OPTION_STEP:
    return moe_option_int(name, text, 0, INT64_MAX / 2, &r->step);
  case OPTION_OVERWRITE:
    r->export.common.overwrite = true;
    break;
  case OPTION_RANKS:
    return moe_option_int(name, text, 1, 4096, &r->ranks);
  case OPTION_VALUES:
    r->no_values = true;
    break;
  case OPTION_TENSORS:
    r->tensors = true;
    break;
  case OPTION_CONFIG:
    r->config = true;
    break;
  case OPTION_ALL:
    r->all = true;
    break;
  case OPTION_TOLERANCE:
    return moe_option_real(name, text, 0.0, 1.0, &r->tolerance);
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
  MOE_TRY(moe_command_read(&command_line, &argc, &argv, &r->row));
  r->command = r->row ? r->row->bit : 0;
  MOE_TRY(moe_option_read(&command_line, argc, argv, r->row, r));
  for (; optind < argc; r->argument_count++)
    if (r->argument_count < 2)
      r->arguments[r->argument_count] = argv[optind++];
    else
      return moe_fail(MOE_USAGE, "one path too many: %s: see moe-convert %s --help", argv[optind],
                      r->row ? r->row->name : "");
  return MOE_OK;
}

static moe_status check(const request *r) {
  if (!r->command) return moe_fail(MOE_USAGE, "no command: see moe-convert --help");
  const char *name = r->row->name, *usage = r->row->usage;
  if (r->argument_count != (r->command == DIFF ? 2 : 1))
    return moe_fail(MOE_USAGE, "%d paths: %s: usage: moe-convert %s %s", r->argument_count, name,
                    name, usage);
  if ((r->command & WRITES) && !r->output)
    return moe_fail(MOE_USAGE, "no output: %s: usage: moe-convert %s %s", name, name, usage);
  return MOE_OK;
}

/* ---- the commands ---- */

/* Work on the checkpoint that the first path means. It reads what it needs once, and verifies that
 * on the way; only when there was damage are all files looked at, and an older one taken. */
static moe_status with_checkpoint(const request *r, moe_comm *world,
                                  moe_status (*work)(const request *r, moe_comm *world,
                                                     const char *path)) {
  char path[MOE_PATH], older[MOE_PATH], why[1024];
  MOE_TRY(moe_audit_choose(r->arguments[0], false, &moe_stop_asked, path));
  moe_status status = work(r, world, path);
  if (status != MOE_DAMAGED && status != MOE_IO) return status;
  snprintf(why, sizeof why, "%s", moe_error_message());
  MOE_TRY(moe_audit_choose(r->arguments[0], true, &moe_stop_asked, older));
  if (strcmp(path, older) == 0) return moe_fail(status, "%s", why); /* it was something else */
  return work(r, world, older);
}

static moe_status export_weights(const request *r, moe_comm *world, const char *path) {
  moe_gguf_options options = r->export;
  (void)world;
  options.common.checkpoint = path;
  options.common.out = r->output;
  options.common.stop = &moe_stop_asked;
  options.common.dtype = r->command == EXPORT_HF ? dtypes[r->dtype].dtype : MOE_EXPORT_RUN_DTYPE;
  options.type = dtypes[r->dtype].ggml;
  return r->command == EXPORT_HF ? moe_export_hf(&options.common) : moe_export_gguf(&options);
}

static moe_status import(const request *r, moe_comm *world) {
  const moe_import_options options = {.folder = r->arguments[0],
                                      .run_dir = r->output,
                                      .step = r->step,
                                      .dtype = dtypes[r->dtype].dtype,
                                      .stop = &moe_stop_asked};
  return moe_import_hf(world, &options);
}

static moe_status reshard(const request *r, moe_comm *world, const char *path) {
  return moe_reshard(world, path, r->output, (int)r->ranks, &moe_stop_asked);
}

static moe_status inspect(const request *r) {
  char path[MOE_PATH];
  const moe_inspect_options options = {
      .values = !r->no_values, .tensors = r->tensors, .config = r->config, .stop = &moe_stop_asked};
  MOE_TRY(moe_audit_choose(r->arguments[0], false, &moe_stop_asked, path));
  return moe_inspect_checkpoint(path, &options, stdout);
}

/* What a path of diff is: a run, a checkpoint, or an export. */
static bool is_export(const char *path) {
  char config[MOE_PATH + 16];
  snprintf(config, sizeof config, "%.*s/config.json", MOE_PATH, path);
  return access(config, F_OK) == 0 || (access(path, F_OK) == 0 && !moe_files_is_folder(path));
}

static moe_status open_weights(const char *path, moe_weights **out) {
  char step[MOE_PATH];
  *out = NULL;
  if (is_export(path))
    return moe_files_is_folder(path) ? moe_weights_open_hf(path, out)
                                     : moe_weights_open_gguf(path, out);
  MOE_TRY(moe_audit_choose(path, false, &moe_stop_asked, step));
  return moe_weights_open_checkpoint(step, out);
}

static moe_status diff_exports(request *r, const moe_diff_options *options) {
  moe_weights *a = NULL, *b = NULL;
  moe_status status = open_weights(r->arguments[0], &a);
  if (status == MOE_OK) status = open_weights(r->arguments[1], &b);
  if (status == MOE_OK) status = moe_diff_weights(a, b, options, &r->differ);
  moe_weights_close(a);
  moe_weights_close(b);
  return status;
}

static moe_status diff(request *r) {
  char a[MOE_PATH], b[MOE_PATH];
  const moe_diff_options options = {
      .tolerance = r->tolerance, .all = r->all, .stop = &moe_stop_asked, .out = stdout};
  if (is_export(r->arguments[0]) || is_export(r->arguments[1])) {
    MOE_TRY(diff_exports(r, &options));
  } else {
    MOE_TRY(moe_audit_choose(r->arguments[0], false, &moe_stop_asked, a));
    MOE_TRY(moe_audit_choose(r->arguments[1], false, &moe_stop_asked, b));
    MOE_TRY(moe_diff_checkpoints(a, b, &options, &r->differ));
  }
  printf("%s and %s %s\n", r->arguments[0], r->arguments[1], r->differ ? "differ" : "are equal");
  return MOE_OK;
}

static moe_status run_command(request *r, moe_comm *world) {
  switch (r->command) {
  case EXPORT_HF:
  case EXPORT_GGUF:
    return with_checkpoint(r, world, export_weights);
  case IMPORT_HF:
    return import(r, world);
  case RESHARD:
    return with_checkpoint(r, world, reshard);
  case INSPECT:
    return inspect(r);
  case VERIFY:
    return moe_audit(r->arguments[0], r->all, &moe_stop_asked, stdout);
  default:
    return diff(r);
  }
}

static moe_status execute(int argc, char **argv, moe_comm *world, request *r) {
  MOE_TRY(parse(argc, argv, r));
  if (r->help) print_help(r->command);
  if (r->version) printf("moe-convert %s\n", MOE_VERSION);
  if (r->help || r->version) return MOE_OK;
  MOE_TRY(check(r));
  if (moe_comm_size(world) > 1)
    return moe_fail(MOE_USAGE,
                    "started on %d ranks: moe-convert is one process, whatever ranks "
                    "wrote the checkpoint: start it without mpirun",
                    moe_comm_size(world));
  MOE_TRY(run_command(r, world));
  if (fflush(stdout) != 0)
    return moe_fail(MOE_IO, "cannot write: standard output: %s", strerror(errno));
  return MOE_OK;
}

static bool checkpoints_differ;

static moe_status body(int argc, char **argv, moe_comm *world) {
  moe_program_catch_stop();
  request r = {.ranks = 1};
  moe_status status = execute(argc, argv, world, &r);
  checkpoints_differ = r.differ;
  return status == MOE_STOPPED ? MOE_FAILED : status; /* nothing to go on with: just not done */
}

int main(int argc, char **argv) {
  int code = moe_program_run("moe-convert", argc, argv, body);
  return code == 0 && checkpoints_differ ? 1 : code;
}
