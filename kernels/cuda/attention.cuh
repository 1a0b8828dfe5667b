/* What the attention kernels share: one call's arguments, where heads lie in memory, who sees whom.
 *
 *   attention.cu            the slots: cuDNN, tensor cores or exact; delta; sums of parts
 *   attention_exact.cu      any type and head size by float32 FMA
 *   attention_mma.cuh       fragments, asynchronous copies and products of tensor cores
 *   attention_forward.cu    bf16 and f16 on tensor cores, forward
 *   attention_backward.cu   and backward
 *   attention_sm90.cuh      on Hopper, bf16, head size 64: tiles, products
 *   attention_sm90_forward.cu   forward
 *   attention_sm90.cu       and backward; its work in attention_sm90_work.cuh
 *
 * Every kernel walks blocks of queries against blocks of keys. Which keys query i sees is one
 * range, [doc_start[i], i]; doc_start never decreases, so the blocks that any row of a block needs
 * are a range too, and only blocks at a range's ends need a mask. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_CUH
#define MOE_KERNELS_CUDA_ATTENTION_CUH

#include <cmath>

#include "kernels/cuda/common.cuh"

constexpr float log2_e = 1.4426950408889634f;

/* One call. Token indices within a sequence are ints; offsets into tensors are 64 bits. */
struct attention_args {
  int seq, heads, kv_heads, d;
  int rep;            /* query heads of one K/V head */
  int parts;          /* backward: in how many parts they are shared out */
  int64_t stride;     /* elements from one token of qkv and dqkv to the next */
  int64_t out_stride; /* and of out and dout */
  float scale;
  const int32_t *doc_start; /* or NULL */
  const void *qkv, *dout;
  void *out, *dqkv;
  float *lse;
  int64_t padded; /* rows of delta, lse2 and dq for one head: S, or more */
  float *delta;   /* [B, H, padded]: sum over d of dout * out */
  float *lse2;    /* [B, H, padded]: log2(e) lse, or NULL; great where there is no query */
  float *dq;      /* with lse2: [B, H, padded, d], as attention_sm90.cu says; zeros at first */
  float *partial; /* parts > 1: dk, dv f32 [parts, B, G, 2, S, d] before they are summed */
  int64_t batch;
};

/* One head's rows in one sequence: row i begins at data + i * stride. */
template <typename T> struct attention_rows {
  T *data;
  int64_t stride;
};

/* The head numbered `head` among the query, then key, then value heads of qkv or dqkv. */
template <typename T>
__device__ __forceinline__ attention_rows<T> qkv_rows(const attention_args &p, T *qkv,
                                                      int64_t batch, int head) {
  return {qkv + batch * p.seq * p.stride + (int64_t)head * p.d, p.stride};
}
template <typename T>
__device__ __forceinline__ attention_rows<T> out_rows(const attention_args &p, T *out,
                                                      int64_t batch, int head) {
  return {out + batch * p.seq * p.out_stride + (int64_t)head * p.d, p.out_stride};
}

/* The first key that query i of this sequence sees. */
__device__ __forceinline__ int first_key(const attention_args &p, int64_t batch, int i) {
  if (p.doc_start == nullptr) return 0;
  return max(0, min(p.doc_start[batch * p.seq + i], i));
}

/* The end of the queries, from `query` on, that see `key`; the first of them does. All of the block
 * look together, each at one query of a shrinking range. */
template <int THREADS>
__device__ __forceinline__ int end_of_queries(const attention_args &p, int64_t batch, int query,
                                              int key) {
  int end = p.seq;
  if (p.doc_start == nullptr) return end;
  while (end - query > 1) {
    int step = (int)div_up(end - query, THREADS), i = query + (int)threadIdx.x * step;
    int seeing = __syncthreads_count(i < end && first_key(p, batch, i) <= key);
    end = min(end, query + seeing * step);
    query += (seeing - 1) * step;
  }
  return end;
}

/* A block of K/V rows writes its gradient here: to dqkv, or to its part's sums. `which` 0: dK,
 * 1: dV. */
