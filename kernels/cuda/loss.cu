/* Cross-entropy and its gradient, in place of the logits: one block per row.
 *
 *     -log p(target) = log(1 + sum_{j != target} exp(x_j - x_target))
 *
 * The target stays out of the sum, which keeps its digits when the target is nearly certain. Up to
 * 32768 elements of a row wait in registers between the sum and the gradient, so it is read once;
 * of longer rows maximum and sum are found together (online), and they are read again. Source of
 * the online sum: Milakov and Gimelshein 2018, arXiv:1805.02867. */
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

/* Powers relative to a base: exp(x - base) for f32 results. Half precision rounds far coarser than
 * the hardware's own 2^x: there the base is log2_e times a logit, and exp is 2^(log2_e x - base),
 * one multiply-add before it. */
constexpr float log2_e = 1.44269504f;

template <typename T> __device__ __forceinline__ float base_of(float x) {
  if constexpr (sizeof(T) == 4) return x;
  return __fmul_rn(x, log2_e); /* never fused with what follows: a base is one number */
}
template <typename T> __device__ __forceinline__ double logit_of(float base) {
  return sizeof(T) == 4 ? (double)base : (double)base / (double)log2_e;
}
template <typename T> __device__ __forceinline__ float exp_over(float x, float base) {
  if constexpr (sizeof(T) == 4) return expf(x - base);
  return exp2_fast(fmaf(x, log2_e, -base));
}
/* What turns a sum over one base into the sum over another. */
template <typename T> __device__ __forceinline__ float rebase(float from, float to) {
  if constexpr (sizeof(T) == 4) return expf(from - to);
  return exp2_fast(from - to);
}

template <typename T> struct pair_of;
template <> struct pair_of<__nv_bfloat16> { using type = __nv_bfloat162; };
template <> struct pair_of<__half> { using type = __half2; };

/* The largest of a pack, NaN if there is one. */
template <typename T, int N> __device__ __forceinline__ float largest(const cuda_pack<T, N> &pack) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    using pair = typename pair_of<T>::type;
    const pair *v = reinterpret_cast<const pair *>(pack.v);
    pair top = v[0];
#pragma unroll
    for (int i = 1; i < N / 2; i++) top = __hmax2_nan(top, v[i]);
    return to_float(__hmax_nan(top.x, top.y));
  } else {
    float top = to_float(pack.v[0]);
#pragma unroll
    for (int i = 1; i < N; i++) top = op_max{}(top, to_float(pack.v[i]));
    return top;
  }
}

/* Element `at` of a pack, if it has one, shall not count. */
template <typename T, int N>
__device__ __forceinline__ void hide(cuda_pack<T, N> &pack, int64_t at) {
  if (at < 0 || at >= N) return;
#pragma unroll
  for (int i = 0; i < N; i++) pack.v[i] = i == (int)at ? from_float<T>(-INFINITY) : pack.v[i];
}

/* sum_j exp_over(x_j, base) over what was added so far; the base only grows. */
template <typename T> struct online_sum {
  float base = -INFINITY, sum = 0;
  __device__ __forceinline__ void raise(float x) {
    float top = op_max{}(base, base_of<T>(x));
    if (top == base) return;
    sum *= rebase<T>(base, top);
    base = top;
  }
  /* After raise(largest(pack)). */
  template <int N> __device__ __forceinline__ void add(const cuda_pack<T, N> &pack) {
    if (base == -INFINITY) return;
#pragma unroll
    for (int i = 0; i < N; i++) sum += exp_over<T>(to_float(pack.v[i]), base);
  }
  /* Every thread's together. */
  __device__ __forceinline__ void combine() {
    float top = block_reduce(base, op_max{}, -INFINITY);
    sum = block_sum(sum > 0.0f || sum != sum ? sum * rebase<T>(base, top) : 0.0f);
    base = top;
  }
};

