/* Instructions of tensor cores and asynchronous copies, one function each, for f16 and bf16.
 *
 * A warp's product m16n8k16 takes fragments: lane l, with row g = l / 4 and column pair t = l % 4,
 * holds packed pairs of neighbouring elements,
 *
 *     a [16, 16]   a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)
 *     b [16, 8]    b0 (2t, g)  b1 (2t + 8, g)          pairs run along the first index
 *     c [16, 8]    c0 c1 (g, 2t..)  c2 c3 (g + 8, 2t..)                  float32
 *
 * so that two neighbouring c, rounded, are an a. sm_75 has f16 only and half the depth: two
 * products, the same fragments. What only Hopper has is in sm90_ptx.cuh. Source: PTX ISA, "Matrix
 * multiply-accumulate operation". */
#ifndef MOE_KERNELS_CUDA_MMA_CUH
#define MOE_KERNELS_CUDA_MMA_CUH

#include <type_traits>

#include "kernels/cuda/common.cuh"

/* Whether the GPU that this pass compiles for has tensor cores for T. */
template <typename T> __device__ constexpr bool mma_built() {
#if __CUDA_ARCH__ >= 800
  return true;
#elif __CUDA_ARCH__ >= 750
  return std::is_same_v<T, __half>;
#else
  return false;
#endif
}

/* c += a b. */
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%8}, "
      "{%0,%1,%2,%3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%6,%7}, {%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* Four 8 x 8 matrices from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes. r[m] is
 * matrix m's elements (g, 2t) and (g, 2t + 1). */
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#endif
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
  load_matrices(r, shared_address(row));
}
/* The same, each matrix transposed: elements (2t, g) and (2t + 1, g). */
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void *row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

/* Start copying 4 or 16 bytes to shared memory; zeros when not `inside` (from must still be an
 * address that exists). Before sm_80 the copy is done on the spot. */
template <int BYTES>
__device__ __forceinline__ void copy_start(void *to, const void *from, bool inside) {
#if __CUDA_ARCH__ >= 800
  int bytes = inside ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
#else
  using word = std::conditional_t<BYTES == 16, uint4, uint32_t>;
  *static_cast<word *>(to) = inside ? *static_cast<const word *>(from) : word{};
#endif
}
/* What this thread started since the last group is one group. */
__device__ __forceinline__ void copy_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/* Wait until all but the newest N groups of this thread have arrived. Other threads see them after
 * a barrier. */
template <int N> __device__ __forceinline__ void copy_wait_but() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
/* Until all that this thread started has arrived. */
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/* Over the four lanes that have a row of a fragment; each gets the result. */
template <typename T, typename Op> __device__ __forceinline__ T quad_reduce(T x, Op op) {
  x = op(x, __shfl_xor_sync(full_warp, x, 1));
  return op(x, __shfl_xor_sync(full_warp, x, 2));
}

/* Two floats, rounded, the first in the low half; and back, of bf16. */
template <typename T> __device__ __forceinline__ uint32_t pack(float a, float b) {
  std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162> pair;
  if constexpr (std::is_same_v<T, __half>)
    pair = __floats2half2_rn(a, b);
  else
    pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t *>(&pair);
}
__device__ __forceinline__ float low(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

#endif
