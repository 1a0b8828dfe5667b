/* Elementwise operations and the sum of squares: all bound by memory, so one pass, 8 elements
 * (16 or 32 bytes) per thread and step. */
#include "kernels/cuda/common.cuh"

moe_status moe_cuda_zero(moe_device *dev, moe_tensor x) {
  int64_t bytes = moe_tensor_bytes(x);
  if (bytes == 0) return MOE_OK;
  cuda_offsets_changed(dev, x.data, bytes);
  CUDA_TRY(dev, cudaMemsetAsync(x.data, 0, (size_t)bytes, cuda_of(dev)->stream));
  return MOE_OK;
}

template <typename D, typename S, int N>
__device__ __forceinline__ void convert(D *dst, const S *src) {
  float v[N];
  load<S, N>(v, src);
  store<D, N>(dst, v);
}

template <typename D, typename S, int N>
__global__ void copy_kernel(D *dst, const S *src, int64_t n) {
  stride<N>(
      n, [=](int64_t i) { convert<D, S, N>(dst + i, src + i); },
      [=](int64_t i) { convert<D, S, 1>(dst + i, src + i); });
}

template <typename Y, typename X, int N> __device__ __forceinline__ void add(Y *y, const X *x) {
  float a[N], b[N];
  load<Y, N>(a, y);
  load<X, N>(b, x);
#pragma unroll
  for (int i = 0; i < N; i++) a[i] += b[i];
  store<Y, N>(y, a);
}

template <typename Y, typename X, int N> __global__ void add_kernel(Y *y, const X *x, int64_t n) {
  stride<N>(
      n, [=](int64_t i) { add<Y, X, N>(y + i, x + i); },
      [=](int64_t i) { add<Y, X, 1>(y + i, x + i); });
}

template <typename X, int N> __device__ __forceinline__ void scale(X *x, float s) {
  float v[N];
  load<X, N>(v, x);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] *= s;
  store<X, N>(x, v);
}

template <typename X, int N> __global__ void scale_kernel(X *x, float s, int64_t n) {
  stride<N>(
      n, [=](int64_t i) { scale<X, N>(x + i, s); }, [=](int64_t i) { scale<X, 1>(x + i, s); });
}

/* Pick types and width for a kernel over one or two tensors. Rows do not matter: tails are handled.
 */
template <typename F> static moe_status pick(moe_tensor y, moe_tensor x, F f) {
  return cuda_act(y.dtype, [&](auto b) {
    return cuda_act(x.dtype, [&](auto a) {
      return cuda_width(
          0, [&](auto width) { return f(b, a, width); }, (char *)y.data, (char *)x.data);
    });
  });
}

template <typename F> static moe_status pick(moe_tensor x, F f) {
  return cuda_act(x.dtype, [&](auto a) {
    return cuda_width(
        0, [&](auto width) { return f(a, width); }, (char *)x.data);
  });
}

moe_status moe_cuda_copy(moe_device *dev, moe_tensor dst, moe_tensor src) {
  int64_t n = moe_tensor_count(dst);
  if (n == 0) return MOE_OK;
  cuda_offsets_changed(dev, dst.data, moe_tensor_bytes(dst));
  cudaStream_t stream = cuda_of(dev)->stream;
  if (dst.dtype == src.dtype) {
    CUDA_TRY(dev, cudaMemcpyAsync(dst.data, src.data, (size_t)moe_tensor_bytes(dst),
                                  cudaMemcpyDeviceToDevice, stream));
    return MOE_OK;
  }
  return pick(dst, src, [&](auto d, auto s, auto width) {
    using D = decltype(d);
    using S = decltype(s);
    constexpr int N = decltype(width)::value;
    copy_kernel<D, S, N><<<cuda_blocks(dev, div_up(n, N), 256), 256, 0, stream>>>(
        cuda_data<D>(dst), cuda_data<S>(src), n);
    CUDA_LAUNCHED(dev);
    return MOE_OK;
  });
}

