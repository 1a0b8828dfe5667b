/* RMS norm with a fused residual addition, and its gradient.
 *
 * A block works on a row at a time, a thread on 8 neighbouring elements. Where one group per thread
 * spans the row (ONCE), the row stays in registers and is read once. The gain's gradient is summed
 * over a block's rows first, then over the blocks in a fixed order: the same bits every time. */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/plain.h"

enum { MOST_THREADS = 512 };

/* ---- forward ------------------------------------------------------------------------------- */

struct norm_args {
  const void *x, *residual; /* residual may be NULL; sum may be x or residual */
  void *sum, *out;
  const float *gain;
  float *rstd;
  int64_t width;
  float eps;
};

template <typename T, int N, bool ONCE, bool FUSED>
__global__ void __launch_bounds__(MOST_THREADS) norm_kernel(norm_args p) {
  int64_t row = (int64_t)blockIdx.x * p.width, step = (int64_t)blockDim.x * N;
  const T *x = (const T *)p.x + row;
  T *sum = (T *)p.sum + row, *out = (T *)p.out + row;
  float v[N], squares = 0;
  launch_wait();
  launch_release();
  for (int64_t c = threadIdx.x * N; c < p.width; c += step) {
    load<T, N>(v, x + c);
    if constexpr (FUSED) {
      float r[N];
      load<T, N>(r, (const T *)p.residual + row + c);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = to_float(from_float<T>(v[i] + r[i])); /* as stored */
      store<T, N>(sum + c, v);
    }
#pragma unroll
    for (int i = 0; i < N; i++) squares += v[i] * v[i];
  }
  float rstd = 1.0f / sqrtf(block_sum(squares) / (float)p.width + p.eps);
  if (threadIdx.x == 0) p.rstd[blockIdx.x] = rstd;
  for (int64_t c = threadIdx.x * N; c < p.width; c += step) {
    float gain[N];
    if constexpr (!ONCE) load<T, N>(v, FUSED ? sum + c : x + c);
    load<float, N>(gain, p.gain + c);
#pragma unroll
    for (int i = 0; i < N; i++) gain[i] *= v[i] * rstd;
    store<T, N>(out + c, gain);
  }
}

/* Threads for a row, and whether they span it in one step. */
static unsigned row_threads(int64_t width, int n, bool *once) {
  *once = div_up(width, n) <= MOST_THREADS;
  return cuda_threads(div_up(width, n), MOST_THREADS);
}

moe_status moe_cuda_rms_norm(moe_device *dev, moe_tensor x, moe_tensor residual, moe_tensor gain,
                             double eps, moe_tensor sum, moe_tensor out, moe_tensor rstd) {
  int64_t rows = x.shape[0], width = x.shape[1];
  bool fused = moe_tensor_present(residual);
  cudaStream_t stream = cuda_of(dev)->stream;
  norm_args p = {
      x.data, residual.data, sum.data, out.data, cuda_data<float>(gain), cuda_data<float>(rstd),
      width,  (float)eps};
  if (rows == 0 || width == 0) return MOE_OK;
  return cuda_act(x.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          bool once;
          int threads = (int)row_threads(width, N, &once);
          auto kernel = once
                            ? fused ? norm_kernel<T, N, true, true> : norm_kernel<T, N, true, false>
                        : fused ? norm_kernel<T, N, false, true>
                                : norm_kernel<T, N, false, false>;
          return cuda_start(dev, kernel, dim3((unsigned)rows), threads, 0, p);
        },
        (char *)x.data, (char *)residual.data, (char *)sum.data, (char *)out.data,
        (char *)gain.data);
  });
}

/* ---- backward ------------------------------------------------------------------------------
 * With h = x rstd and g = dout gain:  dx += rstd (g - h mean(g h)),  dgain += sum over rows dout h.
 */

struct norm_backward_args {
  const void *dout, *x;
  const float *gain, *rstd;
  void *dx;
  float *partial; /* [gridDim.x, width]: each block's part of dgain */
  int64_t rows, width;
};

