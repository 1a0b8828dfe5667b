/* Cross-entropy and its gradient, in place of the logits: one block per row.
 *
 *     -log p(target) = max + log(sum_j exp(x_j - max)) - x_target
 *
 * Maximum and sum are found together (online), so a row is read once; up to 32768 elements wait in
 * registers for the gradient to be written, longer rows are read again. Source of the online sum:
 * Milakov and Gimelshein 2018, arXiv:1805.02867. */
#include <cmath>

#include "kernels/cuda/common.cuh"

constexpr int loss_threads = 512, loss_kept = 8; /* groups of N elements a thread keeps */

struct loss_args {
  void *logits;
  const int32_t *targets;
  int64_t width;
  float scale;
  int with_grad;
  double *values;  /* each row's -log p; 0 where the target is -1 */
  float *row_loss; /* the same, or NULL */
};

/* exp for f32 results, and the hardware's own for half precision, which rounds far coarser. */
template <typename T> __device__ __forceinline__ float exp_for(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return __expf(x);
}

/* sum_j exp(x_j - most) over what was added so far. */
template <typename T> struct online_sum {
  float most = -INFINITY, sum = 0;
  template <int N> __device__ __forceinline__ void add(const float (&v)[N]) {
    float top = most;
#pragma unroll
    for (int i = 0; i < N; i++) top = op_max{}(top, v[i]);
    if (top == -INFINITY) return;
    sum *= exp_for<T>(most - top);
#pragma unroll
    for (int i = 0; i < N; i++) sum += exp_for<T>(v[i] - top);
    most = top;
  }
  /* Every thread's together. */
  __device__ __forceinline__ void combine() {
    float top = block_reduce(most, op_max{}, -INFINITY);
    sum = block_sum(sum > 0.0f || sum != sum ? sum * exp_for<T>(most - top) : 0.0f);
    most = top;
  }
};

/* x = factor * exp(x - most), less `scale` at the target; `at` is the index of v[0]. */
template <typename T, int N>
__device__ __forceinline__ void write_gradient(T *x, int64_t at, float (&v)[N], float most,
                                               float factor, int64_t target, float scale) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    v[i] = factor * exp_for<T>(v[i] - most);
    if (at + i == target) v[i] -= scale;
  }
  store<T, N>(x + at, v);
}

template <typename T, int N> __device__ __forceinline__ void clear_row(T *x, int64_t width) {
  float zero[N] = {};
  for (int64_t c = threadIdx.x * N; c < width; c += loss_threads * N) store<T, N>(x + c, zero);
}

template <typename T, int N, bool KEEP>
__global__ void __launch_bounds__(loss_threads) loss_kernel(loss_args p) {
  T *x = (T *)p.logits + blockIdx.x * p.width;
  int64_t target = p.targets[blockIdx.x];
  if (target == -1) {
    if (p.with_grad) clear_row<T, N>(x, p.width);
    if (threadIdx.x == 0) {
      p.values[blockIdx.x] = 0.0;
      if (p.row_loss != nullptr) p.row_loss[blockIdx.x] = 0.0f;
    }
    return;
  }
  cuda_pack<T, N> kept[KEEP ? loss_kept : 1];
  online_sum<T> sum;
  float v[N];
  auto take = [&](cuda_pack<T, N> &pack, int64_t c) {
    pack.load(x + c);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = to_float(pack.v[i]);
    sum.add(v);
  };
  if constexpr (KEEP) {
#pragma unroll
    for (int g = 0; g < loss_kept; g++) {
      int64_t c = (g * loss_threads + (int64_t)threadIdx.x) * N;
      if (c < p.width) take(kept[g], c);
    }
  } else {
    for (int64_t c = threadIdx.x * N; c < p.width; c += loss_threads * N) take(kept[0], c);
  }
  sum.combine(); /* ends in a barrier: what follows may overwrite the row */
  /* a target outside the vocabulary (the loader admits none) makes the loss and gradient NaN */
  bool inside = target >= 0 && target < p.width;
  if (threadIdx.x == 0) {
    double value = inside ? log((double)sum.sum) + ((double)sum.most - (double)to_float(x[target]))
                          : (double)NAN;
    p.values[blockIdx.x] = value;
    if (p.row_loss != nullptr) p.row_loss[blockIdx.x] = (float)value;
  }
  if (!p.with_grad) return;
  __syncthreads(); /* x[target] has been read */
  float factor = inside ? p.scale / sum.sum : NAN;
  if constexpr (KEEP) {
#pragma unroll
    for (int g = 0; g < loss_kept; g++) {
      int64_t c = (g * loss_threads + (int64_t)threadIdx.x) * N;
      if (c >= p.width) continue;
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = to_float(kept[g].v[i]);
      write_gradient<T, N>(x, c, v, sum.most, factor, target, p.scale);
    }
  } else {
    for (int64_t c = threadIdx.x * N; c < p.width; c += loss_threads * N) {
      load<T, N>(v, x + c);
      write_gradient<T, N>(x, c, v, sum.most, factor, target, p.scale);
    }
  }
}

/* loss[0] += sum of values, loss[1] += targets that count, in a fixed order. */
__global__ void add_loss_kernel(const double *values, const int32_t *targets, int64_t rows,
                                double *loss) {
  double sum = 0, counted = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    sum += values[i];
    counted += targets[i] == -1 ? 0.0 : 1.0;
  }
  sum = block_sum(sum);
  counted = block_sum(counted);
  if (threadIdx.x != 0) return;
  loss[0] += sum;
  loss[1] += counted;
}

moe_status moe_cuda_cross_entropy(moe_device *dev, moe_tensor logits, moe_tensor targets,
                                  float scale, int with_grad, moe_tensor loss,
                                  moe_tensor row_loss) {
  cuda_state *s = cuda_of(dev);
  int64_t rows = logits.shape[0], width = logits.shape[1], at_once = s->partial_bytes / 8;
  for (int64_t row = 0; row < rows; row += at_once) { /* one round: 2 million rows fit */
    int64_t count = rows - row < at_once ? rows - row : at_once;
    loss_args p = {(char *)logits.data + row * width * moe_dtype_size(logits.dtype),
                   cuda_data<int32_t>(targets) + row,
                   width,
                   scale,
                   with_grad,
                   (double *)s->partial,
                   moe_tensor_present(row_loss) ? cuda_data<float>(row_loss) + row : nullptr};
    MOE_TRY(cuda_act(logits.dtype, [&](auto act) {
      using T = decltype(act);
      return cuda_width(
          width,
          [&](auto w) {
            constexpr int N = decltype(w)::value;
            if (N > 1 && width <= (int64_t)loss_threads * loss_kept * N)
              loss_kernel<T, N, true><<<(unsigned)count, loss_threads, 0, s->stream>>>(p);
            else
              loss_kernel<T, N, false><<<(unsigned)count, loss_threads, 0, s->stream>>>(p);
            CUDA_LAUNCHED(dev);
            return MOE_OK;
          },
          (char *)p.logits);
    }));
    add_loss_kernel<<<1, 1024, 0, s->stream>>>(p.values, p.targets, count, cuda_data<double>(loss));
    CUDA_LAUNCHED(dev);
  }
  return MOE_OK;
}