moe_status moe_cuda_add(moe_device *dev, moe_tensor y, moe_tensor x) {
  int64_t n = moe_tensor_count(y);
  if (n == 0) return MOE_OK;
  return pick(y, x, [&](auto d, auto s, auto width) {
    using Y = decltype(d);
    using X = decltype(s);
    constexpr int N = decltype(width)::value;
    add_kernel<Y, X, N><<<cuda_blocks(dev, div_up(n, N), 256), 256, 0, cuda_of(dev)->stream>>>(
        cuda_data<Y>(y), cuda_data<X>(x), n);
    CUDA_LAUNCHED(dev);
    return MOE_OK;
  });
}

moe_status moe_cuda_scale(moe_device *dev, moe_tensor x, float s) {
  int64_t n = moe_tensor_count(x);
  if (n == 0) return MOE_OK;
  return pick(x, [&](auto d, auto width) {
    using X = decltype(d);
    constexpr int N = decltype(width)::value;
    scale_kernel<X, N><<<cuda_blocks(dev, div_up(n, N), 256), 256, 0, cuda_of(dev)->stream>>>(
        cuda_data<X>(x), s, n);
    CUDA_LAUNCHED(dev);
    return MOE_OK;
  });
}

template <typename X, int N> __device__ __forceinline__ void fill(X *x, float value) {
  float v[N];
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = value;
  store<X, N>(x, v);
}

template <typename X, int N> __global__ void fill_kernel(X *x, float value, int64_t n) {
  stride<N>(
      n, [=](int64_t i) { fill<X, N>(x + i, value); },
      [=](int64_t i) { fill<X, 1>(x + i, value); });
}

moe_status moe_cuda_fill(moe_device *dev, moe_tensor x, float value) {
  int64_t n = moe_tensor_count(x);
  if (n == 0) return MOE_OK;
  return pick(x, [&](auto d, auto width) {
    using X = decltype(d);
    constexpr int N = decltype(width)::value;
    fill_kernel<X, N><<<cuda_blocks(dev, div_up(n, N), 256), 256, 0, cuda_of(dev)->stream>>>(
        cuda_data<X>(x), value, n);
    CUDA_LAUNCHED(dev);
    return MOE_OK;
  });
}

/* ---- sum of squares ------------------------------------------------------------------------ */

template <typename X, int N> __device__ __forceinline__ double squares(const X *x) {
  float v[N];
  load<X, N>(v, x);
  double s = 0;
#pragma unroll
  for (int i = 0; i < N; i++) s += (double)v[i] * (double)v[i];
  return s;
}

template <typename X, int N>
__global__ void squares_kernel(const X *x, int64_t n, double *partial) {
  double s = 0;
  stride<N>(
      n, [&](int64_t i) { s += squares<X, N>(x + i); },
      [&](int64_t i) { s += squares<X, 1>(x + i); });
  s = block_sum(s);
  if (threadIdx.x == 0) partial[blockIdx.x] = s;
}

__global__ void add_partial_kernel(const double *partial, int count, double *out) {
  double s = 0;
  for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) s += partial[i];
  s = block_sum(s);
  if (threadIdx.x == 0) *out += s;
}

moe_status cuda_add_partial(moe_device *dev, const double *partial, int count, moe_tensor out) {
  add_partial_kernel<<<1, 256, 0, cuda_of(dev)->stream>>>(partial, count, cuda_data<double>(out));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

moe_status moe_cuda_sum_squares(moe_device *dev, moe_tensor x, moe_tensor out) {
  cuda_state *s = cuda_of(dev);
  int64_t n = moe_tensor_count(x);
  if (n == 0) return MOE_OK;
  double *partial = reinterpret_cast<double *>(s->partial);
  MOE_TRY(cuda_act(x.dtype, [&](auto d) {
    using X = decltype(d);
    return cuda_width(
        0,
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          unsigned blocks = cuda_blocks(dev, div_up(n, N), 256);
          squares_kernel<X, N><<<blocks, 256, 0, s->stream>>>(cuda_data<X>(x), n, partial);
          CUDA_LAUNCHED(dev);
          return cuda_add_partial(dev, partial, (int)blocks, out);
        },
        (char *)x.data);
  }));
  return MOE_OK;
}