template <typename T, int N, bool ONCE>
__global__ void __launch_bounds__(MOST_THREADS) norm_backward_kernel(norm_backward_args p) {
  int64_t step = (int64_t)blockDim.x * N;
  float *partial = p.partial + blockIdx.x * p.width;
  float d[N], x[N], gain[N], part[N] = {};
  launch_wait();
  launch_release();
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T *dout_row = (const T *)p.dout + row * p.width, *x_row = (const T *)p.x + row * p.width;
    T *dx_row = (T *)p.dx + row * p.width;
    float dot = 0, rstd = p.rstd[row];
    for (int64_t c = threadIdx.x * N; c < p.width; c += step) {
      load<T, N>(d, dout_row + c);
      load<T, N>(x, x_row + c);
      load<float, N>(gain, p.gain + c);
#pragma unroll
      for (int i = 0; i < N; i++) dot += d[i] * gain[i] * x[i];
    }
    float mean = block_sum(dot) * rstd / (float)p.width;
    for (int64_t c = threadIdx.x * N; c < p.width; c += step) {
      float dx[N];
      if constexpr (!ONCE) {
        load<T, N>(d, dout_row + c);
        load<T, N>(x, x_row + c);
        load<float, N>(gain, p.gain + c);
#pragma unroll
        for (int i = 0; i < N; i++) part[i] = 0;
        if (row != blockIdx.x) load<float, N>(part, partial + c);
      }
      load<T, N>(dx, dx_row + c);
#pragma unroll
      for (int i = 0; i < N; i++) {
        float h = x[i] * rstd;
        part[i] += d[i] * h;
        dx[i] += rstd * (d[i] * gain[i] - h * mean);
      }
      store<T, N>(dx_row + c, dx);
      if constexpr (!ONCE) store<float, N>(partial + c, part);
    }
  }
  if constexpr (ONCE)
    if (threadIdx.x * N < p.width) store<float, N>(partial + threadIdx.x * N, part);
}

constexpr int narrow_warps = 8, narrow_most = 4; /* groups of 8 elements for each lane */

/* The same for rows that a warp holds in registers: nothing waits for other warps until the end. */
template <typename T, int GROUPS>
__global__ void __launch_bounds__(32 * narrow_warps, 2)
    norm_backward_narrow_kernel(norm_backward_args p) {
  __shared__ float share[narrow_warps][GROUPS * 256];
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  float gain[GROUPS][8], part[GROUPS][8] = {};
  launch_wait();
  launch_release();
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    int64_t c = (lane + 32 * j) * 8;
    if (c < p.width) {
      load<float, 8>(gain[j], p.gain + c);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) gain[j][i] = 0.0f;
    }
  }
  int64_t step = (int64_t)gridDim.x * narrow_warps;
  for (int64_t row = (int64_t)blockIdx.x * narrow_warps + warp; row < p.rows; row += step) {
    cuda_pack<T, 8> d[GROUPS], x[GROUPS], dx[GROUPS];
    int64_t at = row * p.width + lane * 8;
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if ((lane + 32 * j) * 8 < p.width) {
        d[j].load((const T *)p.dout + at + 256 * j);
        x[j].load((const T *)p.x + at + 256 * j);
        dx[j].load((const T *)p.dx + at + 256 * j);
      }
    float rstd = p.rstd[row], dot = 0;
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if ((lane + 32 * j) * 8 < p.width) {
#pragma unroll
        for (int i = 0; i < 8; i++) dot += to_float(d[j].v[i]) * gain[j][i] * to_float(x[j].v[i]);
      }
    float mean = warp_sum(dot) * rstd / (float)p.width;
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if ((lane + 32 * j) * 8 < p.width) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float h = to_float(x[j].v[i]) * rstd, g = to_float(d[j].v[i]);
          part[j][i] += g * h;
          dx[j].v[i] = from_float<T>(to_float(dx[j].v[i]) + rstd * (g * gain[j][i] - h * mean));
        }
        dx[j].store((T *)p.dx + at + 256 * j);
      }
  }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) store<float, 8>(&share[warp][(lane + 32 * j) * 8], part[j]);
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.width; c += 32 * narrow_warps) {
    float sum = 0;
    for (int w = 0; w < narrow_warps; w++) sum += share[w][c];
    p.partial[blockIdx.x * p.width + c] = sum;
  }
}

