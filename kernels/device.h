/* Devices: where tensors live and who computes.
 *
 * A backend is a table of functions (backend.h). kernels/device.c picks one at run time; the CPU
 * backend is always there. Both may be open in one process: the CPU is the oracle of every CUDA
 * kernel. Work is queued on the device's stream; moe_device_sync waits. The CPU's stream is
 * immediate. */
#ifndef MOE_KERNELS_DEVICE_H
#define MOE_KERNELS_DEVICE_H

#include "core/base/status.h"
#include "core/base/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_device moe_device;
typedef enum { MOE_DEVICE_AUTO, MOE_DEVICE_CPU, MOE_DEVICE_CUDA } moe_device_kind;

typedef struct {
  moe_device_kind kind; /* AUTO: CUDA when built in and a GPU is visible, else CPU */
  int local_rank;       /* GPU number = local_rank modulo visible GPUs */
  int threads;          /* CPU threads; 0: all cores */
  bool deterministic;
  bool tf32;
  bool debug; /* check every output for non-finite values; see moe_device_label */
} moe_device_options;

/* Open a device. Local. MOE_USAGE when CUDA was asked for and is not built in or not there. */
moe_status moe_device_open(const moe_device_options *options, moe_device **out);
void moe_device_close(moe_device *dev);

moe_device_kind moe_device_what(const moe_device *dev);
const char *moe_device_name(const moe_device *dev); /* "AMD EPYC, 2 threads", "NVIDIA H200" */
bool moe_device_is_host(const moe_device *dev);     /* host pointers work as device pointers */
int64_t moe_device_free_bytes(moe_device *dev);     /* memory a plan may use; INT64_MAX on CPU */
double moe_device_peak_tflops(moe_device *dev, moe_dtype dtype); /* published; 0 when unknown */

/* Zeroed memory. NULL when there is not enough. Signature fits moe_memory_commit. */
void *moe_device_alloc(void *dev, int64_t bytes);
void moe_device_free(moe_device *dev, void *data);
/* Pinned on CUDA, so that copies do not wait. */
void *moe_device_alloc_host(moe_device *dev, int64_t bytes);
void moe_device_free_host(moe_device *dev, void *data);

/* Queued in order with kernels. Host memory must stay valid until moe_device_sync. */
moe_status moe_device_upload(moe_device *dev, void *to_device, const void *from_host,
                             int64_t bytes);
moe_status moe_device_download(moe_device *dev, void *to_host, const void *from_device,
                               int64_t bytes);
moe_status moe_device_sync(moe_device *dev);

/* Scratch memory the kernels may use inside one op; contents do not survive it. The caller plans
 * it with the moe_*_scratch functions in ops.h and hands it over once. */
void moe_device_set_scratch(moe_device *dev, void *data, int64_t bytes);
void *moe_device_scratch(moe_device *dev, int64_t bytes); /* NULL when the plan was too small */

/* Debugging: name what runs next ("layer 3 attention"); errors and debug checks quote it. */
void moe_device_label(moe_device *dev, const char *what, int64_t layer);

/* To be called first thing in main, before MPI_Init: picks OpenBLAS's kernels for processors that
 * its release does not know (it takes Zen 4/5 for Haswell) by restarting the program once with
 * OPENBLAS_CORETYPE set. Returns when there is nothing to do. */
void moe_cpu_choose_blas(char **argv);

#ifdef __cplusplus
}
#endif
#endif
