/* moe-generate's options are one table: it drives the parser and --help. */
#include "launch/generate_options.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/config.h"
#include "launch/options.h"

enum { ANY = 1 }; /* there are no commands */

/* id, name, argument (NULL: none), help */
#define OPTIONS(X)                                                                                \
  X(CHECKPOINT, "checkpoint", "P",                                                                \
    "a run's folder (its newest valid checkpoint) or a step folder")                              \
  X(PROMPT, "prompt", "TEXT", "continue TEXT; repeat for more texts")                             \
  X(PROMPT_FILE, "prompt-file", "FILE", "continue each line that is not empty")                   \
  X(IDS, "ids", NULL, "prompts and texts are token ids, with spaces between; no tokenizer")       \
  X(TOKENIZER, "tokenizer", "MODEL", "SentencePiece .model, or bytes (the run's data.tokenizer)") \
  X(BOS, "bos", NULL, "begin each prompt with <bos>")                                             \
  X(MAX_NEW, "max-new", "N", "tokens to add, at most (128)")                                      \
  X(GREEDY, "greedy", NULL, "always the most likely token: --temperature 0")                      \
  X(TEMPERATURE, "temperature", "T", "below 1 likelier, above 1 more varied (0.8)")               \
  X(TOP_K, "top-k", "K", "draw from the K most likely tokens; 0: all (0)")                        \
  X(TOP_P, "top-p", "P", "draw from the likeliest that reach P of the probability (0.95)")        \
  X(SEED, "seed", "N", "same seed, same texts (1234) on any number of ranks; fp32: in any batch") \
  X(STOP, "stop", "TEXT", "end a text before TEXT; may be repeated")                              \
  X(STOP_ID, "stop-id", "ID", "end a text at this token; may be repeated")                        \
  X(IGNORE_EOS, "ignore-eos", NULL, "go on after <eos>")                                          \
  X(BATCH, "batch", "N", "texts at a time (8, at most as many as prompts)")                       \
  X(ALPHA, "alpha", "A", "NTK factor: texts up to A times the trained context (the model's)")     \
  X(CONTEXT, "context", "N", "room for N tokens per text (what the prompts and --max-new need)")  \
  X(CHUNK, "chunk", "N", "tokens per pass of prompts (CPU 256, GPU 2048)")                        \
  X(DTYPE, "dtype", "TYPE", "fp32, bf16 or fp16 (as trained)")                                    \
  X(BACKEND, "backend", "B", "auto, cpu or cuda (auto)")                                          \
  X(THREADS, "threads", "N", "CPU threads per rank (its share of the cores)")                     \
  X(MEMORY, "memory-gib", "G", "memory a rank may use (what is free)")                            \
  X(EAGER, "eager", NULL, "GPU: do not record the step as a graph")                               \
  X(JSON, "json", NULL, "one JSON object per text; rates as JSON on standard error")              \
  X(NO_ECHO, "no-echo", NULL, "print texts without their prompts")                                \
  X(PERPLEXITY, "perplexity", "PREFIX", "instead of texts: the loss on a token file")             \
  X(WINDOW, "window", "S", "perplexity: tokens a window sees (the training length)")              \
  X(STRIDE, "stride", "N", "perplexity: from window to window; less gives more context (S)")      \
  X(LIMIT, "limit", "N", "perplexity: only the first N tokens")                                   \
  X(DRY_RUN, "dry-run", NULL, "print the memory plan and stop")                                   \
  X(HELP, "help", NULL, "print this")                                                             \
  X(VERSION, "version", NULL, "print the version")

#define ID(id, name, argument, help) OPTION_##id,
#define ROW(id, name, argument, help) {name, argument, ANY, help},
enum { OPTIONS(ID) };
static const moe_option option_table[] = {OPTIONS(ROW)};
#undef ID
#undef ROW

