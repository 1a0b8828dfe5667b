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

/* A point in the device's stream: waiting for it does not wait for what is queued after it. Zero at
 * first; marking again moves it; forget releases it. */
typedef union {
  double seconds;
  void *event;
} moe_mark;
void moe_device_mark(moe_device *dev, moe_mark *mark);
moe_status moe_device_wait(moe_device *dev, const moe_mark *mark);
/* Seconds from one to the other, both of the past. */
double moe_device_between(moe_device *dev, const moe_mark *from, const moe_mark *to);
void moe_device_forget(moe_device *dev, moe_mark *mark);

/* Scratch memory the kernels may use inside one op; contents do not survive it. The caller plans
 * it with the moe_*_scratch functions in ops.h and hands it over once. */
void moe_device_set_scratch(moe_device *dev, void *data, int64_t bytes);
void *moe_device_scratch(moe_device *dev, int64_t bytes); /* NULL when the plan was too small */

/* ---- graphs: record queued work once, launch it many times --------------------------------------
 *
 *   work();                          once as it is: libraries choose algorithms, code is loaded
 *   moe_device_graph_begin(dev);
 *   work();                          recorded, not run
 *   moe_device_graph_end(dev, &graph);
 *   moe_device_graph_launch(dev, graph);         as often as needed
 *
 * A graph holds what was queued on the device's stream (and on streams joined to it by events, both
 * ways) with its arguments: pointers, sizes and numbers are those of the recording, only what lies
 * in memory changes. So whatever changes from launch to launch must be read from device memory, and
 * all memory must outlive the graph. Uploads and downloads are repeated from and to the same
 * pinned host memory, and a mark moves whenever the launch gets to it.
 *
 * While recording, no thread may wait or ask for device memory: moe_device_sync is refused,
 * moe_device_alloc returns NULL, and moe_device_graph_end then fails and says why. Operations that
 * read sizes back to the host fail too (expert products by cuBLAS, an exchange that plans on the
 * host). A profile (profile.h) does not time what is recorded; it times a launch as one operation,
 * "graph".
 *
 * All calls are local. One recording at a time on a device. */
typedef struct moe_graph moe_graph;
/* Whether this device records graphs: a GPU, and not in debug mode, whose checks wait. */
bool moe_device_has_graphs(const moe_device *dev);
/* MOE_INVALID when there are no graphs or one is being recorded. */
moe_status moe_device_graph_begin(moe_device *dev);
/* Ends the recording in any case. *out is the caller's to destroy; NULL on an error, such as
 * MOE_INVALID for something that cannot be recorded. */
moe_status moe_device_graph_end(moe_device *dev, moe_graph **out);
/* Queue the recorded work. The graph must stay until it has run. */
moe_status moe_device_graph_launch(moe_device *dev, moe_graph *graph);
/* NULL is accepted. */
void moe_graph_destroy(moe_device *dev, moe_graph *graph);

/* Debugging: name what runs next ("layer 3 attention"); errors and debug checks quote it. */
void moe_device_label(moe_device *dev, const char *what, int64_t layer);

/* For a thread that takes over a CPU device from the one that opened it: how many threads its work
 * may have is kept by OpenMP, and OpenBLAS with it, per thread. */
void moe_cpu_enter(const moe_device *dev);
/* To be called first thing in main, before MPI_Init: picks OpenBLAS's kernels for processors that
 * its release does not know (it takes Zen 4/5 for Haswell) by restarting the program once with
 * OPENBLAS_CORETYPE set. Returns when there is nothing to do. */
void moe_cpu_choose_blas(char **argv);

#ifdef __cplusplus
}
#endif
#endif
