/* What the driver tells about one GPU: energy, power, clocks and what holds the clock down.
 *
 * Through NVIDIA's management library, which exists only beside a driver, so it is opened at run
 * time and every figure may be missing. Its interface never changes, which lets a program that was
 * built anywhere declare the few calls it makes.
 * Source: NVML API Reference Guide. */
#ifndef MOE_KERNELS_NVML_H
#define MOE_KERNELS_NVML_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_nvml moe_nvml;

/* Why a clock is lower than it could be: bits of moe_nvml_sample.reasons. */
enum {
  MOE_CLOCK_POWER_CAP = 0x4,
  MOE_CLOCK_SLOWED = 0x8 | 0x20 | 0x40 | 0x80 /* hardware, software thermal, thermal, brake */
};

/* Of one moment; a figure that is not told is 0, but for energy (-1). */
typedef struct {
  int64_t millijoules; /* since the driver was loaded */
  double watts;        /* now, or where only that is told averaged over up to a second */
  double sm_mhz, memory_mhz;
  uint64_t reasons;
} moe_nvml_sample;

/* Open the GPU at `bus_id` ("0000:19:00.0"), found whatever CUDA_VISIBLE_DEVICES leaves visible.
 * `library`: "libnvidia-ml.so.1". NULL when that cannot be; *why then says so, in memory that
 * lasts. Local. */
moe_nvml *moe_nvml_open(const char *library, const char *bus_id, const char **why);
/* NULL is accepted. */
void moe_nvml_close(moe_nvml *n);

/* 0 when it is not told. */
double moe_nvml_limit_watts(const moe_nvml *n);
double moe_nvml_max_sm_mhz(const moe_nvml *n);
/* Takes up to some milliseconds, for the energy. One thread at a time. */
moe_nvml_sample moe_nvml_read(const moe_nvml *n);

#ifdef __cplusplus
}
#endif
#endif
