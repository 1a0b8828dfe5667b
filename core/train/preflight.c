/* The preflight's table, and the checks of programs, devices and data.
 *
 * What is wrong with one host of many shows as a hang or a strange error hours later; each check
 * here asks the question directly, so that the answer names the host. */
#include "core/train/preflight.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/base/log.h"
#include "core/train/engine.h"
#include "core/train/preflight_checks.h"
#include "data/loader.h"

/* ---- the same everywhere ------------------------------------------------------------------- */

/* Is `mine` rank 0's value, too? */
static moe_status same_as_rank_0(moe_preflight_job *p, uint64_t mine, bool *same) {
  uint64_t theirs = mine;
  MOE_TRY(moe_comm_host_broadcast(p->world, &theirs, (int64_t)sizeof theirs, 0));
  *same = mine == theirs;
  return MOE_OK;
}

static moe_status hash_file(const char *path, uint64_t *hash) {
  static char buffer[1 << 16];
  XXH3_state_t *state = XXH3_createState();
  FILE *f = fopen(path, "rb");
  size_t n;
  bool fine = f && state && XXH3_64bits_reset(state) == XXH_OK;
  while (fine && (n = fread(buffer, 1, sizeof buffer, f)) > 0) XXH3_64bits_update(state, buffer, n);
  fine = fine && !ferror(f);
  if (fine) *hash = XXH3_64bits_digest(state);
  if (f) fclose(f);
  XXH3_freeState(state);
  return fine ? MOE_OK : moe_fail(MOE_IO, "%s: cannot read: check its permissions", path);
}

static moe_status check_program(moe_preflight_job *p) {
  uint64_t hash = 0;
  bool same = false;
  char path[1024] = "?";
  moe_status status = hash_file("/proc/self/exe", &hash);
  MOE_TRY(same_as_rank_0(p, hash, &same));
  MOE_TRY(status);
  if (readlink("/proc/self/exe", path, sizeof path - 1) < 0) path[0] = '?';
  snprintf(p->detail, sizeof p->detail, "moe-train " MOE_VERSION ", %016" PRIx64, hash);
  if (same) return MOE_OK;
  return moe_fail(MOE_FAILED,
                  "%s is not the program of rank 0: put the same build on every host, or run it "
                  "from a shared folder",
                  path);
}

static moe_status check_config(moe_preflight_job *p) {
  char *text = moe_config_text(p->config);
  uint64_t hash = text ? XXH3_64bits(text, strlen(text)) : 0;
  bool same = false;
  moe_status status = text ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: configuration text");
  free(text);
  MOE_TRY(same_as_rank_0(p, hash, &same));
  MOE_TRY(status);
  snprintf(p->detail, sizeof p->detail, "all settings agree");
  if (same) return MOE_OK;
  return moe_fail(MOE_FAILED, "its settings are not those of rank 0: put the same configuration "
                              "file on every host, or in a shared folder");
}

static moe_status check_data(moe_preflight_job *p) {
  moe_loader *loader = NULL;
  bool same = false;
  moe_status status = moe_loader_create(p->config, MOE_SPLIT_TRAIN, moe_comm_rank(p->world),
                                        moe_comm_size(p->world), &loader);
  uint64_t fingerprint = status == MOE_OK ? moe_loader_fingerprint(loader) : 0;
  moe_loader_destroy(loader);
  MOE_TRY(same_as_rank_0(p, fingerprint, &same));
  MOE_TRY(status);
  snprintf(p->detail, sizeof p->detail, "fingerprint %016" PRIx64 " on every rank", fingerprint);
  if (same || moe_comm_rank(p->world) == 0) return MOE_OK;
  return moe_fail(MOE_FAILED, "data.train are not the token files rank 0 has: copy them to every "
                              "host, or keep them in a shared folder");
}

/* ---- devices ------------------------------------------------------------------------------- */

typedef struct {
  char name[128];
  int64_t free_bytes;
  bool is_host;
} device_seen;

