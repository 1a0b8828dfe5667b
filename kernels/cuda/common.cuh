/* What every CUDA kernel file uses: the device's state, error checks, dispatch on element type and
 * access width, 16-byte loads and stores, and reductions over a warp or a block.
 *
 * The one idea: a kernel is a template on <T, N>, its element type and how many consecutive
 * elements a thread handles at once. `cuda_act` picks T; `cuda_width` picks N = 8 when every
 * pointer and row length allows 16-byte accesses, else 1. So odd shapes are slower, never wrong. */
#ifndef MOE_KERNELS_CUDA_COMMON_CUH
#define MOE_KERNELS_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/base/halves.h"
#include "kernels/cuda/state.h"

/* ---- errors -------------------------------------------------------------------------------- */

/* moe_fail naming the CUDA call, the operation and what the trainer was doing. */
moe_status cuda_failed(const moe_device *dev, cudaError_t error, const char *what);

#define CUDA_TRY(dev, call)                                                              \
  do {                                                                                   \
    cudaError_t cuda_try_error_ = (call);                                                \
    if (cuda_try_error_ != cudaSuccess) return cuda_failed(dev, cuda_try_error_, #call); \
  } while (0)

#define CUDA_TEXT(x) #x
#define CUDA_LINE(x) CUDA_TEXT(x)
/* After a kernel launch: report why it could not start. */
#define CUDA_LAUNCHED(dev)                                                                \
  do {                                                                                    \
    cudaError_t cuda_launch_error_ = cudaGetLastError();                                  \
    if (cuda_launch_error_ != cudaSuccess)                                                \
      return cuda_failed(dev, cuda_launch_error_,                                         \
                         "starting the kernel before " __FILE__ ":" CUDA_LINE(__LINE__)); \
  } while (0)

/* ---- sizes --------------------------------------------------------------------------------- */

__host__ __device__ constexpr int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) {
  return div_up(a, b) * b;
}
/* Blocks for a grid-stride loop over n items: enough to fill the chip, no more. */
static inline unsigned cuda_blocks(const moe_device *dev, int64_t n, int threads) {
  int64_t most = (int64_t)cuda_of(dev)->sms * (2048 / threads);
  int64_t need = div_up(n, threads);
  return (unsigned)(need < 1 ? 1 : need < most ? need : most);
}
/* A block size of whole warps for n items, at most `most`. */
static inline unsigned cuda_threads(int64_t n, int most) {
  int64_t need = round_up(n < 1 ? 1 : n, 32);
  return (unsigned)(need < most ? need : most);
}

/* ---- element types ------------------------------------------------------------------------- */

/* Whether the GPU multiplies matrices of this type on tensor cores (mma.cuh). */
static inline bool cuda_has_mma(const moe_device *dev, moe_dtype dtype) {
  int arch = cuda_of(dev)->arch;
  return dtype == MOE_BF16 ? arch >= 80 : dtype == MOE_F16 && arch >= 75;
}

/* Call f with a value of the act type named by `dtype`: cuda_act(t, [&](auto x) { using T =
 * decltype(x); ... }). */
template <typename F> static inline moe_status cuda_act(moe_dtype dtype, F f) {
  switch (dtype) {
  case MOE_F32:
    return f(float{});
  case MOE_BF16:
    return f(__nv_bfloat16{});
  case MOE_F16:
    return f(__half{});
  default:
    return moe_fail(MOE_INVALID, "cuda: %s is not a compute type", moe_dtype_name(dtype));
  }
}

template <int N> struct cuda_int { static constexpr int value = N; };

/* Call f with cuda_int<n>, n from 1 to 4. */
template <typename F> static inline auto cuda_groups(int64_t n, F f) {
  return n == 1   ? f(cuda_int<1>{})
         : n == 2 ? f(cuda_int<2>{})
         : n == 3 ? f(cuda_int<3>{})
                  : f(cuda_int<4>{});
}

/* Call f with cuda_int<8> when 8 consecutive elements may be moved by 16-byte accesses: `row`
 * elements per row a multiple of 8, pointers aligned (NULL is). Else with cuda_int<1>. */
