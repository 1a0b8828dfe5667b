/* Reading /proc/self/status. */
#include "core/base/process_memory.h"

#include <stdio.h>
#include <string.h>

/* The value of a line `name:   123 kB`, in bytes. */
static int64_t status_bytes(const char *name) {
  char line[256];
  long long kib = 0;
  size_t length = strlen(name);
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f)) {
    if (strncmp(line, name, length) == 0 && sscanf(line + length, ": %lld kB", &kib) == 1) break;
  }
  if (f) fclose(f);
  return (int64_t)kib * 1024;
}

int64_t moe_process_resident(void) {
  return status_bytes("VmRSS");
}

int64_t moe_process_peak(void) {
  return status_bytes("VmHWM");
}