/* A GPU of the same kind elsewhere has clearly more free memory: someone else works here. */
static moe_status check_taken(const device_seen *mine, const device_seen *all, int ranks) {
  int64_t most = 0;
  char here[MOE_TEXT], there[MOE_TEXT];
  for (int r = 0; r < ranks; r++) {
    if (strcmp(all[r].name, mine->name) == 0 && all[r].free_bytes > most) most = all[r].free_bytes;
  }
  if (mine->is_host || (double)mine->free_bytes >= 0.9 * (double)most) return MOE_OK;
  return moe_fail(MOE_FAILED,
                  "%s has %s of free memory where another has %s: a program works on it, see "
                  "nvidia-smi, end that one or leave this GPU out with CUDA_VISIBLE_DEVICES",
                  mine->name, moe_text_bytes(here, (double)mine->free_bytes),
                  moe_text_bytes(there, (double)most));
}

static int count_hosts(const moe_preflight_job *p) {
  int hosts = 0;
  for (int r = 0; r < moe_comm_size(p->world); r++) {
    int first = 0;
    while (strcmp(p->hosts[first], p->hosts[r]) != 0) first++;
    hosts += first == r;
  }
  return hosts;
}

static moe_status check_devices(moe_preflight_job *p) {
  int ranks = moe_comm_size(p->world);
  device_seen mine = {.name = ""}, *all = calloc((size_t)ranks, sizeof *all);
  char free_text[MOE_TEXT];
  moe_status status =
      all ? moe_engine_open_device(p->config, &p->dev) : moe_fail(MOE_NO_MEMORY, "out of memory");
  status = moe_agree(p->world, status);
  if (status != MOE_OK || !all) goto done;
  mine.is_host = moe_device_is_host(p->dev);
  mine.free_bytes = moe_device_free_bytes(p->dev);
  snprintf(mine.name, sizeof mine.name, "%s", moe_device_name(p->dev));
  MOE_TRY_OR(status, done, moe_comm_host_all_gather(p->world, &mine, (int64_t)sizeof mine, all));
  int hosts = count_hosts(p);
  snprintf(p->detail, sizeof p->detail, "%s; %d rank%s on %d host%s%s%s", mine.name, ranks,
           ranks > 1 ? "s" : "", hosts, hosts > 1 ? "s" : "", mine.is_host ? "" : "; free: ",
           mine.is_host ? "" : moe_text_bytes(free_text, (double)mine.free_bytes));
  status = check_taken(&mine, all, ranks);
done:
  free(all);
  return status;
}

/* Rank r brings r + 1 + (i mod 7) as element i: every partial sum is a small integer, so the result
 * is exact in any order. */
enum { SUM_ELEMENTS = 1 << 20 };

static moe_status check_sum(moe_preflight_job *p, moe_comm *comm, moe_tensor x, float *host) {
  int ranks = moe_comm_size(comm), mine = moe_comm_rank(comm) + 1;
  char rate[MOE_TEXT];
  int64_t bytes = moe_tensor_bytes(x);
  for (int64_t i = 0; i < SUM_ELEMENTS; i++) host[i] = (float)(mine + i % 7);
  MOE_TRY(moe_device_upload(p->dev, x.data, host, bytes));
  MOE_TRY(moe_device_sync(p->dev));
  double start = moe_clock_s();
  MOE_TRY(moe_comm_all_reduce(comm, x, MOE_SUM));
  MOE_TRY(moe_device_sync(p->dev));
  double seconds = moe_clock_s() - start;
  MOE_TRY(moe_device_download(p->dev, host, x.data, bytes));
  MOE_TRY(moe_device_sync(p->dev));
  for (int64_t i = 0; i < SUM_ELEMENTS; i++) {
    int64_t expected = (int64_t)ranks * (ranks + 1) / 2 + ranks * (i % 7);
    if ((int64_t)host[i] == expected) continue;
    return moe_fail(MOE_FAILED,
                    "element %" PRId64 " of a sum over %d ranks came as %g, not %" PRId64
                    ": the network or a GPU damages data: run with NCCL_DEBUG=INFO, try without "
                    "this host",
                    i, ranks, (double)host[i], expected);
  }
  snprintf(p->detail, sizeof p->detail, "%s over %d ranks, sums exact, %.1f ms with set-up",
           moe_text_bytes(rate, (double)bytes), ranks, seconds * 1e3);
  return MOE_OK;
}