template <typename F, typename... P>
static inline moe_status cuda_width(int64_t row, F f, const P *...pointers) {
  uintptr_t bits = (0 | ... | reinterpret_cast<uintptr_t>(pointers));
  return row % 8 == 0 && bits % 16 == 0 ? f(cuda_int<8>{}) : f(cuda_int<1>{});
}

template <typename T> static inline T *cuda_data(moe_tensor t) {
  return static_cast<T *>(t.data);
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

/* An element of MOE_LOW16 (core/base/halves.h). */
struct low16 {
  unsigned short bits;
};
template <> __device__ __forceinline__ low16 from_float<low16>(float x) {
  return {moe_halves_low(__float_as_uint(x))};
}

/* ---- hardware approximations ---------------------------------------------------------------- */

/* 2^x to about 22 bits; 0 for -infinity, NaN for NaN. */
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* 1 / x to about 23 bits; 0 for infinity, NaN for NaN. */
__device__ __forceinline__ float inverse_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* ---- wide accesses ------------------------------------------------------------------------- */

/* N elements as they lie in memory, moved 16 bytes at a time where N allows. */
template <typename T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) cuda_pack {
  T v[N];
  static constexpr int words = N * sizeof(T) / 16;
  __device__ __forceinline__ void load(const T *p) {
    if constexpr (N == 1) {
      v[0] = *p;
    } else {
      static_assert(N * sizeof(T) % 16 == 0, "whole 16-byte words");
#pragma unroll
      for (int i = 0; i < words; i++)
        reinterpret_cast<uint4 *>(v)[i] = reinterpret_cast<const uint4 *>(p)[i];
    }
  }
  __device__ __forceinline__ void store(T *p) const {
    if constexpr (N == 1) {
      *p = v[0];
    } else {
#pragma unroll
      for (int i = 0; i < words; i++)
        reinterpret_cast<uint4 *>(p)[i] = reinterpret_cast<const uint4 *>(v)[i];
    }
  }
};

/* N elements at p, as floats. */
template <typename T, int N> __device__ __forceinline__ void load(float (&out)[N], const T *p) {
  cuda_pack<T, N> raw;
  raw.load(p);
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = to_float(raw.v[i]);
}
template <typename T, int N> __device__ __forceinline__ void store(T *p, const float (&values)[N]) {
  cuda_pack<T, N> raw;
#pragma unroll
  for (int i = 0; i < N; i++) raw.v[i] = from_float<T>(values[i]);
  raw.store(p);
}

/* ---- reductions ---------------------------------------------------------------------------- */

constexpr unsigned full_warp = 0xffffffffu;

struct op_sum {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
/* NaN in either operand stays: fmaxf would drop it. */
struct op_max {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return a > b || a != a ? a : b;
  }
};

/* Every lane gets the result; a fixed tree, so the same bits every time. */
template <typename T, typename Op> __device__ __forceinline__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(full_warp, x, step));
  return x;
}
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce(x, op_sum{});
}

/* Every thread gets the result; all threads of a block of whole warps must call. */
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T x, Op op, T neutral) {
  __shared__ T part[32];
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
  x = warp_reduce(x, op);
  __syncthreads(); /* an earlier call's readers are done */
  if (lane == 0) part[warp] = x;
  __syncthreads();
  return warp_reduce(lane < warps ? part[lane] : neutral, op);
}
template <typename T> __device__ __forceinline__ T block_sum(T x) {
  return block_reduce(x, op_sum{}, T(0));
}

/* The sum over a warp's lanes up to this one. */
template <typename T> __device__ __forceinline__ T warp_scan(T x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    T before = __shfl_up_sync(full_warp, x, step);
    if ((int)threadIdx.x % 32 >= step) x += before;
  }
  return x;
}

/* The sum over the threads before this one, in thread order; *total gets the sum over all. For
 * blocks of whole warps; all threads must call. */
template <typename T> __device__ __forceinline__ T block_scan(T x, T *total) {
  __shared__ T part[32];
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
  T sum = warp_scan(x);
  __syncthreads(); /* an earlier call's readers are done */
  if (lane == 31) part[warp] = sum;
  __syncthreads();
  T base = 0, all = 0;
  for (int w = 0; w < warps; w++) {
    if (w < warp) base += part[w];
    all += part[w];
  }
  *total = all;
  return base + sum - x;
}

