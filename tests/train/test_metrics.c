/* metrics.jsonl, terminal lines and what happens to them on resume, after a crash and on a full
 * disk. */
#include "core/train/metrics.h"
#include "core/train/metrics_log.h"
#include "core/train/terminal.h"

#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <criterion/new/assert.h>
#include <math.h>
#include <pty.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[] = "/tmp/moe-metrics-XXXXXX";
static char jsonl[64];

static void make_dir(void) {
  cr_assert(ne(ptr, mkdtemp(dir), NULL));
  snprintf(jsonl, sizeof jsonl, "%s/metrics.jsonl", dir);
}
static void remove_dir(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf %s", dir);
  cr_assert(eq(int, system(command), 0));
}
TestSuite(metrics, .init = make_dir, .fini = remove_dir);

/* Two layers of four experts, two ranks of 1 TFLOP/s each. */
static moe_metrics *open_metrics(int64_t first_step) {
  moe_config c;
  moe_config_defaults(&c);
  snprintf(c.run.dir, sizeof c.run.dir, "%s", dir);
  c.train.steps = 10;
  c.log.interval = 100;
  moe_metrics *m = NULL;
  cr_assert(eq(int, moe_metrics_create(&c, 0, 2, 2, 4, 1.0, first_step, &m), MOE_OK));
  return m;
}

static const double balanced_and_not[8] = {0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.0, 0.0};

static moe_step_record record(int64_t step) {
  return (moe_step_record){.step = step,
                           .tokens = 4096 * step,
                           .step_tokens = 4096,
                           .loss = 1.0 / 3.0,
                           .ce = M_PI,
                           .aux = 0.1,
                           .z = 1e-300,
                           .lr = 1.2e-4,
                           .grad_norm = 0.873,
                           .seconds = 0.5,
                           .part_seconds = {0.001, 0.1, 0.2, 0.05, 0.01, 0.02},
                           .flops = 2e11,
                           .memory_bytes = 123456789012,
                           .expert_load = balanced_and_not,
                           .dropped = 3.0};
}

static void record_steps(int64_t first, int64_t last) {
  moe_metrics *m = open_metrics(first - 1);
  for (int64_t step = first; step <= last; step++) {
    moe_step_record r = record(step);
    cr_assert(eq(int, moe_metrics_record(m, &r), MOE_OK));
  }
  moe_metrics_destroy(m);
}

/* Every line of metrics.jsonl, parsed; asserts that each one is an object. */
static int read_lines(cJSON *lines[], int room) {
  FILE *f = fopen(jsonl, "r");
  cr_assert(ne(ptr, f, NULL));
  char *line = NULL;
  size_t size = 0;
  int n = 0;
  while (getline(&line, &size, f) > 0) {
    cr_assert(lt(int, n, room));
    lines[n] = cJSON_Parse(line);
    cr_assert(cJSON_IsObject(lines[n]), "not an object: %s", line);
    n++;
  }
  free(line);
  fclose(f);
  return n;
}

static double number(const cJSON *object, const char *key) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
  cr_assert(cJSON_IsNumber(item), "%s is not a number", key);
  return item->valuedouble;
}

static void append_text(const char *text) {
  FILE *f = fopen(jsonl, "a");
  fputs(text, f);
  fclose(f);
}

static void expect_steps(int count, const int *steps) {
  cJSON *lines[32];
  cr_assert(eq(int, read_lines(lines, 32), count));
  for (int i = 0; i < count; i++) cr_assert(eq(dbl, number(lines[i], "step"), steps[i]));
}

/* ---- metrics.jsonl ------------------------------------------------------------------------- */