static moe_status check_all_reduce(moe_preflight_job *p) {
  moe_comm *comm = NULL;
  moe_tensor x = {0};
  float *host = malloc(SUM_ELEMENTS * sizeof *host);
  moe_status status = moe_comm_world(p->dev, &comm); /* collective: the same on every rank */
  if (status != MOE_OK) goto done;
  void *data = moe_device_alloc(p->dev, SUM_ELEMENTS * (int64_t)sizeof *host);
  x = moe_tensor_1d(data, MOE_F32, SUM_ELEMENTS);
  if (!host || !data) status = moe_fail(MOE_NO_MEMORY, "no memory for an all-reduce of 4 MiB");
  status = moe_agree(p->world, status);
  if (status != MOE_OK || !host) goto done;
  status = check_sum(p, comm, x, host);
done:
  if (x.data) moe_device_free(p->dev, x.data);
  moe_comm_destroy(comm);
  free(host);
  return status;
}

static moe_status check_memory(moe_preflight_job *p) {
  moe_engine engine;
  char need[MOE_TEXT], have[MOE_TEXT];
  MOE_TRY(moe_engine_create(p->config, p->dev, true, true, &engine));
  bool counted = !moe_device_is_host(p->dev);
  snprintf(p->detail, sizeof p->detail, "%s planned per rank%s%s",
           moe_text_bytes(need, (double)moe_engine_planned_bytes(&engine)), counted ? " of " : "",
           counted ? moe_text_bytes(have, (double)moe_device_free_bytes(p->dev)) : "");
  moe_engine_destroy(&engine);
  return MOE_OK;
}

/* ---- the table ----------------------------------------------------------------------------- */

static const struct {
  const char *name;
  moe_status (*check)(moe_preflight_job *p);
  bool needs_device;
} checks[] = {
    {"same program", check_program, false},
    {"same configuration", check_config, false},
    {"devices", check_devices, false},
    {"all-reduce", check_all_reduce, true},
    {"memory", check_memory, true},
    {"training data", check_data, false},
    {"run directory", moe_preflight_run_dir, false},
    {"disk space", moe_preflight_space, false},
};
enum { CHECKS = sizeof checks / sizeof *checks };

/* "rank 3: ..." becomes "rank 3 (node2): ...": a person looks for a machine. */
static void print_failure(const moe_preflight_job *p, const char *message, FILE *out) {
  int rank = -1, length = 0;
  if (sscanf(message, "rank %d: %n", &rank, &length) == 1 && rank >= 0 &&
      rank < moe_comm_size(p->world) && length > 0)
    fprintf(out, "rank %d (%s): %s\n", rank, p->hosts[rank], message + length);
  else
    fprintf(out, "%s\n", message);
}

/* One row; true when the check passed on every rank. */
static bool run_check(moe_preflight_job *p, int i, FILE *out) {
  p->detail[0] = '\0';
  moe_status status = moe_agree(p->world, checks[i].check(p));
  if (moe_comm_rank(p->world) == 0) {
    fprintf(out, "%-20s %-5s ", checks[i].name, status == MOE_OK ? "pass" : "FAIL");
    if (status == MOE_OK)
      fprintf(out, "%s\n", p->detail);
    else
      print_failure(p, moe_error_message(), out);
    fflush(out);
  }
  moe_error_clear();
  return status == MOE_OK;
}

static moe_status name_hosts(moe_preflight_job *p) {
  moe_host_name mine = "?";
  p->hosts = calloc((size_t)moe_comm_size(p->world), sizeof *p->hosts);
  MOE_TRY(moe_agree(p->world, p->hosts ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory")));
  gethostname(mine, sizeof mine - 1);
  return moe_comm_host_all_gather(p->world, mine, (int64_t)sizeof mine, p->hosts);
}

moe_status moe_preflight(const moe_config *config, moe_comm *world, FILE *out) {
  moe_preflight_job p = {.config = config, .world = world};
  int failed = 0;
  moe_status status = name_hosts(&p);
  for (int i = 0; i < CHECKS && status == MOE_OK; i++) {
    if (!checks[i].needs_device || p.dev) {
      failed += !run_check(&p, i, out);
    } else if (moe_comm_rank(world) == 0) {
      fprintf(out, "%-20s %-5s %s\n", checks[i].name, "-", "not tried: no device");
    }
  }
  moe_device_close(p.dev);
  free(p.hosts);
  MOE_TRY(status);
  if (failed == 0) return MOE_OK;
  return moe_fail(MOE_FAILED, "preflight: %d of %d checks failed: mend what the table names",
                  failed, CHECKS);
}
