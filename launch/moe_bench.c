/* moe-bench: what this machine can do, and what a training step makes of it. */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/process_memory.h"
#include "core/base/startup.h"
#include "core/train/bench.h"
#include "launch/options.h"
#include "launch/program.h"

static const char help[] =
    "Usage: mpirun -np RANKS moe-bench [CFG] [--set section.key=value]... [options]\n"
    "\n"
    "Measure, in one run: the rate of a large matrix product and of a copy on all ranks at once, "
    "the\n"
    "collectives, and training steps on random tokens with a waterfall of where the time goes.\n"
    "Without CFG: preset `small`. Of GPUs whose driver tells it, also power, clock and energy.\n"
    "\n"
    "  --set SECTION.KEY=VALUE  a setting of docs/config.md; may be repeated\n"
    "  --steps N                steps measured (default 8)\n"
    "  --warmup N               steps before (default 2)\n"
    "  --no-collectives         leave out the collectives\n"
    "  --balanced               tokens go to experts in turn: without it, the price of real "
    "routing\n"
    "                           from initial weights is included\n"
    "  --operations             also list every operation of the timed steps\n"
    "  --clocks                 count a GPU's clock during each part and operation, which takes\n"
    "                           some 2 us for each operation of the timed steps\n"
    "  --json FILE              also write the figures as JSON\n"
    "  --help, --version\n";

typedef struct {
  moe_config config;
  const char *answer, *json;
  int64_t steps, warmup;
  bool collectives, operations, balanced, clocks;
} command;

typedef struct {
  moe_ceilings ceilings;
  double bus[MOE_BENCH_COLLECTIVES][3]; /* GB/s at collective_mib */
  moe_bench_step_result step;
  int64_t planned_bytes, used_bytes; /* of the fullest rank */
} figures;
static const int collective_mib[3] = {1, 8, 64};

enum { MOST_STEPS = 100000 };

static moe_status parse(int argc, char **argv, command *cmd) {
  static const struct option options[] = {{"set", required_argument, NULL, 's'},
                                          {"steps", required_argument, NULL, 'n'},
                                          {"warmup", required_argument, NULL, 'w'},
                                          {"no-collectives", no_argument, NULL, 'c'},
                                          {"operations", no_argument, NULL, 'o'},
                                          {"balanced", no_argument, NULL, 'b'},
                                          {"clocks", no_argument, NULL, 'k'},
                                          {"json", required_argument, NULL, 'j'},
                                          {"help", no_argument, NULL, 'h'},
                                          {"version", no_argument, NULL, 'v'},
                                          {NULL, 0, NULL, 0}};
  moe_config file;
  int option;
  moe_config_defaults(&cmd->config);
  MOE_TRY(moe_config_set(&cmd->config, "model.preset=small"));
  opterr = 0;
  /* The file comes first, whatever the order on the command line, so that --set overrides it. */
  for (int pass = 0; pass < 2; pass++) {
    optind = 1;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
      if (option == '?')
        return moe_fail(MOE_USAGE, "unknown or incomplete option: %s: see moe-bench --help",
                        argv[optind - 1]);
      if (option == 'h') cmd->answer = help;
      if (option == 'v') cmd->answer = "moe-bench " MOE_VERSION "\n";
      if (option == 'c') cmd->collectives = false;
      if (option == 'o') cmd->operations = true;
      if (option == 'b') cmd->balanced = true;
      if (option == 'k') cmd->clocks = true;
      if (option == 'j') cmd->json = optarg;
      if (option == 'n') MOE_TRY(moe_option_int("steps", optarg, 1, MOST_STEPS, &cmd->steps));
      if (option == 'w') MOE_TRY(moe_option_int("warmup", optarg, 0, MOST_STEPS, &cmd->warmup));
      if (option == 's' && pass == 1) MOE_TRY(moe_config_set(&cmd->config, optarg));
    }
    if (argc - optind > 1) return moe_fail(MOE_USAGE, "too many arguments: see moe-bench --help");
    if (pass == 0 && optind < argc && !cmd->answer) {
      moe_config_defaults(&file);
      MOE_TRY(moe_config_read(&file, argv[optind]));
      cmd->config = file;
    }
  }
  return MOE_OK;
}

/* What the machine can do, before the engine fills its memory. */
static moe_status measure_machine(const command *cmd, moe_device *dev, figures *f) {
  moe_comm *world = NULL;
  moe_dtype dtype = moe_device_is_host(dev) ? MOE_F32 : moe_config_compute_dtype(&cmd->config);
  MOE_TRY(moe_comm_world(dev, &world));
  moe_status status;
  MOE_TRY_OR(status, done, moe_bench_ceilings(dev, world, dtype, &f->ceilings));
  for (int c = 0; c < MOE_BENCH_COLLECTIVES && cmd->collectives; c++) {
    for (int i = 0; i < 3; i++) {
      int64_t bytes = (int64_t)collective_mib[i] << 20;
      MOE_TRY_OR(status, done, moe_bench_collective(dev, world, c, bytes, &f->bus[c][i]));
    }
  }
done:
  moe_comm_destroy(world);
  moe_startup_done("ceilings");
  return status;
}