static moe_status set_option(void *request, int id, const char *text);
static const moe_command_line command_line = {.program = "moe-generate",
                                              .options = option_table,
                                              .option_count =
                                                  sizeof option_table / sizeof option_table[0],
                                              .any = ANY,
                                              .set = set_option};

void moe_generate_print_help(FILE *out) {
  fprintf(out, "Usage: moe-generate --checkpoint P --prompt TEXT [options]\n"
               "       mpirun -np RANKS moe-generate ...   the experts shared out over ranks\n\n");
  moe_option_print(&command_line, 0, 21, out);
  fprintf(out, "\nTexts go to standard output, rates and messages to standard error.\n"
               "Exit codes: 0 done, 1 failed, 2 bad usage, 3 damaged input file.\n");
}

static moe_status set_sampling(moe_generate_request *r, int id, const char *name,
                               const char *text) {
  double value;
  int64_t number;
  switch (id) {
  case OPTION_GREEDY:
    r->sample.temperature = 0.0f;
    return MOE_OK;
  case OPTION_TEMPERATURE:
    MOE_TRY(moe_option_real(name, text, 0.0, 1e6, &value));
    r->sample.temperature = (float)value;
    return MOE_OK;
  case OPTION_TOP_K:
    return moe_option_int(name, text, 0, 1 << 24, &r->sample.top_k);
  case OPTION_TOP_P:
    MOE_TRY(moe_option_real(name, text, 1e-6, 1.0, &value));
    r->sample.top_p = (float)value;
    return MOE_OK;
  default:
    MOE_TRY(moe_option_int(name, text, 0, INT64_MAX, &number));
    r->sample.seed = (uint64_t)number;
    return MOE_OK;
  }
}

static moe_status set_number(moe_generate_request *r, int id, const char *name, const char *text) {
  switch (id) {
  case OPTION_MAX_NEW:
    return moe_option_int(name, text, 1, 1 << 24, &r->max_new);
  case OPTION_BATCH:
    return moe_option_int(name, text, 1, 4096, &r->batch);
  case OPTION_CONTEXT:
    return moe_option_int(name, text, 1, 1 << 26, &r->context);
  case OPTION_CHUNK:
    return moe_option_int(name, text, 1, 1 << 20, &r->chunk);
  case OPTION_THREADS:
    return moe_option_int(name, text, 1, 4096, &r->threads);
  case OPTION_WINDOW:
    return moe_option_int(name, text, 1, 1 << 26, &r->window);
  case OPTION_STRIDE:
    return moe_option_int(name, text, 1, 1 << 26, &r->stride);
  case OPTION_LIMIT:
    return moe_option_int(name, text, 2, INT64_MAX / 2, &r->limit);
  case OPTION_ALPHA:
    return moe_option_real(name, text, 0.01, 1e6, &r->alpha);
  default:
    return moe_option_real(name, text, 1e-6, 1e6, &r->memory_gib);
  }
}

static moe_status add_stop(moe_generate_request *r, int id, const char *name, const char *text) {
  int64_t token;
  if (id == OPTION_STOP_ID) {
    MOE_TRY(moe_option_int(name, text, 0, INT32_MAX, &token));
    r->stop_ids[r->stop_id_count++] = (int32_t)token;
    return MOE_OK;
  }
  if (!*text) return moe_fail(MOE_USAGE, "an empty text: --stop: name the text to stop at");
  r->stops.list[r->stops.count++] = text;
  return MOE_OK;
}

static moe_status set_choice(moe_generate_request *r, int id, const char *name, const char *text) {
  static const char *const dtypes[] = {"fp32", "bf16", "fp16", NULL};
  static const char *const backends[] = {"auto", "cpu", "cuda", NULL};
  if (id == OPTION_DTYPE) return moe_option_choice(name, text, dtypes, &r->dtype);
  return moe_option_choice(name, text, backends, &r->backend);
}

