/* A management library of one GPU that draws 500 W: what power.c opens in place of the driver's.
 *
 * FAKE_NVML in the environment: refuses-start, refuses-gpu, refuses-figures (all but the clock), or
 * wraps (the energy counter, each 40 J). Built with FAKE_OLD it has neither the energy nor the new
 * names of later drivers. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, NOT_FOUND = 6, NO_PERMISSION = 4, UNSUPPORTED = 3 };

static int fake_is(const char *what) {
  const char *wish = getenv("FAKE_NVML");
  return wish && strcmp(wish, what) == 0;
}

int nvmlInit_v2(void) {
  return fake_is("refuses-start") ? NO_PERMISSION : SUCCESS;
}
int nvmlShutdown(void) {
  return SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **gpu) {
  if (strcmp(bus_id, "0000:19:00.0") != 0) return NOT_FOUND;
  *gpu = gpu;
  return fake_is("refuses-gpu") ? NO_PERMISSION : SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) {
  (void)gpu;
  *milliwatts = 500000;
  return fake_is("refuses-figures") ? NO_PERMISSION : SUCCESS;
}

int nvmlDeviceGetClockInfo(void *gpu, int which, unsigned *mhz) {
  (void)gpu;
  *mhz = which == 1 ? 1500 : 3201;
  return SUCCESS;
}

int nvmlDeviceGetMaxClockInfo(void *gpu, int which, unsigned *mhz) {
  (void)gpu, (void)which;
  *mhz = 1980;
  return SUCCESS;
}

static int reasons_now(unsigned long long *reasons) {
  *reasons = 0x4;
  return fake_is("refuses-figures") ? NO_PERMISSION : SUCCESS;
}

#ifdef FAKE_OLD
int nvmlDeviceGetCurrentClocksThrottleReasons(void *gpu, unsigned long long *reasons) {
  (void)gpu;
  return reasons_now(reasons);
}
#else
int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *reasons) {
  (void)gpu;
  return reasons_now(reasons);
}

int nvmlDeviceGetEnforcedPowerLimit(void *gpu, unsigned *milliwatts) {
  (void)gpu;
  *milliwatts = 700000;
  return fake_is("refuses-figures") ? NO_PERMISSION : SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *gpu, unsigned long long *millijoules) {
  struct timespec now;
  (void)gpu;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *millijoules = 500ull * ((unsigned long long)now.tv_sec * 1000 + now.tv_nsec / 1000000);
  if (fake_is("wraps")) *millijoules %= 40000;
  return fake_is("refuses-figures") ? NO_PERMISSION : SUCCESS;
}
#endif