static moe_status measure_step(moe_engine *e, const command *cmd, figures *f) {
  MOE_TRY(moe_optimizer_init_weights(e->optimizer, (uint64_t)e->config.train.seed));
  if (cmd->balanced) MOE_TRY(moe_model_force_balance(e->model));
  moe_startup_tell();
  return moe_bench_step(e, (int)cmd->warmup, (int)cmd->steps, cmd->clocks, &f->step);
}

/* The plan, and what came to be held: no step allocates, so what is held after them is the peak of
 * training. Of a GPU what is gone since it was opened, libraries' memory included (up to what a
 * plan may use: moe_device_free_bytes does not see into the reserve); of a host the process. */
static moe_status measure_memory(moe_engine *e, int64_t free_at_start, figures *f) {
  int64_t bytes[2] = {moe_engine_planned_bytes(e), moe_process_resident()};
  if (!moe_device_is_host(e->dev)) bytes[1] = free_at_start - moe_device_free_bytes(e->dev);
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, bytes, 2, MOE_MAX));
  f->planned_bytes = bytes[0];
  f->used_bytes = bytes[1];
  return MOE_OK;
}

/* "687 W of 700, 1398 MHz, set to 1523 MHz of 1980, held down by the power limit 98 % of the time",
 * of this rank; 0: the driver does not tell. */
static void print_power(const moe_bench_power *power, int ranks) {
  const moe_power_use *own = &power->own, *mean = &power->mean;
  printf("%.0f W of %.0f", own->watts, own->limit_watts);
  if (own->mhz > 0.0) printf(", %.0f MHz", own->mhz);
  printf(", set to %.0f MHz of %.0f", own->set_mhz, own->max_mhz);
  printf(", held down by the power limit %.0f %% of the time", 100.0 * own->capped);
  if (own->slowed > 0.0) printf(", by heat or supply %.0f %%", 100.0 * own->slowed);
  if (ranks > 1)
    printf(" (mean of the ranks: %.0f W, set to %.0f MHz)", mean->watts, mean->set_mhz);
}

static double product_pj(const moe_ceilings *c) {
  return c->sustained_tflops > 0.0 ? c->power.mean.watts / c->sustained_tflops : 0.0;
}

static void print_ceilings(const moe_engine *e, const command *cmd, const figures *f) {
  int ranks = moe_comm_size(e->world);
  printf("ceilings, %d rank%s at once (%s)\n", ranks, ranks > 1 ? "s" : "",
         moe_device_name(e->dev));
  printf("  product %" PRId64 "^3          %8.3f TFLOP/s per rank\n", f->ceilings.product,
         f->ceilings.product_tflops);
  if (product_pj(&f->ceilings) > 0.0) {
    printf("    for a second        %8.3f TFLOP/s, %.3f pJ/FLOP: ", f->ceilings.sustained_tflops,
           product_pj(&f->ceilings));
    print_power(&f->ceilings.power, ranks);
    printf("\n");
  }
  printf("  copy                  %8.1f GB/s per rank, read and written\n", f->ceilings.copy_gbs);
  for (int c = 0; c < MOE_BENCH_COLLECTIVES && cmd->collectives && ranks > 1; c++) {
    printf("  %-20s  %8.2f %8.2f %8.2f GB/s on the bus at %d, %d, %d MiB\n",
           moe_bench_collective_name(c), f->bus[c][0], f->bus[c][1], f->bus[c][2],
           collective_mib[0], collective_mib[1], collective_mib[2]);
  }
}

