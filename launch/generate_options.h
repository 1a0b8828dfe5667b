/* moe-generate's command line. */
#ifndef MOE_LAUNCH_GENERATE_OPTIONS_H
#define MOE_LAUNCH_GENERATE_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/ops.h"

/* Strings that grow; they belong to the command line. */
typedef struct {
  const char **list;
  int count;
} moe_strings;

typedef struct {
  const char *checkpoint, *tokenizer, *prompt_file, *perplexity;
  moe_strings prompts, stops;
  int32_t *stop_ids;
  int stop_id_count;
  moe_sample_args sample;
  double alpha;       /* 0: the checkpoint's */
  double memory_gib;  /* 0: what is free */
  int dtype, backend; /* enumerators of config.h; dtype -1: the checkpoint's */
  int64_t max_new, batch;
  int64_t chunk, context; /* 0: chosen */
  int64_t threads;        /* 0: this rank's cores */
  int64_t window, stride; /* of --perplexity; 0: the training length, the window */
  int64_t limit;          /* tokens of --perplexity; 0: all */
  bool ids, bos, ignore_eos, json, no_echo, eager, dry_run, help, version;
} moe_generate_request;

/* Local. Fill *r (zeroed by the caller) with defaults and options. MOE_USAGE. Free it in any case.
 */
moe_status moe_generate_parse(int argc, char **argv, moe_generate_request *r);
void moe_generate_request_free(moe_generate_request *r);
void moe_generate_print_help(FILE *out);

#endif