Test(metrics, write_every_number_so_that_it_reads_back_exactly) {
  record_steps(1, 1);
  cJSON *line[2];
  cr_assert(eq(int, read_lines(line, 2), 1));
  moe_step_record r = record(1);
  cr_assert(eq(dbl, number(line[0], "step"), 1));
  cr_assert(eq(dbl, number(line[0], "tokens"), 4096));
  cr_assert(eq(dbl, number(line[0], "loss"), r.loss));
  cr_assert(eq(dbl, number(line[0], "ce"), r.ce));
  cr_assert(eq(dbl, number(line[0], "aux"), r.aux));
  cr_assert(eq(dbl, number(line[0], "z"), r.z));
  cr_assert(eq(dbl, number(line[0], "lr"), r.lr));
  cr_assert(eq(dbl, number(line[0], "grad_norm"), r.grad_norm));
  cr_assert(eq(dbl, number(line[0], "ms"), 500.0));
  cr_assert(eq(dbl, number(line[0], "tokens_per_s"), 8192.0));
  cr_assert(eq(dbl, number(line[0], "tflops"), 0.4));
  cr_assert(eq(dbl, number(line[0], "mfu"), 0.2)); /* of two ranks' peak */
  cr_assert(eq(dbl, number(line[0], "memory_bytes"), 123456789012.0));
  cr_assert(eq(dbl, number(line[0], "dropped"), 3.0));
  const cJSON *parts = cJSON_GetObjectItemCaseSensitive(line[0], "ms_by_part");
  cr_assert(eq(int, cJSON_GetArraySize(parts), MOE_STEP_PARTS));
  cr_assert(eq(dbl, number(parts, "backward"), 200.0));
}

Test(metrics, summarise_the_load_of_each_layer) {
  record_steps(1, 1);
  cJSON *line[2];
  read_lines(line, 2);
  const cJSON *load = cJSON_GetObjectItemCaseSensitive(line[0], "expert_load");
  cr_assert(eq(int, cJSON_GetArraySize(load), 2));
  const cJSON *even = cJSON_GetArrayItem(load, 0), *uneven = cJSON_GetArrayItem(load, 1);
  cr_assert(eq(dbl, number(even, "min"), 0.25));
  cr_assert(eq(dbl, number(even, "cv"), 0.0));
  cr_assert(eq(dbl, number(uneven, "min"), 0.0));
  cr_assert(eq(dbl, number(uneven, "max"), 0.5));
  cr_assert(eq(dbl, number(uneven, "cv"), 1.0));
  const cJSON *shares = cJSON_GetObjectItemCaseSensitive(uneven, "shares");
  cr_assert(eq(dbl, cJSON_GetArrayItem(shares, 1)->valuedouble, 0.5));
}

Test(metrics, write_null_for_what_is_not_a_number) {
  moe_metrics *m = open_metrics(0);
  moe_step_record r = record(1);
  r.loss = NAN;
  r.grad_norm = INFINITY;
  r.skipped = true;
  r.expert_load = NULL;
  moe_metrics_record(m, &r);
  moe_metrics_destroy(m);
  cJSON *line[2];
  cr_assert(eq(int, read_lines(line, 2), 1));
  cr_assert(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(line[0], "loss")));
  cr_assert(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(line[0], "grad_norm")));
  cr_assert(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(line[0], "expert_load")));
  cr_assert(cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(line[0], "skipped")));
}

Test(metrics, keep_evaluations_in_lines_of_their_own) {
  moe_metrics *m = open_metrics(0);
  moe_eval_record e = {.step = 5, .ce = 2.0, .perplexity = exp(2.0), .seconds = 1.5, .tokens = 640};
  cr_assert(eq(int, moe_metrics_eval(m, &e), MOE_OK));
  moe_metrics_destroy(m);
  cJSON *line[2];
  cr_assert(eq(int, read_lines(line, 2), 1));
  cr_assert(eq(dbl, number(line[0], "step"), 5));
  cr_assert(eq(dbl, number(line[0], "eval_ce"), 2.0));
  cr_assert(eq(dbl, number(line[0], "eval_perplexity"), exp(2.0)));
  cr_assert(eq(dbl, number(line[0], "eval_tokens"), 640));
}

Test(metrics, other_ranks_write_nothing) {
  moe_config c;
  moe_config_defaults(&c);
  snprintf(c.run.dir, sizeof c.run.dir, "%s", dir);
  moe_metrics *m;
  cr_assert(eq(int, moe_metrics_create(&c, 1, 2, 2, 4, 1.0, 0, &m), MOE_OK));
  moe_step_record r = record(1);
  moe_eval_record e = {.step = 1};
  cr_assert(eq(int, moe_metrics_record(m, &r), MOE_OK));
  cr_assert(eq(int, moe_metrics_eval(m, &e), MOE_OK));
  moe_metrics_destroy(m);
  cr_assert(eq(int, rmdir(dir), 0)); /* it is empty */
  cr_assert(eq(int, mkdir(dir, 0700), 0));
}

/* ---- resuming and crashes ------------------------------------------------------------------ */