static void print_step(const moe_engine *e, const command *cmd, const figures *f) {
  const moe_bench_step_result *s = &f->step;
  char planned[MOE_TEXT], used[MOE_TEXT];
  int64_t recomputed[MOE_RECOMPUTE_AUTO];
  moe_model_recompute(e->model, recomputed);
  printf("step: %" PRId64
         " tokens, %s, ep %d x edp %d, exchange %s, %s planned, recomputed: SwiGLU of %" PRId64
         ", experts of %" PRId64 " and blocks of %" PRId64 " layers%s; median of %d\n",
         s->tokens, moe_dtype_name(moe_config_compute_dtype(&e->config)), e->mesh.ep, e->mesh.edp,
         moe_model_exchange_name(e->model), moe_text_bytes(planned, (double)f->planned_bytes),
         recomputed[MOE_RECOMPUTE_SWIGLU], recomputed[MOE_RECOMPUTE_EXPERTS],
         recomputed[MOE_RECOMPUTE_BLOCK], cmd->balanced ? ", balanced routing" : "",
         (int)cmd->steps);
  printf("  %.1f ms (%.1f to %.1f), %.0f tokens/s, %.4f TFLOP/s per rank = %.1f %% of the product",
         1e3 * s->seconds, 1e3 * s->fastest, 1e3 * s->slowest, (double)s->tokens / s->seconds,
         s->model_tflops, 100.0 * s->model_tflops / f->ceilings.product_tflops);
  double peak = moe_device_peak_tflops(e->dev, moe_config_compute_dtype(&e->config));
  if (peak > 0.0) printf(", %.1f %% MFU of %.0f", 100.0 * s->model_tflops / peak, peak);
  printf("\n  arithmetic waits %.1f ms for exchanges (mean of the ranks; the one that waits least: "
         "%.1f); %s used on the fullest rank\n",
         1e3 * s->exchange, 1e3 * s->exchange_least, moe_text_bytes(used, (double)f->used_bytes));
}

/* Joules, and what the model's FLOPs alone would take at the lone product's rate. */
static void print_energy(const moe_engine *e, const figures *f) {
  const moe_bench_step_result *s = &f->step;
  int ranks = moe_comm_size(e->world);
  if (s->power.own.samples <= 0.0) return;
  double joules = s->power.mean.joules / s->timed_steps; /* of a rank and step */
  double least = s->model_tflops * s->seconds * product_pj(&f->ceilings);
  printf("  power: ");
  print_power(&s->power, ranks);
  printf("\n  energy: %.1f J a step%s, %.2f mJ a token", joules, ranks > 1 ? " and rank" : "",
         1e3 * joules * ranks / (double)s->tokens);
  if (least > 0.0)
    printf("; the model's FLOPs at the lone product's pJ: %.1f J, %.1f %%", least,
           100.0 * least / joules);
  printf("\n");
}

static void print_parts(const figures *f) {
  const moe_bench_step_result *s = &f->step;
  for (int i = 0; i < MOE_BENCH_PARTS; i++) {
    const moe_bench_part *p = &s->part[i];
    printf("  %-26s %9.2f ms %6.1f %%", p->name, 1e3 * p->seconds, 100.0 * p->seconds / s->seconds);
    if (p->flops > 0.0) {
      double tflops = 1e-12 * p->flops / p->seconds;
      printf("  %8.3f TFLOP/s, %5.1f %% of the product", tflops,
             100.0 * tflops / f->ceilings.product_tflops);
    }
    if (p->mhz > 0.0) printf("%s%.0f MHz", p->flops > 0.0 ? ", " : "  ", p->mhz);
    printf("\n");
  }
}

/* As measured, in steps slowed by measuring. */
static void print_operations(const moe_bench_step_result *s) {
  double steps = s->timed_steps;
  printf("operations of rank 0 in timed steps of %.1f ms each\n", 1e3 * s->timed_seconds / steps);
  for (int i = 0; i < s->ops; i++) {
    const moe_profile_row *r = &s->op[i];
    printf("  %-22s %-20s %7.0f calls %9.3f ms %9.1f us each", r->op, r->label,
           (double)r->calls / steps, 1e3 * r->seconds / steps, 1e6 * r->seconds / (double)r->calls);
    if (r->flops > 0.0) printf("  %8.3f TFLOP/s", 1e-12 * r->flops / r->seconds);
    if (r->cycle_seconds > 0.0) printf("  %5.0f MHz", 1e-6 * r->cycles / r->cycle_seconds);
    printf("\n");
  }
}

static void write_step(const moe_engine *e, const figures *f, FILE *out) {
  const moe_bench_step_result *s = &f->step;
  const moe_config *c = &e->config;
  double peak = moe_device_peak_tflops(e->dev, moe_config_compute_dtype(c));
  int64_t recomputed[MOE_RECOMPUTE_AUTO];
  moe_model_recompute(e->model, recomputed);
  fprintf(out,
          "\"ep\": %d, \"exchange\": \"%s\", \"grad_dtype\": \"%s\", \"moment_dtype\": \"%s\", "
          "\"recomputed_swiglu\": %" PRId64 ", \"recomputed_experts\": %" PRId64
          ", \"recomputed_blocks\": %" PRId64 ", \"step_seconds\": %.6g, \"tokens\": %" PRId64
          ", \"model_tflops_per_rank\": %.6g, \"of_product\": %.6g, \"mfu\": %.6g, "
          "\"exchange_seconds\": %.6g, \"exchange_least_seconds\": %.6g, "
          "\"planned_bytes\": %" PRId64 ", \"used_bytes\": %" PRId64 ", ",
          e->mesh.ep, moe_model_exchange_name(e->model), moe_dtype_name(moe_config_grad_dtype(c)),
          moe_dtype_name(moe_config_moment_dtype(c)), recomputed[MOE_RECOMPUTE_SWIGLU],
          recomputed[MOE_RECOMPUTE_EXPERTS], recomputed[MOE_RECOMPUTE_BLOCK], s->seconds, s->tokens,
          s->model_tflops, s->model_tflops / f->ceilings.product_tflops,
          peak > 0.0 ? s->model_tflops / peak : 0.0, s->exchange, s->exchange_least,
          f->planned_bytes, f->used_bytes);
}