/* Whether this block is the last of its grid to get here: then it sees (by __ldcg) what the others
 * have written. All threads must call; *ended is 0 before and after the kernel. */
__device__ __forceinline__ bool block_is_last(unsigned *ended) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ended, gridDim.x - 1) == gridDim.x - 1; /* back to 0 */
  __syncthreads();
  if (last) __threadfence();
  return last;
}

/* ---- loops --------------------------------------------------------------------------------- */

/* A grid-stride loop: f(i) for each whole group of N elements from i on; the last n % N elements
 * go one by one through g. */
template <int N, typename F, typename G>
__device__ __forceinline__ void stride(int64_t n, F f, G g) {
  int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = first; i < n / N; i += step) f(i * N);
  for (int64_t i = n - n % N + first; i < n; i += step) g(i);
}
/* The same for single elements. */
template <typename F> __device__ __forceinline__ void stride(int64_t n, F f) {
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) f(i);
}

/* ---- shared by op families ----------------------------------------------------------------- */

/* gemm.cu: c [m, n] (row length ldc) = form(a, b) + beta c on the device's stream; lda, ldb, ldc
 * are row lengths in elements. k may be 0. */
struct cuda_matrix {
  void *data;
  moe_dtype dtype;
  int64_t ld;
};
moe_status cuda_matmul(moe_device *dev, moe_gemm_form form, int64_t m, int64_t n, int64_t k,
                       cuda_matrix a, cuda_matrix b, float beta, cuda_matrix c);
/* The same by the own kernel (tiled.cuh). */
moe_status cuda_matmul_own(moe_device *dev, moe_gemm_form form, int64_t m, int64_t n, int64_t k,
                           cuda_matrix a, cuda_matrix b, float beta, cuda_matrix c);
void cuda_plans_destroy(cuda_plans *plans);

/* elementwise.cu: out f64 [1] += the sum of `count` numbers on the device, in a fixed order. */
moe_status cuda_add_partial(moe_device *dev, const double *partial, int count, moe_tensor out);

/* lanes.cu */
moe_status cuda_lanes_create(moe_device *dev);
void cuda_lanes_wait(cuda_state *s);
void cuda_lanes_destroy(cuda_state *s);
void cuda_use_lane(moe_device *dev, moe_lane lane);
moe_status cuda_wait_lane(moe_device *dev, moe_lane other);
moe_status cuda_follow(moe_device *dev, const moe_mark *mark);
void cuda_lend(moe_device *dev, int multiprocessors);

/* graph.cu */
moe_status cuda_graph_begin(moe_device *dev);
moe_status cuda_graph_end(moe_device *dev, moe_graph **out);
moe_status cuda_graph_launch(moe_device *dev, moe_graph *graph);
void cuda_graph_destroy(moe_device *dev, moe_graph *graph);

/* experts.cu: must be told when device memory that may hold expert offsets is written. */
void cuda_offsets_changed(moe_device *dev, const void *data, int64_t bytes);
moe_status cuda_offsets_create(moe_device *dev);
void cuda_offsets_destroy(moe_device *dev);

/* The expert products have two makers behind one table: cuBLAS per expert, and Hopper's own fused
 * kernels (experts_sm90.cu). moe_cuda_open chooses by compute capability and MOE_EXPERT_GEMM. */
struct cuda_expert_ops {
  const char *name;
  decltype(moe_backend::expert_up) up;
  decltype(moe_backend::expert_down) down;
  decltype(moe_backend::expert_down_backward) down_backward;
  decltype(moe_backend::expert_up_backward) up_backward;
  decltype(moe_backend::expert_weight_grad) weight_grad;
  decltype(moe_backend::expert_scratch) scratch;
};
extern const cuda_expert_ops cuda_experts_cublas;
/* Takes any shape and type: falls back to the cublas table's slot itself where it has no kernel. */
extern const cuda_expert_ops cuda_experts_sm90;
moe_status cuda_experts_choose(moe_device *dev);

#endif