Test(metrics, a_resumed_run_has_every_step_once) {
  record_steps(1, 8);
  record_steps(6, 9);
  expect_steps(9, (const int[]){1, 2, 3, 4, 5, 6, 7, 8, 9});
}

Test(metrics, a_new_run_starts_a_new_curve) {
  record_steps(1, 3);
  record_steps(1, 2);
  expect_steps(2, (const int[]){1, 2});
}

Test(metrics, a_torn_last_line_is_removed) {
  record_steps(1, 3);
  append_text("{\"step\": 4, \"tokens\": 163");
  record_steps(4, 5);
  expect_steps(5, (const int[]){1, 2, 3, 4, 5});
}

Test(metrics, a_last_line_without_its_end_is_torn_even_when_it_parses) {
  append_text("{\"step\": 1}\n{\"step\": 2}");
  record_steps(3, 3);
  expect_steps(2, (const int[]){1, 3});
}

Test(metrics, lines_that_are_not_records_are_removed) {
  append_text("[1, 2]\n\nnonsense\n{\"loss\": 1}\n{\"step\": \"4\"}\n{\"step\": 2}\n");
  record_steps(5, 5);
  expect_steps(2, (const int[]){2, 5});
}

Test(metrics, an_overlong_line_is_one_damaged_line) {
  FILE *f = fopen(jsonl, "w");
  for (int i = 0; i < 3 << 20; i++) fputs("{{{", f);
  fputs("{\"step\": 1}\n{\"step\": 2}\n", f);
  fclose(f);
  cr_assert(eq(int, moe_metrics_log_cut(jsonl, 9), MOE_OK));
  expect_steps(1, (const int[]){2});
}

Test(metrics, cutting_leaves_no_other_file_behind) {
  record_steps(1, 3);
  cr_assert(eq(int, moe_metrics_log_cut(jsonl, 2), MOE_OK));
  char fresh[80];
  snprintf(fresh, sizeof fresh, "%s.new", jsonl);
  cr_assert(ne(int, access(fresh, F_OK), 0));
  expect_steps(2, (const int[]){1, 2});
}

Test(metrics, a_missing_directory_is_named) {
  moe_config c;
  moe_config_defaults(&c);
  snprintf(c.run.dir, sizeof c.run.dir, "%s/absent", dir);
  moe_metrics *m;
  cr_assert(eq(int, moe_metrics_create(&c, 0, 1, 2, 4, 0.0, 0, &m), MOE_IO));
  cr_assert(ne(ptr, strstr(moe_error_message(), "absent/metrics.jsonl"), NULL));
}

/* A file-size limit is a disk that fills up in the middle of a record. */
static void limit_file_size(rlim_t bytes) {
  struct rlimit limit = {bytes, RLIM_INFINITY};
  signal(SIGXFSZ, SIG_IGN);
  cr_assert(eq(int, setrlimit(RLIMIT_FSIZE, &limit), 0));
}

Test(metrics, a_full_disk_loses_records_but_tears_none_and_ends_nothing) {
  moe_metrics *m = open_metrics(0);
  moe_step_record r = record(1);
  moe_metrics_record(m, &r);
  struct stat whole;
  cr_assert(eq(int, stat(jsonl, &whole), 0));
  limit_file_size((rlim_t)whole.st_size + 100);
  r = record(2);
  cr_assert(eq(int, moe_metrics_record(m, &r), MOE_OK));
  expect_steps(1, (const int[]){1});
  limit_file_size(RLIM_INFINITY); /* room again */
  r = record(3);
  cr_assert(eq(int, moe_metrics_record(m, &r), MOE_OK));
  moe_metrics_destroy(m);
  expect_steps(2, (const int[]){1, 3});
}

/* ---- terminal lines ------------------------------------------------------------------------ */

static const moe_step_rates rates = {
    .tokens_per_s = 4210.0, .tflops = 0.0312, .mfu = 0.123, .load_cv = 0.21};

static void print_steps(FILE *out, int64_t first, int64_t last, int64_t interval) {
  moe_terminal t = moe_terminal_of(out, first - 1, 1000, interval);
  for (int64_t step = first; step <= last; step++) {
    moe_step_record r = record(step);
    r.dropped = 0.0;
    moe_terminal_step(&t, &r, &rates);
  }
  moe_terminal_end(&t);
}

