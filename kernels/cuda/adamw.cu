/* AdamW, and the factor that clips gradients: one pass over all parameters, bound by memory (18 to
 * 30 bytes per parameter). The factor stays on the device, so no step waits for the host. */
#include "kernels/cuda/common.cuh"
#include "kernels/rounding.h"

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

/* The update's factors that are the same in every step; rest = 1 - beta. */
struct adamw_factors {
  float beta1, rest1, beta2, rest2, eps, decay;
};

static adamw_factors factors_of(moe_adamw_args a) {
  return {(float)a.beta1,         (float)(1.0 - a.beta1), (float)a.beta2,
          (float)(1.0 - a.beta2), (float)a.eps,           (float)a.weight_decay};
}

struct adamw_args {
  adamw_factors f;
  int64_t first; /* with the step: for the random bits of bf16 moments */
  const double *now;
  const float *scale;
  const void *grad;
  void *master, *m, *v, *weight; /* weight may be NULL */
  int64_t n;
};

/* Those of this step, which a recorded launch (device.h) must read from memory. */
struct adamw_step {
  float scale, correct1, correct2, lr;
  int64_t number;

  __device__ __forceinline__ explicit adamw_step(const adamw_args &p)
      : scale(*p.scale), correct1((float)p.now[MOE_ADAMW_CORRECT1]),
        correct2((float)p.now[MOE_ADAMW_CORRECT2]), lr((float)p.now[MOE_ADAMW_LR]),
        number((int64_t)p.now[MOE_ADAMW_STEP]) {}
  __device__ __forceinline__ bool is_skipped() const { /* a gradient was not finite */
    return scale < 0.0f;
  }
};

/* ---- N elements, read and written once: their lines need not stay in the caches ------------- */

/* As many bytes as N elements have: what one thread moves at once. */
template <int bytes> struct adamw_word;
template <> struct adamw_word<2> { using type = unsigned short; };
template <> struct adamw_word<4> { using type = unsigned; };
template <> struct adamw_word<8> { using type = uint2; };
template <> struct adamw_word<16> { using type = uint4; };

template <typename T, int N> struct adamw_pack {
  using word = typename adamw_word<N * sizeof(T)>::type;
  union {
    word whole;
    T v[N];
  };
  __device__ __forceinline__ adamw_pack() {}
  __device__ __forceinline__ void read(const void *from, int64_t i) {
    whole = __ldcs(reinterpret_cast<const word *>(static_cast<const T *>(from) + i));
  }
  __device__ __forceinline__ void write(void *to, int64_t i) const {
    __stcs(reinterpret_cast<word *>(static_cast<T *>(to) + i), whole);
  }
};

/* N masters beside weights of type W, if there are any: whole, and with bf16 weights in halves. */
template <typename W, int N> struct adamw_masters {
  adamw_pack<float, N> x;
  adamw_pack<W, N> rounded;
  __device__ __forceinline__ void read(const adamw_args &p, int64_t i) {
    x.read(p.master, i);
  }
  __device__ __forceinline__ float get(int j) const {
    return x.v[j];
  }
  __device__ __forceinline__ void set(int j, float value) {
    x.v[j] = value;
    rounded.v[j] = from_float<W>(value);
  }
  __device__ __forceinline__ void write(const adamw_args &p, int64_t i) const {
    x.write(p.master, i);
    if (p.weight != nullptr) rounded.write(p.weight, i);
  }
};

template <int N> struct adamw_masters<__nv_bfloat16, N> {
  adamw_pack<unsigned short, N> w, low;
  __device__ __forceinline__ void read(const adamw_args &p, int64_t i) {
    w.read(p.weight, i);
    low.read(p.master, i);
  }
  __device__ __forceinline__ float get(int j) const {
    return __uint_as_float(moe_halves_join(w.v[j], low.v[j]));
  }
  __device__ __forceinline__ void set(int j, float value) {
    w.v[j] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    low.v[j] = moe_halves_low(__float_as_uint(value));
  }
  __device__ __forceinline__ void write(const adamw_args &p, int64_t i) const {
    w.write(p.weight, i);
    low.write(p.master, i);
  }
};

template <typename S> __device__ __forceinline__ S store_moment(float value, uint32_t random) {
  if constexpr (sizeof(S) == 4)
    return value;
  else
    return __ushort_as_bfloat16(moe_rounding_bf16(__float_as_uint(value), random));
}

/* ---- the update ----------------------------------------------------------------------------- */

