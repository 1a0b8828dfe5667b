/* Devices: choose a backend at run time and pass the call on.
 *
 * The only place that knows whether CUDA was built in. */
#include "kernels/device.h"

#include <stdlib.h>

#include "core/base/place.h"
#include "kernels/backend.h"

static int cuda_count(void) {
#ifdef MOE_WITH_CUDA
  return moe_cuda_count();
#else
  return 0;
#endif
}

static moe_status open_cuda(moe_device *dev) {
#ifdef MOE_WITH_CUDA
  if (moe_cuda_count() < 1)
    return moe_fail(MOE_USAGE, "run.backend = cuda: no GPU is visible: check nvidia-smi and "
                               "CUDA_VISIBLE_DEVICES, or use run.backend = cpu");
  return moe_cuda_open(dev);
#else
  (void)dev;
  return moe_fail(MOE_USAGE, "run.backend = cuda: this program was built without CUDA: configure "
                             "with the CUDA toolkit installed, or use run.backend = cpu");
#endif
}

moe_status moe_device_open(const moe_device_options *options, moe_device **out) {
  *out = NULL;
  moe_device *dev = calloc(1, sizeof *dev);
  if (dev == NULL) return moe_fail(MOE_NO_MEMORY, "device: out of memory");
  dev->options = *options;
  dev->label_layer = -1;
  bool cuda =
      options->kind == MOE_DEVICE_CUDA || (options->kind == MOE_DEVICE_AUTO && cuda_count() > 0);
  moe_status status = cuda ? open_cuda(dev) : moe_cpu_open(dev);
  if (status != MOE_OK) {
    free(dev);
    return moe_error_pass(status, __FILE__, __LINE__, __func__);
  }
  dev->options.kind = cuda ? MOE_DEVICE_CUDA : MOE_DEVICE_CPU;
  *out = dev;
  return MOE_OK;
}

void moe_device_close(moe_device *dev) {
  if (dev == NULL) return;
  dev->backend->close(dev);
  free(dev);
}

moe_device_kind moe_device_what(const moe_device *dev) {
  return dev->options.kind;
}

const char *moe_device_name(const moe_device *dev) {
  return dev->name;
}

bool moe_device_is_host(const moe_device *dev) {
  return dev->backend->is_host;
}

int64_t moe_device_free_bytes(moe_device *dev) {
  return dev->backend->free_bytes(dev);
}

double moe_device_peak_tflops(moe_device *dev, moe_dtype dtype) {
  return dev->backend->peak_tflops(dev, dtype);
}

/* While a graph is recorded: remember why moe_device_graph_end will fail. */
static bool forbidden(moe_device *dev, const char *what) {
  if (dev->recording && dev->recording_fault == NULL) dev->recording_fault = what;
  return dev->recording;
}

void *moe_device_alloc(void *dev, int64_t bytes) {
  moe_device *device = dev;
  if (bytes < 0 || forbidden(device, "device memory was asked for")) return NULL;
  return device->backend->alloc(device, bytes);
}

void moe_device_free(moe_device *dev, void *data) {
  if (data != NULL) dev->backend->free(dev, data);
}

void *moe_device_alloc_host(moe_device *dev, int64_t bytes) {
  return bytes < 0 ? NULL : dev->backend->alloc_host(dev, bytes);
}

void moe_device_free_host(moe_device *dev, void *data) {
  if (data != NULL) dev->backend->free_host(dev, data);
}

moe_status moe_device_upload(moe_device *dev, void *to_device, const void *from_host,
                             int64_t bytes) {
  if (bytes <= 0) return MOE_OK;
  return dev->backend->upload(dev, to_device, from_host, bytes);
}

moe_status moe_device_download(moe_device *dev, void *to_host, const void *from_device,
                               int64_t bytes) {
  if (bytes <= 0) return MOE_OK;
  return dev->backend->download(dev, to_host, from_device, bytes);
}

moe_status moe_device_sync(moe_device *dev) {
  if (forbidden(dev, "the device was waited for"))
    return moe_fail(MOE_INVALID, "graph: the device cannot be waited for while its work is being "
                                 "recorded: wait before or after");
  moe_place_wait("the device's work");
  moe_status status = dev->backend->sync(dev);
  moe_place_return();
  return status;
}

void moe_device_mark(moe_device *dev, moe_mark *mark) {
  dev->backend->mark(dev, mark);
}

moe_status moe_device_wait(moe_device *dev, const moe_mark *mark) {
  moe_place_wait("the device's work");
  moe_status status = dev->backend->wait(dev, mark);
  moe_place_return();
  return status;
}

double moe_device_between(moe_device *dev, const moe_mark *from, const moe_mark *to) {
  return dev->backend->between(dev, from, to);
}

void moe_device_forget(moe_device *dev, moe_mark *mark) {
  dev->backend->forget(dev, mark);
}

/* ---- graphs ------------------------------------------------------------------------------ */

bool moe_device_has_graphs(const moe_device *dev) {
  return dev->backend->graph_begin != NULL && !dev->options.debug;
}

moe_status moe_device_graph_begin(moe_device *dev) {
  if (!moe_device_has_graphs(dev))
    return moe_fail(MOE_INVALID, "graph: %s%s records none: ask moe_device_has_graphs first",
                    dev->name, dev->options.debug ? " in debug mode" : "");
  if (dev->recording)
    return moe_fail(MOE_INVALID, "graph: one is being recorded already: end it first");
  MOE_TRY(dev->backend->graph_begin(dev));
  dev->recording = true;
  dev->recording_fault = NULL;
  return MOE_OK;
}

moe_status moe_device_graph_end(moe_device *dev, moe_graph **out) {
  *out = NULL;
  if (!dev->recording) return moe_fail(MOE_INVALID, "graph: none is being recorded");
  dev->recording = false;
  moe_status status = dev->backend->graph_end(dev, out);
  if (dev->recording_fault == NULL) return status;
  moe_graph_destroy(dev, *out);
  *out = NULL;
  return moe_fail(MOE_INVALID, "graph: %s while it was recorded: do that before or after",
                  dev->recording_fault);
}

moe_status moe_device_graph_launch(moe_device *dev, moe_graph *graph) {
  if (graph == NULL) return moe_fail(MOE_INVALID, "graph: none was recorded");
  if (dev->recording)
    return moe_fail(MOE_INVALID, "graph: another is being recorded: end it before launching one");
  return dev->backend->graph_launch(dev, graph);
}

void moe_graph_destroy(moe_device *dev, moe_graph *graph) {
  if (graph != NULL) dev->backend->graph_destroy(dev, graph);
}

void moe_device_set_scratch(moe_device *dev, void *data, int64_t bytes) {
  dev->scratch = data;
  dev->scratch_bytes = data != NULL ? bytes : 0;
}

void *moe_device_scratch(moe_device *dev, int64_t bytes) {
  return bytes <= dev->scratch_bytes ? dev->scratch : NULL;
}

void moe_device_label(moe_device *dev, const char *what, int64_t layer) {
  dev->label = what;
  dev->label_layer = layer;
  moe_place_label(what, layer);
}