/* Means of the ranks; zeros where the driver does not tell. */
static void write_power(const figures *f, FILE *out) {
  const moe_power_use *step = &f->step.power.mean, *product = &f->ceilings.power.mean;
  fprintf(
      out,
      "\"watts\": %.6g, \"limit_watts\": %.6g, \"mhz\": %.6g, \"set_mhz\": %.6g, \"capped\": %.6g, "
      "\"joules\": %.6g, \"product_sustained_tflops\": %.6g, \"product_watts\": %.6g, "
      "\"product_mhz\": %.6g, ",
      step->watts, step->limit_watts, step->mhz, step->set_mhz, step->capped,
      step->joules / f->step.timed_steps, f->ceilings.sustained_tflops, product->watts,
      product->mhz);
}

static moe_status write_json(const moe_engine *e, const char *path, const figures *f) {
  FILE *out = fopen(path, "w");
  if (!out) return moe_fail(MOE_IO, "cannot write: %s: choose another --json FILE", path);
  fprintf(out,
          "{\"device\": \"%s\", \"ranks\": %d, \"dtype\": \"%s\", \"product_n\": %" PRId64
          ", \"product_tflops\": %.6g, \"copy_gbs\": %.6g, ",
          moe_device_name(e->dev), moe_comm_size(e->world),
          moe_dtype_name(moe_config_compute_dtype(&e->config)), f->ceilings.product,
          f->ceilings.product_tflops, f->ceilings.copy_gbs);
  write_step(e, f, out);
  write_power(f, out);
  fprintf(out, "\"parts\": [");
  for (int i = 0; i < MOE_BENCH_PARTS; i++) {
    const moe_bench_part *p = &f->step.part[i];
    fprintf(out, "%s{\"name\": \"%s\", \"seconds\": %.6g, \"flops\": %.6g, \"mhz\": %.6g}",
            i ? ", " : "", p->name, p->seconds, p->flops, p->mhz);
  }
  fprintf(out, "]}\n");
  if (fclose(out) == 0) return MOE_OK;
  return moe_fail(MOE_IO, "cannot write: %s: is the disk full?", path);
}

static moe_status tell(const moe_engine *e, const command *cmd, const figures *f) {
  print_ceilings(e, cmd, f);
  print_step(e, cmd, f);
  print_energy(e, f);
  print_parts(f);
  if (cmd->operations) print_operations(&f->step);
  return cmd->json ? write_json(e, cmd->json, f) : MOE_OK;
}

static moe_status work(command *cmd, moe_comm *world) {
  moe_device *dev = NULL;
  moe_engine engine;
  static figures f; /* large */
  memset(&f, 0, sizeof f);
  MOE_TRY(moe_config_resolve(&cmd->config, moe_comm_size(world)));
  MOE_TRY(moe_agree(world, moe_engine_open_device(&cmd->config, &dev)));
  int64_t free_at_start = moe_device_free_bytes(dev);
  moe_status status = measure_machine(cmd, dev, &f);
  if (status == MOE_OK) status = moe_engine_create(&cmd->config, dev, true, false, &engine);
  if (status == MOE_OK) {
    status = measure_step(&engine, cmd, &f);
    if (status == MOE_OK) status = measure_memory(&engine, free_at_start, &f);
    if (status == MOE_OK && moe_comm_rank(world) == 0) status = tell(&engine, cmd, &f);
    status = moe_agree(world, status);
    moe_engine_destroy(&engine);
  }
  moe_device_close(dev);
  return status;
}

static moe_status run(int argc, char **argv, moe_comm *world) {
  static command cmd; /* large */
  cmd = (command){.steps = 8, .warmup = 2, .collectives = true};
  MOE_TRY(moe_agree(world, parse(argc, argv, &cmd)));
  if (!cmd.answer) return work(&cmd, world);
  if (moe_comm_rank(world) == 0) fputs(cmd.answer, stdout);
  return MOE_OK;
}

int main(int argc, char **argv) {
  return moe_program_run("moe-bench", argc, argv, run);
}