template <typename T> struct attention_key_sink {
  struct alignas(2 * sizeof(T)) pair {
    T x, y;
  };
  attention_rows<T> whole;
  float *part; /* NULL: whole */
  int d;
  __device__ __forceinline__ void put(int i, int c, float value) const {
    if (part != nullptr)
      part[(int64_t)i * d + c] = value;
    else
      whole.data[i * whole.stride + c] = from_float<T>(value);
  }
  /* Two neighbours, from an even c. */
  __device__ __forceinline__ void put_pair(int i, int c, float x, float y) const {
    if (part != nullptr)
      *reinterpret_cast<float2 *>(part + (int64_t)i * d + c) = make_float2(x, y);
    else
      *reinterpret_cast<pair *>(whole.data + i * whole.stride + c) = {from_float<T>(x),
                                                                      from_float<T>(y)};
  }
};
template <typename T>
__device__ __forceinline__ attention_key_sink<T> key_sink(const attention_args &p, int64_t batch,
                                                          int kv, int part, int which) {
  attention_key_sink<T> sink;
  sink.whole = qkv_rows<T>(p, static_cast<T *>(p.dqkv), batch, p.heads + which * p.kv_heads + kv);
  int64_t index = ((int64_t)part * p.batch + batch) * p.kv_heads + kv;
  sink.part = p.parts > 1 ? p.partial + (2 * index + which) * p.seq * p.d : nullptr;
  sink.d = p.d;
  return sink;
}

/* Call f(cuda_int<D>) with the smallest built head size that holds d. False: none does. */
template <typename F> static inline bool attention_head_size(int64_t d, F f) {
  if (d <= 16) return f(cuda_int<16>{}), true;
  if (d <= 32) return f(cuda_int<32>{}), true;
  if (d <= 64) return f(cuda_int<64>{}), true;
  if (d <= 128) return f(cuda_int<128>{}), true;
  return false;
}

/* Whether the tensor core kernels take heads of this size. */
static inline bool attention_mma_fits(const moe_device *dev, int64_t d, moe_dtype dtype) {
  return cuda_has_mma(dev, dtype) && d % 8 == 0 && d <= 128;
}

/* Queue a kernel on a grid of (heads in all sequences, blocks of rows). Blocks start in order of x
 * first, so kernels number their row blocks with the longest first. */
template <typename K>
static moe_status attention_launch(moe_device *dev, K kernel, int64_t x, int64_t y, int threads,
                                   int shared, const attention_args &p) {
  if (shared > cuda_of(dev)->max_shared || x > INT32_MAX || y > 65535)
    return moe_fail(MOE_INVALID,
                    "cuda: attention of %lld heads with %d tokens and head size %d is beyond the "
                    "own kernels on %s",
                    (long long)x, p.seq, p.d, dev->name);
  if (shared > 48 << 10) /* what a kernel gets without asking */
    CUDA_TRY(dev,
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<dim3((unsigned)x, (unsigned)y), threads, shared, cuda_of(dev)->stream>>>(p);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* attention_exact.cu: any type, any head size up to 256. */
constexpr int64_t attention_exact_most = 256;
moe_status cuda_attention_exact(moe_device *dev, moe_dtype dtype, const attention_args &p);
/* dqkv's queries and, into dqkv or p.partial, its keys and values. p.delta is ready. */
moe_status cuda_attention_exact_backward(moe_device *dev, moe_dtype dtype, const attention_args &p);
/* attention_forward.cu, attention_backward.cu: the same with tensor cores. */
moe_status cuda_attention_mma(moe_device *dev, moe_dtype dtype, const attention_args &p);
moe_status cuda_attention_mma_backward(moe_device *dev, moe_dtype dtype, const attention_args &p);
/* attention_sm90_forward.cu. */
bool cuda_attention_sm90_forward_fits(const moe_device *dev, moe_attention_shape s,
                                      moe_dtype dtype);
moe_status cuda_attention_sm90_forward(moe_device *dev, const attention_args &p);
/* attention_sm90.cu: backward. p.lse2 and p.dq are there. */
bool cuda_attention_sm90_fits(const moe_device *dev, moe_attention_shape s, moe_dtype dtype);
moe_status cuda_attention_sm90_backward(moe_device *dev, const attention_args &p);

#endif