/* ---- sum of rows --------------------------------------------------------------------------- */

template <typename X> struct sum_rows_args {
  X *out;
  const X *x;
  int64_t rows, width, own;
  double *squares; /* NULL: nobody asks */
  double *partial; /* [blocks], after how many blocks have ended */
};

/* Groups of N elements that a thread adds at once, a block's width apart: as many loads are under
 * way. */
constexpr int sum_groups = 4;

/* The sums of such groups, from `first` on; returns the squares of what is stored. */
template <typename X, int N>
__device__ __forceinline__ double sum_rows(const sum_rows_args<X> &p, int64_t first) {
  cuda_pack<X, N> v[sum_groups];
  float sum[sum_groups][N] = {};
  auto place = [&](int g) { return (first + g * (int)blockDim.x) * N; };
#pragma unroll 2
  for (int64_t r = 0; r < p.rows; r++) {
    const X *row = r == p.own ? p.out : p.x + r * p.width;
#pragma unroll
    for (int g = 0; g < sum_groups; g++)
      if (place(g) < p.width) v[g].load(row + place(g));
#pragma unroll
    for (int g = 0; g < sum_groups; g++)
#pragma unroll
      for (int j = 0; j < N; j++) sum[g][j] += to_float(v[g].v[j]);
  }
  double s = 0;
#pragma unroll
  for (int g = 0; g < sum_groups; g++) {
    if (place(g) >= p.width) break;
#pragma unroll
    for (int j = 0; j < N; j++) v[g].v[j] = from_float<X>(sum[g][j]);
    v[g].store(p.out + place(g));
    if (p.squares != nullptr) s += squares<X, N>(v[g].v);
  }
  return s;
}

/* *out += the sum of s over all threads, by the block that ends last, in the order of blocks. A
 * second kernel would have to wait for a multiprocessor again where others run beside. */
__device__ __forceinline__ void add_over_blocks(double s, double *partial, double *out) {
  s = block_sum(s);
  if (threadIdx.x == 0) partial[1 + blockIdx.x] = s;
  if (!block_is_last(reinterpret_cast<unsigned *>(partial))) return;
  s = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) s += __ldcg(partial + 1 + i);
  s = block_sum(s);
  if (threadIdx.x == 0) *out += s;
}

template <typename X, int N> __global__ void sum_rows_kernel(sum_rows_args<X> p) {
  double s = 0;
  int64_t tile = sum_groups * (int)blockDim.x;
  for (int64_t at = blockIdx.x * tile; at * N < p.width; at += gridDim.x * tile)
    s += sum_rows<X, N>(p, at + threadIdx.x);
  if (p.squares != nullptr) add_over_blocks(s, p.partial, p.squares);
}

moe_status moe_cuda_sum_rows(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                             moe_tensor squares) {
  cuda_state *s = cuda_of(dev);
  int64_t width = x.shape[1];
  if (width == 0) return MOE_OK;
  return cuda_act(x.dtype, [&](auto act) {
    using X = decltype(act);
    sum_rows_args<X> p = {cuda_data<X>(out),          cuda_data<X>(x), x.shape[0], width, own,
                          cuda_data<double>(squares), s->beside};
    return cuda_width(
        width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          unsigned blocks = cuda_blocks(dev, div_up(width, N * sum_groups), 256);
          sum_rows_kernel<X, N><<<blocks, 256, 0, s->stream>>>(p);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)out.data, (char *)x.data);
  });
}