Test(terminal, prints_aligned_plain_lines_at_the_interval) {
  unsetenv("OMPI_COMM_WORLD_RANK");
  char *text = NULL;
  FILE *f = tmpfile();
  print_steps(f, 1, 100, 50);
  rewind(f);
  size_t size = 0;
  long length[4];
  int n = 0;
  while (n < 4 && (length[n] = getline(&text, &size, f)) > 0) {
    cr_assert(eq(ptr, strpbrk(text, "\r\033"), NULL));
    if (n == 0) cr_assert(eq(int, strncmp(text, "step    1/1000    0.1 %  eta ", 29), 0));
    if (n == 2) cr_assert(eq(int, strncmp(text, "step  100/1000   10.0 %  eta ", 29), 0));
    n++;
  }
  cr_assert(eq(int, n, 3)); /* the first step, 50 and 100 */
  cr_assert(eq(long, length[0], length[1]));
  cr_assert(eq(long, length[1], length[2]));
}

Test(terminal, says_what_a_step_was) {
  FILE *f = tmpfile();
  print_steps(f, 120, 120, 1);
  rewind(f);
  char line[512];
  cr_assert(ne(ptr, fgets(line, sizeof line, f), NULL));
  static const char *const wanted[] = {
      "120/1000",    "12.0 %",     "eta ",       "7m 20s",       "loss  0.3333", "4.21 k tok/s",
      "lr 1.20e-04", "|g|  0.873", "12.3 % MFU", "0.0312 TFLOP", "load CV 0.21", "ce  3.1416"};
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
    cr_assert(ne(ptr, strstr(line, wanted[i]), NULL), "no '%s' in: %s", wanted[i], line);
}

/* A live line ends with a return to its start, a kept one with a new line, and neither is wider
 * than the terminal. */
Test(terminal, updates_one_line_in_place_on_a_terminal) {
  unsetenv("OMPI_COMM_WORLD_RANK");
  int ours, theirs;
  struct winsize window = {.ws_row = 24, .ws_col = 70};
  cr_assert(eq(int, openpty(&ours, &theirs, NULL, NULL, &window), 0));
  FILE *f = fdopen(theirs, "w");
  print_steps(f, 2, 4, 4); /* the first, a live one, a multiple of the interval */
  fclose(f);
  char text[2048];
  size_t size = 0;
  ssize_t n;
  while ((n = read(ours, text + size, sizeof text - 1 - size)) > 0) size += (size_t)n;
  text[size] = '\0';
  char *kept = strstr(text, "step    2/"), *live = strstr(text, "step    3/"),
       *last = strstr(text, "step    4/");
  cr_assert(kept != NULL && live != NULL && last != NULL);
  cr_assert(eq(int, strncmp(strchr(kept, '\033'), "\033[K\r\n", 5), 0));
  cr_assert(eq(int, strncmp(strchr(live, '\033'), "\033[K\r\rstep", 9), 0));
  cr_assert(eq(int, strncmp(strchr(last, '\033'), "\033[K\r\n", 5), 0));
  cr_assert(lt(int, (int)(strchr(live, '\033') - live), 70));
  cr_assert(ne(ptr, strstr(text, "tok/s"), NULL));
  cr_assert(eq(ptr, strstr(text, "MFU"), NULL)); /* no room */
}

Test(terminal, keeps_the_line_of_a_skipped_step) {
  FILE *f = tmpfile();
  moe_terminal t = moe_terminal_of(f, 0, 1000, 100);
  moe_step_record r = record(7);
  r.loss = NAN;
  r.skipped = true;
  moe_terminal_step(&t, &r, &rates);
  rewind(f);
  char line[512];
  cr_assert(ne(ptr, fgets(line, sizeof line, f), NULL));
  cr_assert(ne(ptr, strstr(line, "SKIPPED"), NULL));
}

Test(terminal, prints_evaluations) {
  FILE *f = tmpfile();
  moe_terminal t = moe_terminal_of(f, 0, 1000, 100);
  moe_eval_record e = {
      .step = 200, .ce = 3.2189, .perplexity = 25.0, .seconds = 1.5, .tokens = 8192};
  moe_terminal_eval(&t, &e);
  rewind(f);
  char line[512];
  cr_assert(ne(ptr, fgets(line, sizeof line, f), NULL));
  cr_assert(
      eq(str, line, "eval  200  validation ce  3.2189  perplexity 25.00  8.19 K tokens  1.5 s\n"));
}