/* -log p of the target's logit x beside the others' sum. */
template <typename T> __device__ double loss_of(const online_sum<T> &others, float x) {
  double above = (double)x - logit_of<T>(others.base), sum = (double)others.sum;
  if (above > 0) return log1p(sum * exp(-above)) + (double)(x - x); /* an infinite x gives NaN */
  return log(sum + exp(above)) - above;
}

template <typename T, int N> __device__ __forceinline__ void clear_row(T *x, int64_t width) {
  float zero[N] = {};
  for (int64_t c = threadIdx.x * N; c < width; c += loss_threads * N) store<T, N>(x + c, zero);
}

/* Half precision: two blocks at a time, so that one computes while the other moves its row. */
template <typename T, int N, bool KEEP>
__global__ void __launch_bounds__(loss_threads, sizeof(T) == 2 ? 2 : 1) loss_kernel(loss_args p) {
  constexpr int span = loss_threads * N;
  T *x = (T *)p.logits + blockIdx.x * p.width;
  int64_t target = p.targets[blockIdx.x], first = threadIdx.x * N;
  if (target == -1) {
    if (p.with_grad) clear_row<T, N>(x, p.width);
    if (threadIdx.x == 0) {
      p.values[blockIdx.x] = 0.0;
      if (p.row_loss != nullptr) p.row_loss[blockIdx.x] = 0.0f;
    }
    return;
  }
  /* a target outside the vocabulary (the loader admits none) makes the loss and gradient NaN */
  bool inside = target >= 0 && target < p.width;
  float hit = inside ? to_float(x[target]) : NAN;
  cuda_pack<T, N> kept[KEEP ? loss_kept : 1];
  online_sum<T> others;
  if constexpr (KEEP) {
    float top = -INFINITY;
#pragma unroll
    for (int g = 0; g < loss_kept; g++)
      if (first + g * span < p.width) kept[g].load(x + first + g * span);
#pragma unroll
    for (int g = 0; g < loss_kept; g++) {
      if (first + g * span >= p.width) continue;
      hide(kept[g], target - first - g * span);
      top = op_max{}(top, largest(kept[g]));
    }
    others.raise(top);
#pragma unroll
    for (int g = 0; g < loss_kept; g++)
      if (first + g * span < p.width) others.add(kept[g]);
  } else {
    for (int64_t c = first; c < p.width; c += span) {
      kept[0].load(x + c);
      hide(kept[0], target - c);
      others.raise(largest(kept[0]));
      others.add(kept[0]);
    }
  }
  others.combine(); /* ends in a barrier: what follows may overwrite the row */
  if (p.with_grad) {
    float base = op_max{}(others.base, base_of<T>(hit));
    float rest = others.sum * rebase<T>(others.base, base);
    float factor = p.scale / (rest + exp_over<T>(hit, base));
    auto write = [&](const cuda_pack<T, N> &pack, int64_t c) {
      float v[N];
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = factor * exp_over<T>(to_float(pack.v[i]), base);
      store<T, N>(x + c, v);
    };
    if constexpr (KEEP) {
#pragma unroll
      for (int g = 0; g < loss_kept; g++)
        if (first + g * span < p.width) write(kept[g], first + g * span);
    } else {
      for (int64_t c = first; c < p.width; c += span) {
        kept[0].load(x + c);
        write(kept[0], c);
      }
    }
    /* the same thread as wrote around it; p - 1 is what the others have */
    if (inside && target / N % loss_threads == threadIdx.x)
      x[target] = from_float<T>(-factor * rest);
  }
  if (threadIdx.x != 0) return;
  double value = loss_of(others, hit);
  p.values[blockIdx.x] = value;
  if (p.row_loss != nullptr) p.row_loss[blockIdx.x] = (float)value;
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
            constexpr int keeps = N > 1 ? loss_threads * loss_kept * N : 0;
            auto kernel = width <= keeps ? loss_kernel<T, N, (N > 1)> : loss_kernel<T, N, false>;
            kernel<<<(unsigned)count, loss_threads, 0, s->stream>>>(p);
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
