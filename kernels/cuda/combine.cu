/* Rows summed to tokens: experts' rows out of their order (permute.cu's), with the norm that
 * follows where one kernel does both, and a token's rows that lie together. */
#include "kernels/cuda/norm_few.cuh"

/* ---- by slot: a warp per token ------------------------------------------------------------- */

constexpr int row_warps = 8;

struct combine_args {
  const void *src;
  const int32_t *slot;
  void *out;
  int64_t begin, window, rows, k, width;
  int beta;
};

constexpr int combine_each = 4; /* rows on their way at a time */

/* sum += elements c to c + N - 1 of the row's rows in the window. */
template <typename T, int N>
__device__ __forceinline__ void combine_sum(const combine_args &p, int64_t row, int64_t c,
                                            float (&sum)[N]) {
  const int32_t *slot = p.slot + row * p.k;
  for (int64_t first = 0; first < p.k; first += combine_each) {
    cuda_pack<T, N> v[combine_each];
    bool here[combine_each];
#pragma unroll
    for (int i = 0; i < combine_each; i++) {
      int64_t at = first + i < p.k ? slot[first + i] - p.begin : -1;
      here[i] = at >= 0 && at < p.window;
      if (here[i]) v[i].load((const T *)p.src + at * p.width + c);
    }
#pragma unroll
    for (int i = 0; i < combine_each; i++)
#pragma unroll
      for (int j = 0; j < N; j++)
        if (here[i]) sum[j] += to_float(v[i].v[j]);
  }
}

template <typename T, int N> __global__ void combine_rows_kernel(combine_args p) {
  launch_wait();
  launch_release();
  int64_t row = (int64_t)blockIdx.x * row_warps + threadIdx.x / 32;
  if (row >= p.rows) return;
  T *y = (T *)p.out + row * p.width;
  for (int64_t c = threadIdx.x % 32 * N; c < p.width; c += 32 * N) {
    float sum[N] = {};
    if (p.beta) load<T, N>(sum, y + c);
    combine_sum<T, N>(p, row, c, sum);
    store<T, N>(y + c, sum);
  }
}

moe_status moe_cuda_combine_rows(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                                 int beta, moe_tensor out) {
  combine_args p = {src.data,      cuda_data<int32_t>(slot),
                    out.data,      begin,
                    src.shape[0],  out.shape[0],
                    slot.shape[1], out.shape[1],
                    beta};
  if (p.rows == 0 || p.width == 0) return MOE_OK;
  return cuda_act(src.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        p.width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          return cuda_start(dev, combine_rows_kernel<T, N>,
                            dim3((unsigned)div_up(p.rows, row_warps)), 32 * row_warps, 0, p);
        },
        (char *)src.data, (char *)out.data);
  });
}

constexpr int norm_warps = 4; /* small blocks: its registers leave room for five */

/* The norm of n.x and what is summed, which is rounded as if it were stored in between. */
template <typename T, int GROUPS>
__global__ void combine_norm_kernel(combine_args p, norm_few n, float *rstds) {
  launch_wait();
  launch_release();
  int64_t row = (int64_t)blockIdx.x * norm_warps + threadIdx.x / 32, at = row * p.width;
  int first = (int)threadIdx.x % 32 * 8;
  if (row >= p.rows) return;
  norm_few_part<T> part[GROUPS];
  float v[GROUPS][8];
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
    if (int c = first + 256 * j; c < n.width) part[j].x.load(static_cast<const T *>(n.x) + at + c);
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    int c = first + 256 * j;
    float sum[8] = {};
    if (c >= n.width) break;
    combine_sum<T, 8>(p, row, c, sum);
#pragma unroll
    for (int i = 0; i < 8; i++) part[j].residual.v[i] = from_float<T>(sum[i]);
  }
  float rstd = norm_few_add(part, v, n, row, true);
  if (threadIdx.x % 32 == 0) rstds[row] = rstd;
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    int c = first + 256 * j;
    if (c >= n.width) break;
    load<float, 8>(part[j].gain, n.gain + c);
    part[j].scale(v[j], rstd);
    store<T, 8>(static_cast<T *>(n.out) + at + c, v[j]);
  }
}