__device__ __forceinline__ float root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* N consecutive elements: gradients of type G, moments of type S, weights of type W. */
template <typename G, typename S, typename W, int N> struct adamw_elements {
  adamw_pack<G, N> g;
  adamw_masters<W, N> w;
  adamw_pack<S, N> m, v;

  __device__ __forceinline__ void read(const adamw_args &p, int64_t i) {
    g.read(p.grad, i);
    w.read(p, i);
    m.read(p.m, i);
    v.read(p.v, i);
  }

  /* With N = 4 the elements are one group of moe_rounding_draw. Fused operations are spelt out: the
   * compiler would choose for each N anew, and bits must not depend on where a call begins. */
  __device__ __forceinline__ void update(const adamw_args &p, const adamw_step &s, int64_t i) {
    moe_philox_block draw;
    if constexpr (sizeof(S) == 2) draw = moe_rounding_draw(s.number, (p.first + i) / 4);
#pragma unroll
    for (int j = 0; j < N; j++) {
      float gradient = to_float(g.v[j]) * s.scale;
      float first = fmaf(p.f.beta1, to_float(m.v[j]), p.f.rest1 * gradient);
      float second = fmaf(p.f.beta2, to_float(v.v[j]), p.f.rest2 * (gradient * gradient));
      float step = __fdividef(first * s.correct1, root(second * s.correct2) + p.f.eps);
      float x = w.get(j);
      w.set(j, fmaf(-s.lr, fmaf(p.f.decay, x, step), x));
      uint32_t random = 0;
      if constexpr (sizeof(S) == 2) random = word_of(draw, N == 4 ? j : (int)((p.first + i) % 4));
      m.v[j] = store_moment<S>(first, random & 0xffffu);
      v.v[j] = store_moment<S>(second, random >> 16);
    }
  }

  __device__ __forceinline__ void write(const adamw_args &p, int64_t i) const {
    w.write(p, i);
    m.write(p.m, i);
    v.write(p.v, i);
  }

  static __device__ __forceinline__ uint32_t word_of(const moe_philox_block &b, int k) {
    return k == 0 ? b.word[0] : k == 1 ? b.word[1] : k == 2 ? b.word[2] : b.word[3];
  }
};

enum { ADAMW_THREADS = 256, ADAMW_BLOCKS = 4 /* on a multiprocessor */ };

/* A block takes one tile: a thread N elements at each of PLACES places a block's width apart. It
 * asks for all of them before it works on any, so enough loads are under way; a warp's accesses lie
 * side by side. Blocks that come and go keep memory busier than blocks that stay and take turns. */
template <typename S> constexpr int adamw_places = sizeof(S) == 4 ? 1 : 2;
template <typename S, int N> constexpr int adamw_tile = ADAMW_THREADS *N *adamw_places<S>;

template <typename G, typename S, typename W, int N>
__global__ void __launch_bounds__(ADAMW_THREADS, ADAMW_BLOCKS) adamw_kernel(adamw_args p) {
  constexpr int places = adamw_places<S>, apart = ADAMW_THREADS * N;
  int64_t at = (int64_t)blockIdx.x * adamw_tile<S, N> + (int64_t)threadIdx.x * N;
  if (at + (places - 1) * apart + N <= p.n) {
    adamw_elements<G, S, W, N> x[places];
#pragma unroll
    for (int i = 0; i < places; i++) x[i].read(p, at + i * apart);
    const adamw_step step(p); /* asked for with the elements, not before them */
    if (step.is_skipped()) return;
#pragma unroll
    for (int i = 0; i < places; i++) {
      x[i].update(p, step, at + i * apart);
      x[i].write(p, at + i * apart);
    }
    return;
  }
  const adamw_step step(p);
  if (step.is_skipped()) return;
  for (int64_t part = at; part < p.n && part < at + adamw_tile<S, N>; part += apart) /* the last */
    for (int64_t i = part; i < part + N && i < p.n; i++) {
      adamw_elements<G, S, W, 1> one;
      one.read(p, i);
      one.update(p, step, i);
      one.write(p, i);
    }
}

template <typename F> static moe_status state_type(moe_dtype dtype, F f) {
  return dtype == MOE_F32 ? f(float{}) : f(__nv_bfloat16{});
}

moe_status moe_cuda_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                          moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                          moe_tensor weight) {
  int64_t n = moe_tensor_count(master);
  adamw_args p = {factors_of(args),
                  args.first,
                  cuda_data<double>(now),
                  cuda_data<float>(scale),
                  grad.data,
                  master.data,
                  m.data,
                  v.data,
                  weight.data,
                  n};
  if (n == 0) return MOE_OK;
  moe_dtype act = moe_tensor_present(weight) ? weight.dtype : MOE_F32;
  auto launch = [&](auto g, auto s, auto w, auto width) {
    constexpr int N = decltype(width)::value == 1 ? 1 : 4;
    adamw_kernel<decltype(g), decltype(s), decltype(w), N>
        <<<(unsigned)div_up(n, adamw_tile<decltype(s), N>), ADAMW_THREADS, 0,
           cuda_of(dev)->stream>>>(p);
    CUDA_LAUNCHED(dev);
    return MOE_OK;
  };
  int64_t whole_groups = args.first % 4 == 0 ? 0 : 1; /* else each element draws for itself */
  return state_type(grad.dtype, [&](auto g) {
    return state_type(m.dtype, [&](auto s) {
      return cuda_act(act, [&](auto w) {
        return cuda_width(
            whole_groups, [&](auto width) { return launch(g, s, w, width); }, (char *)grad.data,
            (char *)master.data, (char *)m.data, (char *)v.data, (char *)weight.data);
      });
    });
  });
}
