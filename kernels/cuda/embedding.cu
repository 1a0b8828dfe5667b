/* The embedding and its gradient.
 *
 * Gradient: rows of one token must be added in a fixed order without atomics and without scratch.
 * The block of a token's first occurrence owns its row of dweight and walks through the later ones
 * in order; blocks of other occurrences find an earlier one and leave. The search costs T^2/2
 * comparisons at most, 0.3 ms for 32768 tokens, and ends early for frequent tokens. */
#include <climits>
#include <cmath>

#include "kernels/cuda/common.cuh"

/* ---- forward ------------------------------------------------------------------------------- */

/* A token outside the vocabulary (the loader admits none) reads nothing and gives NaN. */
template <typename T, int N>
__global__ void embed_kernel(const int32_t *tokens, const T *weight, int64_t vocabulary,
                             int64_t width, T *out, int64_t groups) {
  int64_t per_row = width / N;
  stride(groups, [=](int64_t i) {
    int64_t t = i / per_row, c = i % per_row * N, token = tokens[t];
    cuda_pack<T, N> row;
    if (token >= 0 && token < vocabulary) {
      row.load(weight + token * width + c);
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) row.v[j] = from_float<T>(NAN);
    }
    row.store(out + t * width + c);
  });
}

moe_status moe_cuda_embed(moe_device *dev, moe_tensor tokens, moe_tensor weight, moe_tensor out) {
  int64_t count = moe_tensor_count(out), width = out.shape[1];
  if (count == 0) return MOE_OK;
  return cuda_act(out.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          embed_kernel<T, N><<<cuda_blocks(dev, count / N, 256), 256, 0, cuda_of(dev)->stream>>>(
              cuda_data<int32_t>(tokens), cuda_data<T>(weight), weight.shape[0], width,
              cuda_data<T>(out), count / N);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)weight.data, (char *)out.data);
  });
}

/* ---- backward ------------------------------------------------------------------------------ */

constexpr int search_threads = 128, search_each = 8, search_chunk = search_threads * search_each;

/* Whether `token` is among tokens [0, end). All threads of the block get the answer. */
static __device__ bool appears(const int32_t *tokens, int64_t end, int32_t token) {
  for (int64_t base = 0; base < end; base += search_chunk) {
    bool found = false;
#pragma unroll
    for (int j = 0; j < search_each; j++) {
      int64_t t = base + j * search_threads + threadIdx.x;
      if (t < end && tokens[t] == token) found = true;
    }
    if (__syncthreads_or(found)) return true;
  }
  return false;
}

/* Positions of `token` among tokens [base, base + search_chunk), in order; returns how many. */
static __device__ int list_occurrences(const int32_t *tokens, int64_t base, int64_t count,
                                       int32_t token, int *list) {
  int64_t first = base + threadIdx.x * search_each;
  unsigned here = 0;
#pragma unroll
  for (int j = 0; j < search_each; j++)
    if (first + j < count && tokens[first + j] == token) here |= 1u << j;
  int total;
  int at = block_scan(__popc(here), &total);
  for (; here != 0; here &= here - 1)
    list[at++] = (int)threadIdx.x * search_each + __ffs((int)here) - 1;
  __syncthreads();
  return total;
}

template <typename T, int N>
__global__ void __launch_bounds__(search_threads)
    embed_backward_kernel(const int32_t *tokens, int64_t count, const T *dout, int64_t vocabulary,
                          int64_t width, float *dweight) {
  __shared__ int list[search_chunk];
  int64_t t = blockIdx.x, c = ((int64_t)blockIdx.y * search_threads + threadIdx.x) * N;
  int32_t token = tokens[t];
  if (token < 0 || token >= vocabulary || appears(tokens, t, token)) return;
  float sum[N];
  if (c < width) load<float, N>(sum, dweight + token * width + c);
  for (int64_t base = t; base < count; base += search_chunk) {
    int found = list_occurrences(tokens, base, count, token, list);
    if (c < width) {
#pragma unroll 4
      for (int i = 0; i < found; i++) {
        float d[N];
        load<T, N>(d, dout + (base + list[i]) * width + c);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] += d[j];
      }
    }
    __syncthreads(); /* the list is read */
  }
  if (c < width) store<float, N>(dweight + token * width + c, sum);
}

moe_status moe_cuda_embed_backward(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                                   moe_tensor dweight) {
  int64_t count = dout.shape[0], width = dout.shape[1];
  if (count == 0 || width == 0) return MOE_OK;
  if (count > INT_MAX)
    return moe_fail(MOE_INVALID, "cuda: embed_backward: %lld tokens are too many for one call",
                    (long long)count);
  return cuda_act(dout.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          dim3 grid((unsigned)count, (unsigned)div_up(width, search_threads * N));
          embed_backward_kernel<T, N><<<grid, search_threads, 0, cuda_of(dev)->stream>>>(
              cuda_data<int32_t>(tokens), count, cuda_data<T>(dout), dweight.shape[0], width,
              cuda_data<float>(dweight));
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)dout.data, (char *)dweight.data);
  });
}