static moe_status set_option(void *request, int id, const char *text) {
  moe_generate_request *r = request;
  const char *name = option_table[id].name;
  switch (id) {
#define TEXT_OPTION(ID, member) \
  case OPTION_##ID:             \
    r->member = text;           \
    return MOE_OK;
    TEXT_OPTION(CHECKPOINT, checkpoint)
    TEXT_OPTION(TOKENIZER, tokenizer)
    TEXT_OPTION(PROMPT_FILE, prompt_file)
    TEXT_OPTION(PERPLEXITY, perplexity)
    TEXT_OPTION(PROMPT, prompts.list[r->prompts.count++])
#undef TEXT_OPTION
#define FLAG(ID, member) \
  case OPTION_##ID:      \
    r->member = true;    \
    return MOE_OK;
    FLAG(IDS, ids)
    FLAG(BOS, bos)
    FLAG(IGNORE_EOS, ignore_eos)
    FLAG(JSON, json)
    FLAG(NO_ECHO, no_echo)
    FLAG(EAGER, eager)
    FLAG(DRY_RUN, dry_run)
    FLAG(HELP, help)
    FLAG(VERSION, version)
#undef FLAG
  case OPTION_GREEDY:
  case OPTION_TEMPERATURE:
  case OPTION_TOP_K:
  case OPTION_TOP_P:
  case OPTION_SEED:
    return set_sampling(r, id, name, text);
  case OPTION_STOP:
  case OPTION_STOP_ID:
    return add_stop(r, id, name, text);
  case OPTION_DTYPE:
  case OPTION_BACKEND:
    return set_choice(r, id, name, text);
  default:
    return set_number(r, id, name, text);
  }
}

static moe_status check(const moe_generate_request *r) {
  if (r->help || r->version) return MOE_OK;
  if (!r->checkpoint)
    return moe_fail(MOE_USAGE, "no checkpoint: command line: give --checkpoint RUN");
  bool texts = r->prompts.count > 0 || r->prompt_file;
  if (r->perplexity && texts)
    return moe_fail(MOE_USAGE, "texts and --perplexity at once: command line: ask for one");
  if (!r->perplexity && (r->window || r->stride || r->limit))
    return moe_fail(MOE_USAGE, "--window, --stride and --limit belong to --perplexity: command "
                               "line: give --perplexity PREFIX");
  if (!r->perplexity && !texts)
    return moe_fail(MOE_USAGE, "nothing to continue: command line: give --prompt TEXT, "
                               "--prompt-file FILE or --perplexity PREFIX");
  if (r->ids && (r->stops.count > 0 || r->tokenizer || r->bos))
    return moe_fail(MOE_USAGE, "--stop, --tokenizer and --bos are about text: command line: leave "
                               "them out with --ids; --stop-id names a token");
  return MOE_OK;
}

static moe_status defaults(moe_generate_request *r, int argc) {
  *r = (moe_generate_request){.sample = {0.8f, 0, 0.95f, 1234},
                              .dtype = -1,
                              .backend = MOE_BACKEND_AUTO,
                              .max_new = 128,
                              .batch = 8};
  r->prompts.list = calloc((size_t)argc + 1, sizeof *r->prompts.list);
  r->stops.list = calloc((size_t)argc + 1, sizeof *r->stops.list);
  r->stop_ids = calloc((size_t)argc + 1, sizeof *r->stop_ids);
  if (r->prompts.list && r->stops.list && r->stop_ids) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "out of memory: command line");
}

moe_status moe_generate_parse(int argc, char **argv, moe_generate_request *r) {
  MOE_TRY(defaults(r, argc));
  MOE_TRY(moe_option_read(&command_line, argc, argv, NULL, r));
  if (optind < argc && !r->help && !r->version)
    return moe_fail(MOE_USAGE, "not an option: %s: put texts in quotes, after --prompt",
                    argv[optind]);
  return check(r);
}

void moe_generate_request_free(moe_generate_request *r) {
  free(r->prompts.list);
  free(r->stops.list);
  free(r->stop_ids);
}
