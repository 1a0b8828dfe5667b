/* Reading /proc and /sys/fs/cgroup. */
#include "core/base/process_memory.h"

#include <stdio.h>
#include <string.h>

/* The value of a line `name:   123 kB` of a file, in bytes; 0 when it is not there. */
static int64_t line_bytes(const char *path, const char *name) {
  char line[256];
  long long kib = 0;
  size_t length = strlen(name);
  FILE *f = fopen(path, "r");
  while (f && fgets(line, sizeof line, f)) {
    if (strncmp(line, name, length) == 0 && sscanf(line + length, ": %lld kB", &kib) == 1) break;
  }
  if (f) fclose(f);
  return (int64_t)kib * 1024;
}

int64_t moe_process_resident(void) {
  return line_bytes("/proc/self/status", "VmRSS");
}

int64_t moe_process_peak(void) {
  return line_bytes("/proc/self/status", "VmHWM");
}

/* A file that holds one number; -1 for "max" and when it is not there. */
static int64_t number_in(const char *path) {
  long long value = -1;
  FILE *f = fopen(path, "r");
  if (f && fscanf(f, "%lld", &value) != 1) value = -1;
  if (f) fclose(f);
  return (int64_t)value;
}

/* Bytes of files that the control group keeps in memory and would give up. */
static int64_t cached_bytes(void) {
  char name[64];
  long long value, sum = 0;
  FILE *f = fopen("/sys/fs/cgroup/memory.stat", "r");
  while (f && fscanf(f, "%63s %lld", name, &value) == 2) {
    if (strcmp(name, "inactive_file") == 0 || strcmp(name, "active_file") == 0) sum += value;
  }
  if (f) fclose(f);
  return (int64_t)sum;
}

int64_t moe_host_available(void) {
  int64_t bytes = line_bytes("/proc/meminfo", "MemAvailable");
  if (bytes == 0) bytes = INT64_MAX;
  int64_t limit = number_in("/sys/fs/cgroup/memory.max");
  int64_t used = number_in("/sys/fs/cgroup/memory.current");
  if (limit < 0 || used < 0) return bytes;
  used -= cached_bytes();
  int64_t room = limit > used ? limit - used : 0;
  return room < bytes ? room : bytes;
}
