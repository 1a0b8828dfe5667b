/* Blocks that form a cluster (Hopper) and send into each other's shared memory.
 *
 * A message is stored where another block's memory is and counted, in bytes, at a barrier there
 * (sm90_ptx.cuh), at which that block waits for all it is to get:
 *
 *     cluster_open(barrier);  ...  cluster_wait();  cluster_send(to, barrier there, v);
 *     cluster_await(barrier, bytes);  read
 *
 * So nobody waits for all others, no memory is read from afar, blocks may end when they have got
 * their messages, and no fence goes by the way of global memory, as it does at a barrier of the
 * whole cluster. Source: PTX ISA 8.x, "st.async" and "mapa". */
#ifndef MOE_KERNELS_CUDA_CLUSTER_CUH
#define MOE_KERNELS_CUDA_CLUSTER_CUH

#include "kernels/cuda/sm90_ptx.cuh"

/* Make a barrier for messages; all threads must call. After cluster_wait(), which all threads of
 * all blocks must call too, every block's is there. */
__device__ __forceinline__ void cluster_open(uint64_t *barrier) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    barrier_init(shared_address(barrier), 1);
    barrier_init_fence();
  }
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

/* Where block z of the cluster has what this block has at p. */
__device__ __forceinline__ uint32_t cluster_address(const void *p, int z) {
  uint32_t at = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(z));
#endif
  return at;
}

/* All threads of all blocks are here. */
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#endif
}
/* Arrive at a barrier of block z. */
__device__ __forceinline__ void cluster_arrive(const uint64_t *barrier, int z) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, z))
               : "memory");
#endif
}

/* Send to an address and a barrier of the same block. */
__device__ __forceinline__ void cluster_send(uint32_t to, uint32_t barrier, float2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, "
               "[%1];" ::"r"(to),
               "r"(barrier), "f"(v.x), "f"(v.y)
               : "memory");
#endif
}
__device__ __forceinline__ void cluster_send(uint32_t to, uint32_t barrier, float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, "
               "%4, %5}, [%1];" ::"r"(to),
               "r"(barrier), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#endif
}
__device__ __forceinline__ void cluster_send(uint32_t to, uint32_t barrier, unsigned long long v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %2, [%1];" ::"r"(to),
      "r"(barrier), "l"(v)
      : "memory");
#endif
}

/* So many bytes have been sent here in all, since the barrier was made: one use of it. All threads
 * that read them call; thread 0 must be among them. */
__device__ __forceinline__ void cluster_await(uint64_t *barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  uint32_t at = shared_address(barrier);
  if (threadIdx.x == 0) barrier_expect(at, bytes);
  barrier_wait(at, 0);
#endif
}

#endif