template <typename T>
static moe_status combine_norm(moe_device *dev, const combine_args &p, const moe_norm &norm) {
  norm_few n = norm_few_of(norm);
  auto start = [&](auto groups) {
    return cuda_start(dev, combine_norm_kernel<T, decltype(groups)::value>,
                      dim3((unsigned)div_up(p.rows, norm_warps)), 32 * norm_warps, 0, p, n,
                      cuda_data<float>(norm.rstd));
  };
  return cuda_groups(div_up(p.width, 256), start);
}

moe_status moe_cuda_combine_norm(moe_device *dev, moe_tensor src, moe_tensor slot, moe_norm norm,
                                 bool *done) {
  static const bool apart = cuda_plain("joint");
  combine_args p = {src.data,
                    cuda_data<int32_t>(slot),
                    nullptr,
                    0,
                    src.shape[0],
                    slot.shape[0],
                    slot.shape[1],
                    src.shape[1],
                    0};
  *done = !apart && src.dtype != MOE_F32 && norm_few_fits(norm) &&
          reinterpret_cast<uintptr_t>(src.data) % 16 == 0;
  if (!*done || p.rows == 0 || p.width == 0) return MOE_OK;
  return src.dtype == MOE_BF16 ? combine_norm<__nv_bfloat16>(dev, p, norm)
                               : combine_norm<__half>(dev, p, norm);
}

/* ---- in order ------------------------------------------------------------------------------ */

struct choice_args {
  const void *terms;
  void *out;
  int64_t rows, width, k;
};

/* A thread per N elements. */
template <typename S, typename T, int N> __global__ void sum_choices_kernel(choice_args p) {
  launch_wait();
  launch_release();
  stride(p.rows * p.width / N, [=](int64_t i) {
    int64_t row = i * N / p.width, c = i * N % p.width;
    const S *from = static_cast<const S *>(p.terms) + row * p.k * p.width + c;
    float sum[N] = {};
#pragma unroll 4
    for (int64_t k = 0; k < p.k; k++, from += p.width) {
      float term[N];
      load<S, N>(term, from);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += term[j];
    }
    store<T, N>(static_cast<T *>(p.out) + i * N, sum);
  });
}

template <typename S, typename T> static moe_status sum_choices(moe_device *dev, choice_args p) {
  return cuda_width(
      p.width,
      [&](auto w) {
        constexpr int N = decltype(w)::value;
        unsigned blocks = cuda_blocks(dev, p.rows * p.width / N, 128);
        return cuda_start(dev, sum_choices_kernel<S, T, N>, dim3(blocks), 128, 0, p);
      },
      static_cast<const char *>(p.terms), static_cast<char *>(p.out));
}

moe_status moe_cuda_sum_choices(moe_device *dev, moe_tensor terms, moe_tensor out) {
  choice_args p = {terms.data, out.data, out.shape[0], out.shape[1], terms.shape[0] / out.shape[0]};
  return cuda_act(out.dtype, [&](auto act) {
    using T = decltype(act);
    return terms.dtype == MOE_F32 ? sum_choices<float, T>(dev, p) : sum_choices<T, T>(dev, p);
  });
}

/* ---- gates --------------------------------------------------------------------------------- */

__global__ void combine_gates_kernel(const float *src, const int32_t *slot, int64_t n,
                                     int64_t begin, int64_t window, int beta, float *out) {
  stride(n, [=](int64_t i) {
    int64_t at = slot[i] < 0 ? -1 : slot[i] - begin;
    if (at >= 0 && at < window)
      out[i] = src[at];
    else if (!beta)
      out[i] = 0.0f;
  });
}

moe_status moe_cuda_combine_gates(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                                  int beta, moe_tensor out) {
  int64_t n = moe_tensor_count(slot);
  if (n == 0) return MOE_OK;
  combine_gates_kernel<<<cuda_blocks(dev, n, 256), 256, 0, cuda_of(dev)->stream>>>(
      cuda_data<float>(src), cuda_data<int32_t>(slot), n, begin, src.shape[0], beta,
      cuda_data<float>(out));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}
