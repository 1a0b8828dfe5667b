/* The run's folder.
 *
 * A start is recorded by what can be seen from inside the process: its command line, the libraries
 * the loader mapped for it, the hosts and devices its ranks found; so the record cannot differ from
 * what ran. */
#include "core/train/run_dir.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "checkpoint/commit.h"
#include "checkpoint/files.h"
#include "core/base/log.h"
#include "core/train/build_info.h"
#include "core/train/run_state.h"

/* ---- room */

moe_status moe_run_disk_of(const moe_config *config, moe_run_disk *out) {
  char folder[MOE_PATH];
  int64_t *steps, there;
  MOE_TRY(moe_commit_folder(config->run.dir, folder));
  MOE_TRY(moe_commit_list(folder, &steps, &there));
  free(steps);
  /* the newest and the one being written exist at once, hence keep + 1 */
  int64_t keep = config->checkpoint.keep;
  *out = (moe_run_disk){.free = moe_files_free_bytes(config->run.dir),
                        .each = moe_run_state_bytes(config),
                        .more = there < keep ? keep + 1 - there : 1};
  return MOE_OK;
}

moe_status moe_run_dir_check_disk(const moe_config *config) {
  moe_run_disk d;
  char have[MOE_TEXT], each[MOE_TEXT];
  if (config->checkpoint.interval == 0 && !config->checkpoint.save_final) return MOE_OK;
  MOE_TRY(moe_run_disk_of(config, &d));
  moe_text_bytes(have, (double)d.free);
  moe_text_bytes(each, (double)d.each);
  if (d.free < d.each)
    return moe_fail(MOE_IO,
                    "%s: its disk has %s free and one checkpoint takes %s: free some space or "
                    "choose another run.dir",
                    config->run.dir, have, each);
  if ((double)d.free < (double)d.more * (double)d.each)
    moe_warn("%s: its disk has %s free, and %" PRId64
             " more checkpoints of %s come before one is deleted: free some space or lower "
             "checkpoint.keep",
             config->run.dir, have, d.more, each);
  return MOE_OK;
}

/* ---- config.ini */

moe_status moe_run_dir_write_config(const moe_config *config) {
  char path[MOE_CONFIG_TEXT + 32];
  char *text = moe_config_text(config);
  if (!text) return moe_fail(MOE_NO_MEMORY, "out of memory: configuration text");
  snprintf(path, sizeof path, "%s/config.ini", config->run.dir);
  moe_status status = moe_files_replace(path, text, (int64_t)strlen(text));
  free(text);
  return status;
}

/* ---- provenance.jsonl */

enum { NAME = 64 };

typedef struct {
  char host[NAME], device[NAME];
} place;

void moe_run_dir_keep_tokenizer(const moe_config *config) {
  enum { LIMIT = 256 << 20 };
  const char *from = config->data.tokenizer;
  char to[MOE_PATH], *model = NULL;
  int64_t length = 0;
  if (!from[0] || strcmp(from, "bytes") == 0) return;
  snprintf(to, sizeof to, "%s/tokenizer.model", config->run.dir);
  moe_status status = moe_files_read(from, LIMIT, &model, &length);
  if (status == MOE_OK) status = moe_files_replace(to, model, length);
  free(model);
  if (status == MOE_OK) return;
  moe_warn("data.tokenizer is not kept with the run: %s", moe_error_message());
  moe_error_clear();
}

/* The words of this process's command line. */
static cJSON *command_line(void) {
  cJSON *words = cJSON_CreateArray();
  char *word = NULL;
  size_t room = 0;
  FILE *f = fopen("/proc/self/cmdline", "r");
  while (f && getdelim(&word, &room, 0, f) > 0)
    cJSON_AddItemToArray(words, cJSON_CreateString(word));
  if (f) fclose(f);
  free(word);
  return words;
}

