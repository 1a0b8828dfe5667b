/* AdamW, and the factor that clips gradients: one pass over all parameters, bound by memory (26 to
 * 30 bytes per parameter). The factor stays on the device, so no step waits for the host. */
#include <cmath>

#include "kernels/cuda/common.cuh"

__global__ void clip_scale_kernel(const double *sum_squares, double max_norm, double unscale,
                                  float *scale) {
  double squares = *sum_squares, norm = sqrt(squares) * unscale;
  double factor = max_norm > 0.0 && norm > max_norm ? max_norm / norm : 1.0;
  *scale = isfinite(squares) ? (float)(unscale * factor) : -1.0f;
}

moe_status moe_cuda_clip_scale(moe_device *dev, moe_tensor sum_squares, double max_norm,
                               double unscale, moe_tensor scale) {
  clip_scale_kernel<<<1, 1, 0, cuda_of(dev)->stream>>>(cuda_data<double>(sum_squares), max_norm,
                                                       unscale, cuda_data<float>(scale));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* The update's factors, worked out in f64 once per call; rest = 1 - beta, correct = 1 / (1 -
 * beta^step). */
struct adamw_factors {
  float beta1, rest1, beta2, rest2, correct1, correct2, lr, eps, decay;
};

static adamw_factors factors_of(moe_adamw_args a) {
  double steps = (double)a.step;
  return {(float)a.beta1,
          (float)(1.0 - a.beta1),
          (float)a.beta2,
          (float)(1.0 - a.beta2),
          (float)(1.0 / (1.0 - std::pow(a.beta1, steps))),
          (float)(1.0 / (1.0 - std::pow(a.beta2, steps))),
          (float)a.lr,
          (float)a.eps,
          (float)a.weight_decay};
}

struct adamw_args {
  adamw_factors f;
  const float *grad, *scale;
  float *master, *m, *v;
  void *weight; /* may be NULL */
  int64_t n;
};

template <typename W, int N>
__device__ __forceinline__ void adamw_update(const adamw_args &p, float scale, int64_t i) {
  float g[N], w[N], m[N], v[N];
  load<float, N>(g, p.grad + i);
  load<float, N>(w, p.master + i);
  load<float, N>(m, p.m + i);
  load<float, N>(v, p.v + i);
#pragma unroll
  for (int j = 0; j < N; j++) {
    float gradient = g[j] * scale;
    m[j] = p.f.beta1 * m[j] + p.f.rest1 * gradient;
    v[j] = p.f.beta2 * v[j] + p.f.rest2 * (gradient * gradient);
    float step = m[j] * p.f.correct1 / (sqrtf(v[j] * p.f.correct2) + p.f.eps);
    w[j] -= p.f.lr * (step + p.f.decay * w[j]);
  }
  store<float, N>(p.master + i, w);
  store<float, N>(p.m + i, m);
  store<float, N>(p.v + i, v);
  if (p.weight != nullptr) store<W, N>((W *)p.weight + i, w);
}

template <typename W, int N> __global__ void adamw_kernel(adamw_args p) {
  float scale = *p.scale;
  if (scale < 0.0f) return; /* a non-finite step is skipped */
  stride<N>(
      p.n, [&](int64_t i) { adamw_update<W, N>(p, scale, i); },
      [&](int64_t i) { adamw_update<W, 1>(p, scale, i); });
}

moe_status moe_cuda_adamw(moe_device *dev, moe_adamw_args args, moe_tensor grad, moe_tensor scale,
                          moe_tensor master, moe_tensor m, moe_tensor v, moe_tensor weight) {
  int64_t n = moe_tensor_count(master);
  adamw_args p = {factors_of(args),
                  cuda_data<float>(grad),
                  cuda_data<float>(scale),
                  cuda_data<float>(master),
                  cuda_data<float>(m),
                  cuda_data<float>(v),
                  weight.data,
                  n};
  if (n == 0) return MOE_OK;
  return cuda_act(moe_tensor_present(weight) ? weight.dtype : MOE_F32, [&](auto act) {
    using W = decltype(act);
    return cuda_width(
        0,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          adamw_kernel<W, N>
              <<<cuda_blocks(dev, div_up(n, N), 256), 256, 0, cuda_of(dev)->stream>>>(p);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)grad.data, (char *)master.data, (char *)m.data, (char *)v.data,
        (char *)weight.data);
  });
}
