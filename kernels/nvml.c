/* The calls of libnvidia-ml that power.c needs, each looked up by name. */
#include "kernels/nvml.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* As in nvml.h: nvmlReturn_t is an int, 0 success; a device is a pointer to what only NVML knows.
 */
typedef void *gpu;
enum { SUCCESS = 0, CLOCK_SM = 1, CLOCK_MEMORY = 2, FIELD_POWER_INSTANT = 186 };
typedef struct {
  unsigned field, scope;
  long long timestamp, latency_us;
  int type, result;
  union {
    double f64;
    unsigned u32; /* milliwatts are of this type, or lie in the low half of a longer one */
    unsigned long long u64;
  } value;
} field_value;

struct moe_nvml {
  void *library;
  gpu device;
  int (*init)(void);
  int (*shutdown)(void);
  int (*by_bus_id)(const char *, gpu *);
  int (*energy)(gpu, unsigned long long *);
  int (*power)(gpu, unsigned *);
  int (*limit)(gpu, unsigned *);
  int (*fields)(gpu, int, field_value *);
  int (*clock)(gpu, int, unsigned *);
  int (*max_clock)(gpu, int, unsigned *);
  int (*reasons)(gpu, unsigned long long *);
};

/* Data and function pointers have the same bits (POSIX), which C cannot say by a cast. */
#define LOOK_UP(n, member, name) look_up((n)->library, name, &(n)->member, sizeof(n)->member)
static void look_up(void *library, const char *name, void *function, size_t size) {
  void *found = dlsym(library, name);
  memcpy(function, &found, size);
}

static void look_up_all(moe_nvml *n) {
  LOOK_UP(n, init, "nvmlInit_v2");
  LOOK_UP(n, shutdown, "nvmlShutdown");
  LOOK_UP(n, by_bus_id, "nvmlDeviceGetHandleByPciBusId_v2");
  LOOK_UP(n, energy, "nvmlDeviceGetTotalEnergyConsumption");
  LOOK_UP(n, power, "nvmlDeviceGetPowerUsage");
  LOOK_UP(n, limit, "nvmlDeviceGetEnforcedPowerLimit");
  LOOK_UP(n, fields, "nvmlDeviceGetFieldValues");
  LOOK_UP(n, clock, "nvmlDeviceGetClockInfo");
  LOOK_UP(n, max_clock, "nvmlDeviceGetMaxClockInfo");
  LOOK_UP(n, reasons, "nvmlDeviceGetCurrentClocksEventReasons");
  if (!n->reasons) LOOK_UP(n, reasons, "nvmlDeviceGetCurrentClocksThrottleReasons");
}

/* NULL, or why the GPU is not to be had. A text of NVML's would go with the library. */
static const char *start(moe_nvml *n, const char *bus_id) {
  if (!n->init || !n->shutdown || !n->by_bus_id) return "the driver's libnvidia-ml is too old";
  if (n->init() != SUCCESS) return "libnvidia-ml does not start: is the driver's version its own?";
  if (n->by_bus_id(bus_id, &n->device) == SUCCESS) return NULL;
  (void)n->shutdown();
  return "libnvidia-ml does not show this GPU: is it this user's to see?";
}

moe_nvml *moe_nvml_open(const char *library, const char *bus_id, const char **why) {
  moe_nvml *n = calloc(1, sizeof *n);
  *why = "out of memory";
  if (!n) return NULL;
  n->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  *why = "no libnvidia-ml, which comes with the driver";
  if (n->library) {
    look_up_all(n);
    *why = start(n, bus_id);
    if (!*why) return n;
    dlclose(n->library);
  }
  free(n);
  return NULL;
}

void moe_nvml_close(moe_nvml *n) {
  if (!n) return;
  (void)n->shutdown();
  dlclose(n->library);
  free(n);
}

double moe_nvml_limit_watts(const moe_nvml *n) {
  unsigned mw = 0;
  return n->limit && n->limit(n->device, &mw) == SUCCESS ? 1e-3 * mw : 0.0;
}

double moe_nvml_max_sm_mhz(const moe_nvml *n) {
  unsigned mhz = 0;
  return n->max_clock && n->max_clock(n->device, CLOCK_SM, &mhz) == SUCCESS ? mhz : 0.0;
}

static double watts(const moe_nvml *n) {
  field_value now = {.field = FIELD_POWER_INSTANT};
  unsigned mw = 0;
  if (n->fields && n->fields(n->device, 1, &now) == SUCCESS && now.result == SUCCESS)
    return 1e-3 * now.value.u32;
  return n->power && n->power(n->device, &mw) == SUCCESS ? 1e-3 * mw : 0.0;
}

static double mhz(const moe_nvml *n, int which) {
  unsigned mhz = 0;
  return n->clock && n->clock(n->device, which, &mhz) == SUCCESS ? mhz : 0.0;
}

moe_nvml_sample moe_nvml_read(const moe_nvml *n) {
  unsigned long long mj = 0, reasons = 0;
  bool counted = n->energy && n->energy(n->device, &mj) == SUCCESS;
  if (!n->reasons || n->reasons(n->device, &reasons) != SUCCESS) reasons = 0;
  return (moe_nvml_sample){.millijoules = counted ? (int64_t)mj : -1,
                           .watts = watts(n),
                           .sm_mhz = mhz(n, CLOCK_SM),
                           .memory_mhz = mhz(n, CLOCK_MEMORY),
                           .reasons = reasons};
}
