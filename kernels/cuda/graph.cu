/* Device graphs (kernels/device.h): the stream is put into capture, and what it caught is made
 * ready to be launched. The relaxed mode lets libraries load code and other threads allocate while
 * this one records. Operations keep the priorities of the lanes that they were recorded on. */
#include <cstdlib>

#include "kernels/cuda/common.cuh"

struct moe_graph {
  cudaGraphExec_t run;
};

moe_status cuda_graph_begin(moe_device *dev) {
  CUDA_TRY(dev, cudaSetDevice(cuda_of(dev)->ordinal));
  CUDA_TRY(dev, cudaStreamBeginCapture(cuda_of(dev)->stream, cudaStreamCaptureModeRelaxed));
  return MOE_OK;
}

static moe_status capture_failed(const moe_device *dev, cudaError_t error) {
  (void)cudaGetLastError(); /* the stream is whole again: not an error of what comes next */
  return cuda_failed(dev, error,
                     "recording a graph: something in it waits for the device, or a stream that "
                     "joined it was not joined back");
}

moe_status cuda_graph_end(moe_device *dev, moe_graph **out) {
  cudaGraph_t recorded = nullptr;
  cudaError_t error = cudaStreamEndCapture(cuda_of(dev)->stream, &recorded);
  if (error != cudaSuccess || recorded == nullptr) return capture_failed(dev, error);
  moe_graph *graph = static_cast<moe_graph *>(calloc(1, sizeof *graph));
  error = graph == nullptr ? cudaErrorMemoryAllocation
                           : cudaGraphInstantiate(&graph->run, recorded,
                                                  cudaGraphInstantiateFlagUseNodePriority);
  cudaGraphDestroy(recorded);
  if (error != cudaSuccess) {
    free(graph);
    return capture_failed(dev, error);
  }
  *out = graph;
  return MOE_OK;
}

moe_status cuda_graph_launch(moe_device *dev, moe_graph *graph) {
  CUDA_TRY(dev, cudaGraphLaunch(graph->run, cuda_of(dev)->stream));
  return MOE_OK;
}

void cuda_graph_destroy(moe_device *dev, moe_graph *graph) {
  (void)cudaSetDevice(cuda_of(dev)->ordinal);
  cudaGraphExecDestroy(graph->run);
  free(graph);
}