/* Is this the file of a library whose version may matter to a run? */
static bool is_of_interest(const char *file) {
  static const char *const names[] = {"libmpi.so", "libhdf5",  "libopenblas", "libcuda",
                                      "libcublas", "libcudnn", "libnccl",     "libxxhash",
                                      "libc.so.6", "libgomp"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (strncmp(file, names[i], strlen(names[i])) == 0) return true;
  return false;
}

/* Files of libraries that are mapped now; their names end in their versions. */
static cJSON *libraries(void) {
  cJSON *list = cJSON_CreateArray();
  char line[4096], last[4096] = "";
  FILE *f = fopen("/proc/self/maps", "r");
  while (f && fgets(line, sizeof line, f)) {
    char *path = strchr(line, '/');
    if (!path) continue;
    path[strcspn(path, "\n")] = 0;
    if (strcmp(path, last) == 0) continue; /* the mappings of a file follow each other */
    snprintf(last, sizeof last, "%s", path);
    if (is_of_interest(strrchr(path, '/') + 1))
      cJSON_AddItemToArray(list, cJSON_CreateString(path));
  }
  if (f) fclose(f);
  return list;
}

/* The first line of a file, or "". */
static void first_line(const char *path, char *out, int size) {
  FILE *f = fopen(path, "r");
  if (!f || !fgets(out, size, f)) out[0] = 0;
  out[strcspn(out, "\n")] = 0;
  if (f) fclose(f);
}

static cJSON *start_record(const moe_engine *e, const place *places, int64_t step,
                           const char *from) {
  char now[32], driver[256];
  time_t t = time(NULL);
  struct tm utc;
  strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &utc));
  first_line("/proc/driver/nvidia/version", driver, sizeof driver);
  int ranks = moe_comm_size(e->world);
  cJSON *o = cJSON_CreateObject(), *hosts = cJSON_CreateArray(), *devices = cJSON_CreateArray();
  cJSON_AddStringToObject(o, "time", now);
  cJSON_AddNumberToObject(o, "step", (double)step);
  cJSON_AddStringToObject(o, "from", from);
  cJSON_AddStringToObject(o, "version", MOE_VERSION);
  cJSON_AddStringToObject(o, "commit", MOE_COMMIT);
  cJSON_AddStringToObject(o, "compiler", MOE_COMPILER);
  cJSON_AddItemToObject(o, "command", command_line());
  cJSON_AddNumberToObject(o, "ranks", ranks);
  cJSON_AddNumberToObject(o, "ep", e->mesh.ep);
  for (int r = 0; r < ranks; r++) {
    cJSON_AddItemToArray(hosts, cJSON_CreateString(places[r].host));
    cJSON_AddItemToArray(devices, cJSON_CreateString(places[r].device));
  }
  cJSON_AddItemToObject(o, "hosts", hosts);
  cJSON_AddItemToObject(o, "devices", devices);
  cJSON_AddItemToObject(o, "libraries", libraries());
  if (driver[0]) cJSON_AddStringToObject(o, "driver", driver);
  return o;
}

/* A line that a crash tore is ended first, so that ours is whole. */
static moe_status append_line(const char *path, const char *text) {
  char last = '\n';
  int fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) return moe_fail(MOE_IO, "%s: cannot open: %s", path, strerror(errno));
  off_t size = lseek(fd, 0, SEEK_END);
  if (size > 0 && pread(fd, &last, 1, size - 1) != 1) last = '\n';
  int length = dprintf(fd, "%s%s\n", last == '\n' ? "" : "\n", text);
  moe_status status = MOE_OK;
  if (length < 0 || fsync(fd) != 0)
    status = moe_fail(MOE_IO, "%s: cannot write: %s", path, strerror(errno));
  close(fd);
  return status;
}

static moe_status write_start(const moe_engine *e, const place *places, int64_t step,
                              const char *from) {
  char path[MOE_CONFIG_TEXT + 32];
  cJSON *record = start_record(e, places, step, from);
  char *text = cJSON_PrintUnformatted(record);
  cJSON_Delete(record);
  if (!text) return moe_fail(MOE_NO_MEMORY, "out of memory: record of the start");
  snprintf(path, sizeof path, "%s/provenance.jsonl", e->config.run.dir);
  moe_status status = append_line(path, text);
  cJSON_free(text);
  return status;
}

moe_status moe_run_dir_record_start(const moe_engine *e, int64_t step, const char *from) {
  place mine = {.host = "?"};
  gethostname(mine.host, sizeof mine.host - 1);
  snprintf(mine.device, sizeof mine.device, "%.63s", moe_device_name(e->dev));
  place *all = calloc((size_t)moe_comm_size(e->world), sizeof *all);
  moe_status status = all ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: list of ranks");
  status = moe_agree(e->world, status);
  if (status == MOE_OK) status = moe_comm_host_all_gather(e->world, &mine, sizeof mine, all);
  if (status == MOE_OK && moe_comm_rank(e->world) == 0 &&
      write_start(e, all, step, from) != MOE_OK) {
    moe_warn("this start is not recorded: %s", moe_error_message());
    moe_error_clear();
  }
  free(all);
  return status;
}
