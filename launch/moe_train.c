/* moe-train: the main job.   mpirun -np N moe-train CFG [options]   (or launch/moe-run) */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/train/engine.h"
#include "core/train/preflight.h"
#include "core/train/save_plan.h"
#include "core/train/stop_signal.h"
#include "core/train/trainer.h"
#include "launch/program.h"

static const char help[] =
    "Usage: mpirun -np RANKS moe-train CFG [--set section.key=value]... [options]\n"
    "\n"
    "Train a mixture-of-experts transformer as the INI file CFG says. Without mpirun: one rank.\n"
    "\n"
    "  --set SECTION.KEY=VALUE  override a setting; may be repeated\n"
    "  --dry-run                print the resolved configuration and the plan (parameters, who "
    "owns\n"
    "                           what, memory per rank, disk per checkpoint, FLOPs), then stop\n"
    "  --preflight              check on all ranks what a run needs (devices, network, memory, "
    "run\n"
    "                           directory, disk, the same program everywhere), then stop\n"
    "  --get SECTION.KEY        print a setting as it will be used, for scripts; may be repeated\n"
    "  --resume auto|none|PATH  auto (default): continue from the newest checkpoint of run.dir "
    "that\n"
    "                           verifies, if there is one; none: start anew; PATH: from this one\n"
    "  --help, --version\n"
    "\n"
    "Settings: docs/config.md. TERM, INT or USR2 save at the next step boundary and stop.\n"
    "Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 damaged input file,\n"
    "4 training diverged, 75 stopped on request after saving (run again to go on), 76 a rank\n"
    "hung and was named.\n";

enum { MAX_GETS = 16 };

typedef struct {
  moe_config config;
  const char *resume;
  bool dry_run, preflight;
  const char *answer; /* to --help or --version */
  const char *get[MAX_GETS];
  int gets;
} command;

static moe_status parse(int argc, char **argv, command *cmd) {
  static const struct option options[] = {
      {"set", required_argument, NULL, 's'},    {"dry-run", no_argument, NULL, 'd'},
      {"resume", required_argument, NULL, 'r'}, {"help", no_argument, NULL, 'h'},
      {"version", no_argument, NULL, 'v'},      {"preflight", no_argument, NULL, 'p'},
      {"get", required_argument, NULL, 'g'},    {NULL, 0, NULL, 0}};
  const char **sets = calloc((size_t)argc, sizeof *sets);
  int set_count = 0, option;
  moe_status status = MOE_OK;
  if (!sets) return moe_fail(MOE_NO_MEMORY, "out of memory: command line");
  opterr = 0;
  while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
    switch (option) {
    case 's':
      sets[set_count++] = optarg;
      break;
    case 'd':
      cmd->dry_run = true;
      break;
    case 'r':
      cmd->resume = optarg;
      break;
    case 'p':
      cmd->preflight = true;
      break;
    case 'g':
      if (cmd->gets == MAX_GETS) {
        status = moe_fail(MOE_USAGE, "--get: command line: give at most %d", MAX_GETS);
        goto done;
      }
      cmd->get[cmd->gets++] = optarg;
      break;
    case 'h':
      cmd->answer = help;
      break;
    case 'v':
      cmd->answer = "moe-train " MOE_VERSION "\n";
      break;
    default:
      status = moe_fail(MOE_USAGE, "unknown or incomplete option: %s: see moe-train --help",
                        argv[optind - 1]);
      goto done;
    }
  }
  if (cmd->answer) goto done;
  if (argc - optind != 1) {
    status = moe_fail(MOE_USAGE, "%s: command line: give one INI file: see moe-train --help",
                      argc == optind ? "no configuration" : "too many arguments");
    goto done;
  }
  moe_config_defaults(&cmd->config);
  MOE_TRY_OR(status, done, moe_config_read(&cmd->config, argv[optind]));
  for (int i = 0; i < set_count; i++)
    MOE_TRY_OR(status, done, moe_config_set(&cmd->config, sets[i]));
done:
  free(sets);
  return status;
}

static moe_status check_run(const command *cmd) {
  if (cmd->dry_run) return MOE_OK;
  if (!cmd->config.run.dir[0]) {
    return moe_fail(MOE_USAGE, "run.dir is not set: configuration: add `dir = PATH` to [run]");
  }
  if (!cmd->config.data.train[0]) {
    return moe_fail(MOE_USAGE,
                    "data.train is not set: configuration: add `train = PREFIX` to [data] "
                    "(made by moe-data tokenize)");
  }
  return MOE_OK;
}

static moe_status dry_run(const command *cmd, moe_device *dev, int rank) {
  moe_engine engine;
  if (rank == 0) moe_config_print(&cmd->config, stdout);
  moe_status status = moe_engine_create(&cmd->config, dev, true, true, &engine);
  if (status != MOE_OK) return status;
  if (rank == 0) printf("\n");
  moe_save_plan saving;
  status = moe_engine_print_plan(&engine, stdout);
  if (status == MOE_OK) status = moe_save_plan_make(&engine, &saving);
  if (status == MOE_OK && rank == 0) moe_save_plan_print(&saving, stdout);
  moe_engine_destroy(&engine);
  return status;
}

/* Everything between MPI's start and end. Errors are the same on every rank. */
static moe_status work(command *cmd, moe_comm *world) {
  moe_device *dev = NULL;
  int rank = moe_comm_rank(world);
  MOE_TRY(moe_config_resolve(&cmd->config, moe_comm_size(world)));
  MOE_TRY(check_run(cmd));
  if (cmd->dry_run || cmd->preflight) moe_stop_unlisten();
  if (cmd->preflight) return moe_preflight(&cmd->config, world, stdout);
  MOE_TRY(moe_agree(world, moe_engine_open_device(&cmd->config, &dev)));
  if (!cmd->dry_run && rank == 0) moe_config_print(&cmd->config, stderr);
  moe_status status =
      cmd->dry_run ? dry_run(cmd, dev, rank) : moe_train(&cmd->config, dev, cmd->resume);
  moe_device_close(dev);
  return status;
}

static moe_status run(int argc, char **argv, moe_comm *world) {
  static command cmd; /* large */
  cmd.resume = "auto";
  MOE_TRY(moe_agree(world, parse(argc, argv, &cmd)));
  if (!cmd.answer) return work(&cmd, world);
  if (moe_comm_rank(world) == 0) fputs(cmd.answer, stdout);
  return MOE_OK;
}

/* --get is for scripts that are about to start ranks: it needs none, and no MPI. */
static bool only_gets(int argc, char **argv) {
  for (int i = 1; i < argc; i++)
    if (strncmp(argv[i], "--get", 5) == 0) return true;
  return false;
}

static moe_status print_settings(int argc, char **argv) {
  static command cmd; /* large */
  char text[MOE_CONFIG_TEXT];
  MOE_TRY(parse(argc, argv, &cmd));
  MOE_TRY(moe_config_resolve(&cmd.config, 0));
  for (int i = 0; i < cmd.gets; i++) {
    MOE_TRY(moe_config_get(&cmd.config, cmd.get[i], text));
    puts(text);
  }
  return MOE_OK;
}

int main(int argc, char **argv) {
  if (only_gets(argc, argv)) {
    moe_log_init("moe-train", -1);
    moe_status status = print_settings(argc, argv);
    return status == MOE_OK ? 0 : moe_report(status);
  }
  moe_cpu_choose_blas(argv); /* it may start the program anew, without handlers */
  moe_stop_listen();         /* mpirun forwards signals from its first moment */
  return moe_program_run("moe-train", argc, argv, run);
}
