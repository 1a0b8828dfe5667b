/* One page of PTX for Hopper: what CUDA C++ has no words for and mma.cuh, the page for all GPUs,
 * has not. wgmma and setmaxnreg want sm_90a, the rest sm_90.
 *
 * Addresses of shared memory are 32-bit, as these instructions want them. Threads meet the copy
 * engine (TMA) at mbarriers: a phase ends when the awaited arrivals and bytes are in, and
 * whoever waits names the parity of the phase. Nothing here may be called for older GPUs.
 * Source: NVIDIA, Parallel Thread Execution ISA 8.x, "Asynchronous Warpgroup Level Matrix
 * Instructions" and "Tensors". */
#ifndef MOE_KERNELS_CUDA_SM90_PTX_CUH
#define MOE_KERNELS_CUDA_SM90_PTX_CUH

#include <cstdio>
#include <cuda.h>

#include "kernels/cuda/mma.cuh"

/* ---- mbarriers ----------------------------------------------------------------------------- */

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
/* Other threads and the copy engine see the barriers that this thread made. */
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
/* Arrive, and make the phase wait for `bytes` more from the copy engine. */
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool barrier_passed(uint32_t bar, uint32_t parity) {
  uint32_t passed;
  asm volatile("{\n.reg .pred p;\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n}"
               : "=r"(passed)
               : "r"(bar), "r"(parity)
               : "memory");
  return passed != 0;
}
/* Wait for the end of the phase of this parity. Compiled with MOE_SM90_WATCHDOG (for debugging: it
 * makes the kernels slow) a wait of three seconds says where and stops the kernel. */
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
#ifdef MOE_SM90_WATCHDOG
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  while (!barrier_passed(bar, parity)) {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (now - start < 3000000000) continue;
    printf("block %d thread %d waits on the barrier at shared %#x for parity %u\n", blockIdx.x,
           threadIdx.x, bar, parity);
    __trap();
  }
#else
  while (!barrier_passed(bar, parity)) {
  }
#endif
}
/* The threads of a warpgroup meet; id 1..15. */
__device__ __forceinline__ void warpgroup_meet(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

/* ---- the copy engine ----------------------------------------------------------------------- */

/* A box of a tensor to shared memory; elements outside the tensor come as zeros, and count as
 * bytes. Coordinates are in elements, the fastest dimension first. */
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t bar, int c0,
                                         int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
               "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
/* The same for a box that will be wanted again: the L2 cache gives up other lines before its. */
__device__ __forceinline__ void tma_load_kept(uint32_t to, const CUtensorMap *map, uint32_t bar,
                                              int c0, int c1, int c2, int c3) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
               "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
               : "memory");
}
/* A box to this place, and to this barrier, of each block of the cluster whose bit is set. */
__device__ __forceinline__ void tma_load_all(uint32_t to, const CUtensorMap *map, uint32_t bar,
                                             int c0, int c1, int c2, int c3, int blocks) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
               "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"((uint16_t)blocks)
               : "memory");
}
/* A box to a tensor; what lies outside the tensor is left out. */
__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int c0, int c1,
                                          int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
/* tensor += box, for floats. */
__device__ __forceinline__ void tma_add(const CUtensorMap *map, uint32_t from, int c0, int c1,
                                        int c2, int c3) {
  asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group "
               "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
/* Bytes that lie side by side, a multiple of 16 as both addresses are. */
__device__ __forceinline__ void bulk_load(uint32_t to, const void *from, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar)
               : "memory");
}
/* Floats that lie side by side: to += from, each by itself and in any order. */
__device__ __forceinline__ void bulk_add(float *to, uint32_t from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
/* A thread's stores so far become one group (an empty one, if there were none since the last). */
__device__ __forceinline__ void tma_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Wait until all but the newest N groups of this thread have read their shared memory. */
template <int N> __device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> __device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
/* What this thread stored in shared memory is there for the copy engine and the tensor cores. */
__device__ __forceinline__ void async_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- shared memory, 8 x 8 blocks of 16-bit elements ------------------------------------------
 * Lane l's v[i] holds row l / 4, columns 2 (l % 4) and the next, of block i: the layout of a wgmma
 * accumulator rounded to bf16. Lane l gives the address of row l % 8 of block l / 8.
 * load_matrices (mma.cuh) reads them back. */

__device__ __forceinline__ void store_blocks(uint32_t at, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, const float *v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

/* ---- wgmma: a warpgroup's matrix product ------------------------------------------------------
 * acc [64, N] += A [64, 16] B [N, 16]^T, bf16 operands in shared memory, 128-byte swizzle (add 0:
 * stored instead of added). A thread
 * of warp w holds, for block j of 8 columns, row 16 w + lane / 4 in acc[4 j], acc[4 j + 1] and row
 * 8 below in acc[4 j + 2], acc[4 j + 3], columns 8 j + 2 (lane % 4) and the next. */

/* An operand that begins at `address`. Where the K index runs fastest (rows of 64 k, 128 bytes), 8
 * rows lie 1024 bytes after the last 8; where the other index does (rows of 64 m or n, one for each
 * k), 8 k lie 1024 bytes after the last 8 and the next 64 m or n `group` bytes further. */
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t group) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(group >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* The compiler may not move reads of the accumulators over this. */
template <int N> __device__ __forceinline__ void wgmma_keep(float (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

#define SM90_F8(c, i)                                                                         \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define SM90_F32(c, i) SM90_F8(c, i), SM90_F8(c, i + 8), SM90_F8(c, i + 16), SM90_F8(c, i + 24)

/* a_mn, b_mn: 0 where K runs fastest in the operand, 1 where the other index does. */
template <int a_mn, int b_mn>
__device__ __forceinline__ void wgmma(float (&c)[96], uint64_t a, uint64_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
               "%96, %97, add, 1, 1, %98, %99;\n}"
               : SM90_F32(c, 0), SM90_F32(c, 32), SM90_F32(c, 64)
               : "l"(a), "l"(b), "n"(a_mn), "n"(b_mn));
}
template <int a_mn, int b_mn>
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, int add = 1) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "%64, %65, add, 1, 1, %67, %68;\n}"
               : SM90_F32(c, 0), SM90_F32(c, 32)
               : "l"(a), "l"(b), "r"(add), "n"(a_mn), "n"(b_mn));
}
template <int a_mn, int b_mn>
__device__ __forceinline__ void wgmma(float (&c)[32], uint64_t a, uint64_t b, int add = 1) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "%32, %33, add, 1, 1, %35, %36;\n}"
               : SM90_F32(c, 0)
               : "l"(a), "l"(b), "r"(add), "n"(a_mn), "n"(b_mn));
}
/* A in registers, as the accumulators of an earlier product hold it, rounded: of 16 columns, the
 * four pairs of a thread in the order of its accumulators. They must stay until the product ends.
 */
template <int b_mn>
__device__ __forceinline__ void wgmma(float (&c)[32], const uint32_t *a, uint64_t b, int add = 1) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %38, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "{%32, %33, %34, %35}, %36, add, 1, 1, %37;\n}"
               : SM90_F32(c, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(b_mn), "r"(add));
}
template <int b_mn>
__device__ __forceinline__ void wgmma(float (&c)[64], const uint32_t *a, uint64_t b, int add = 1) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "{%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}"
               : SM90_F32(c, 0), SM90_F32(c, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(b_mn));
}
#undef SM90_F32
#undef SM90_F8

/* ---- registers ------------------------------------------------------------------------------- */

template <int N> __device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

#endif