/* Queue it where it fits: 16-byte accesses, few groups. *blocks: how many, 0 if it does not. */
template <typename T, int N>
static moe_status norm_backward_narrow(moe_device *dev, const norm_backward_args &p,
                                       unsigned *blocks) {
  static const bool wide = cuda_plain("norm");
  if constexpr (N == 8 && sizeof(T) == 2) {
    const cuda_state *s = cuda_of(dev);
    int groups = (int)min(div_up(p.width, 256), (int64_t)narrow_most + 1);
    if (wide || groups > narrow_most) return MOE_OK;
    int64_t most = min((int64_t)2 * s->sms, s->partial_bytes / (4 * p.width));
    *blocks = (unsigned)min(div_up(p.rows, narrow_warps), most);
    auto start = [&](auto n) {
      return cuda_start(dev, norm_backward_narrow_kernel<T, decltype(n)::value>, dim3(*blocks),
                        32 * narrow_warps, 0, p);
    };
    return cuda_groups(groups, start);
  }
  return MOE_OK;
}

/* out[c] += sum over rows of partial [rows, width], in an order that depends on `rows` alone.
 * Blocks of 32 columns by 16 interleaved shares of the rows. */
__global__ void add_columns_kernel(const float *partial, int64_t rows, int64_t width, float *out) {
  __shared__ float share[16][33];
  int column = (int)threadIdx.x % 32, part = (int)threadIdx.x / 32;
  int64_t c = (int64_t)blockIdx.x * 32 + column;
  float sum = 0;
  launch_wait();
  launch_release();
  if (c < width)
#pragma unroll 8
    for (int64_t row = part; row < rows; row += 16) sum += partial[row * width + c];
  share[part][column] = sum;
  __syncthreads();
  if (part != 0 || c >= width) return;
  for (int i = 1; i < 16; i++) sum += share[i][column];
  out[c] += sum;
}

/* Blocks that fill the chip, as far as their partial sums fit. */
static unsigned backward_blocks(moe_device *dev, int64_t rows, int64_t width, unsigned threads) {
  const cuda_state *s = cuda_of(dev);
  int64_t blocks = (int64_t)s->sms * (threads <= 128 ? 8 : threads <= 256 ? 4 : 2);
  int64_t fit = s->partial_bytes / (4 * width);
  if (blocks > fit) blocks = fit;
  return (unsigned)(blocks < rows ? blocks : rows);
}

moe_status moe_cuda_rms_norm_backward(moe_device *dev, moe_tensor dout, moe_tensor x,
                                      moe_tensor gain, moe_tensor rstd, moe_tensor dx,
                                      moe_tensor dgain) {
  cuda_state *s = cuda_of(dev);
  int64_t rows = x.shape[0], width = x.shape[1];
  if (rows == 0 || width == 0) return MOE_OK;
  if (width > s->partial_bytes / 4)
    return moe_fail(MOE_INVALID, "cuda: rms_norm_backward: rows of %lld elements are too long",
                    (long long)width);
  norm_backward_args p = {dout.data,
                          x.data,
                          cuda_data<float>(gain),
                          cuda_data<float>(rstd),
                          dx.data,
                          (float *)s->partial,
                          rows,
                          width};
  return cuda_act(x.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          bool once;
          unsigned threads = row_threads(width, N, &once);
          unsigned blocks = 0;
          MOE_TRY((norm_backward_narrow<T, N>(dev, p, &blocks)));
          if (blocks == 0) {
            auto kernel =
                once ? norm_backward_kernel<T, N, true> : norm_backward_kernel<T, N, false>;
            blocks = backward_blocks(dev, rows, width, threads);
            MOE_TRY(cuda_start(dev, kernel, dim3(blocks), (int)threads, 0, p));
          }
          return cuda_start(dev, add_columns_kernel, dim3((unsigned)div_up(width, 32)), 512, 0,
                            p.partial, blocks, width, cuda_data<float>(dgain));
        },
        (char *)dout.data, (char *)x.data, (char *)dx.data, (char *)gain.data);
  });
}
