/* Starting small kernels one behind the other without a gap (Hopper and later).
 *
 * A kernel started by cuda_start may begin while the one before it on the stream still runs. It
 * calls launch_wait() before it reads or writes anything the one before may have touched, then
 * launch_release(), which lets the next one begin. In this order, all earlier kernels have finished
 * when a kernel begins; only the one right before it may still run. What may be done ahead of
 * launch_wait: index arithmetic, prefetching into the L2 cache (which stays coherent), and reading
 * what the kernel before is known not to write.
 *
 * Elsewhere, and with MOE_PLAIN=overlap in the environment, these are ordinary launches. A kernel
 * that calls neither may stand before or after one that does.
 * Source: CUDA C++ Programming Guide, "Programmatic dependent launch". */
#ifndef MOE_KERNELS_CUDA_LAUNCH_CUH
#define MOE_KERNELS_CUDA_LAUNCH_CUH

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/plain.h"

/* All earlier work on the stream is done and visible. Every thread calls it. */
__device__ __forceinline__ void launch_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* The next kernel may begin once all blocks got here. */
__device__ __forceinline__ void launch_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Ask for the cache line at p, which must exist. */
__device__ __forceinline__ void prefetch_line(const void *p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

/* What may still change: a look ahead of launch_wait and one after it each go to the L2 cache. */
__device__ __forceinline__ int32_t load_l2(const int32_t *p) {
  int32_t v = 0;
#ifdef __CUDA_ARCH__
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
#else
  v = *p;
#endif
  return v;
}

static inline bool launch_overlaps(const moe_device *dev) {
  static const bool one_by_one = cuda_plain("overlap");
  return cuda_of(dev)->arch >= 90 && !one_by_one;
}

/* Up to so many rows an operation's launch costs more than its work. */
constexpr int64_t launch_few = 64;

/* Queue kernel(args...) on the device's stream; `overlap`: it may begin early; so many blocks that
 * are neighbours along y (1: each for itself) form a cluster. */
template <typename... P, typename... A>
static moe_status cuda_launch_clusters(moe_device *dev, bool overlap, int cluster,
                                       void (*kernel)(P...), dim3 grid, int threads, int shared,
                                       A... args) {
  if (shared > 48 << 10) /* what a kernel gets without asking */
    CUDA_TRY(dev,
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchAttribute wishes[2] = {};
  cudaLaunchConfig_t config = {};
  if (overlap && launch_overlaps(dev)) {
    cudaLaunchAttribute *early = &wishes[config.numAttrs++];
    early->id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early->val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute *together = &wishes[config.numAttrs++];
    together->id = cudaLaunchAttributeClusterDimension;
    together->val.clusterDim.x = together->val.clusterDim.z = 1;
    together->val.clusterDim.y = (unsigned)cluster;
  }
  config.gridDim = grid;
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared;
  config.stream = cuda_of(dev)->stream;
  config.attrs = wishes;
  CUDA_TRY(dev, cudaLaunchKernelEx(&config, kernel, P(args)...));
  return MOE_OK;
}

template <typename... P, typename... A>
static moe_status cuda_launch(moe_device *dev, bool overlap, void (*kernel)(P...), dim3 grid,
                              int threads, int shared, A... args) {
  return cuda_launch_clusters(dev, overlap, 1, kernel, grid, threads, shared, args...);
}

template <typename... P, typename... A>
static moe_status cuda_start(moe_device *dev, void (*kernel)(P...), dim3 grid, int threads,
                             int shared, A... args) {
  return cuda_launch(dev, true, kernel, grid, threads, shared, args...);
}

#endif
