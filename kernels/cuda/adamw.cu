/* AdamW, and the factor that clips gradients: one pass over all parameters, bound by memory (18 to
 * 30 bytes per parameter). The factor stays on the device, so no step waits for the host. */
#include <cmath>

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

/* The update's factors that are the same in every step: rest1 = 1 - beta1, and the root of that of
 * beta2, which is squared with the gradient. */
struct adamw_factors {
  float beta1, rest1, beta2, root_rest2, decay;
};

static adamw_factors factors_of(moe_adamw_args a) {
  return {(float)a.beta1, (float)(1.0 - a.beta1), (float)a.beta2, (float)std::sqrt(1.0 - a.beta2),
          (float)a.weight_decay};
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

/* Those of this step, which a recorded launch (device.h) must read from memory. Both rests are for
 * gradients before scaling. */
struct adamw_step {
  float scale, rest1, root_rest2, rate, eps, decay;
  int64_t number;

  __device__ __forceinline__ explicit adamw_step(const adamw_args &p)
      : scale(*p.scale), rest1(p.f.rest1 * scale), root_rest2(p.f.root_rest2 * scale),
        rate((float)p.now[MOE_ADAMW_RATE]), eps((float)p.now[MOE_ADAMW_EPS]),
        decay(p.f.decay * (float)p.now[MOE_ADAMW_DECAY]), number((int64_t)p.now[MOE_ADAMW_STEP]) {}
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
    uint32_t pair[(N * sizeof(T) + 3) / 4]; /* of elements of 2 bytes */
  };
  __device__ __forceinline__ adamw_pack() {}
  __device__ __forceinline__ void read(const void *from, int64_t i) {
    whole = __ldcs(reinterpret_cast<const word *>(static_cast<const T *>(from) + i));
  }
  __device__ __forceinline__ void write(void *to, int64_t i) const {
    __stcs(reinterpret_cast<word *>(static_cast<T *>(to) + i), whole);
  }
};

/* Element j, at a constant j: of two of bf16 in a register each takes one instruction. */
template <typename T, int N>
__device__ __forceinline__ float value(const adamw_pack<T, N> &p, int j) {
  if constexpr (sizeof(T) == 2 && N > 1)
    return __uint_as_float(j % 2 ? p.pair[j / 2] & 0xffff0000u : p.pair[j / 2] << 16);
  else
    return to_float(p.v[j]);
}

/* The upper, and the lower, halves of two words in one. */
__device__ __forceinline__ uint32_t upper_halves(uint32_t even, uint32_t odd) {
  return __byte_perm(even, odd, 0x7632);
}
__device__ __forceinline__ uint32_t lower_halves(uint32_t even, uint32_t odd) {
  return __byte_perm(even, odd, 0x5410);
}

/* Two floats rounded to bf16 in one instruction. */
__device__ __forceinline__ uint32_t bf16_pair(float even, float odd) {
  __nv_bfloat162 both = __floats2bfloat162_rn(even, odd);
  return *reinterpret_cast<uint32_t *>(&both);
}

/* N masters beside weights of type W, if there are any: whole, and with bf16 weights in halves. */
template <typename W, int N> struct adamw_masters {
  adamw_pack<float, N> x;
  __device__ __forceinline__ void read(const adamw_args &p, int64_t i) {
    x.read(p.master, i);
  }
  __device__ __forceinline__ float get(int j) const {
    return x.v[j];
  }
  __device__ __forceinline__ void write(const adamw_args &p, int64_t i, const float (&now)[N]) {
    adamw_pack<W, N> rounded;
#pragma unroll
    for (int j = 0; j < N; j++) {
      x.v[j] = now[j];
      rounded.v[j] = from_float<W>(now[j]);
    }
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
  __device__ __forceinline__ float get(int j) const { /* moe_halves_join */
    if constexpr (N == 1) {
      return __uint_as_float(moe_halves_join(w.v[0], low.v[0]));
    } else {
      int rest = j % 2 ? (int)low.pair[j / 2] >> 16 : (short)low.pair[j / 2];
      return __uint_as_float(__float_as_uint(value(w, j)) + (uint32_t)rest);
    }
  }
  __device__ __forceinline__ void write(const adamw_args &p, int64_t i, const float (&now)[N]) {
    if constexpr (N == 1) {
      w.v[0] = __bfloat16_as_ushort(__float2bfloat16_rn(now[0]));
      low.v[0] = moe_halves_low(__float_as_uint(now[0]));
    } else {
      uint32_t least = 0; /* of either half, signed */
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        w.pair[j / 2] = bf16_pair(now[j], now[j + 1]);
        low.pair[j / 2] = lower_halves(__float_as_uint(now[j]), __float_as_uint(now[j + 1]));
        least = __vimin3_s16x2(least, low.pair[j / 2], low.pair[j / 2]);
      }
      if ((least & 0xffffu) == 0x8000u || least >> 16 == 0x8000u) /* a tie, which is rare */
#pragma unroll
        for (int j = 0; j < N; j++) low.v[j] = moe_halves_low(__float_as_uint(now[j]));
    }
    w.write(p.weight, i);
    low.write(p.master, i);
  }
};

/* moe_rounding_bf16, with the result in the upper half. The only NaN that arithmetic makes is
 * 0x7fffffff, and adding to it must not make it zero. */
__device__ __forceinline__ uint32_t rounded_moment(float value, uint32_t random) {
  return (uint32_t)(min(__float_as_int(value), 0x7fff0000) + (int)random);
}

/* ---- the update ----------------------------------------------------------------------------- */

/* One instruction: a second moment below 2^-126 counts as zero. */
__device__ __forceinline__ float root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

  /* Fused operations are spelt out: the compiler would choose for each N anew, and bits must not
   * depend on where a call begins. */
  __device__ __forceinline__ void update(const adamw_args &p, const adamw_step &s, int64_t i) {
    float first[N], second[N], x[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      float gradient = value(g, j), part = s.root_rest2 * gradient;
      first[j] = fmaf(p.f.beta1, value(m, j), s.rest1 * gradient);
      second[j] = fmaf(p.f.beta2, value(v, j), part * part);
      float step = first[j] * inverse_fast(root(second[j]) + s.eps);
      x[j] = fmaf(-s.rate, fmaf(s.decay, w.get(j), step), w.get(j));
    }
    w.write(p, i, x);
    store_moments(first, second, s, p.first + i);
    m.write(p.m, i);
    v.write(p.v, i);
  }

  /* With N = 4 the elements, of which the first is number `number`, are one group of
   * moe_rounding_draw. */
  __device__ __forceinline__ void store_moments(const float (&first)[N], const float (&second)[N],
                                                const adamw_step &s, int64_t number) {
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int j = 0; j < N; j++) m.v[j] = first[j], v.v[j] = second[j];
    } else {
      moe_philox_block draw = moe_rounding_draw(s.number, number >> 2);
      uint32_t a[N], b[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        uint32_t random = word_of(draw, N == 4 ? j : (int)(number & 3));
        a[j] = rounded_moment(first[j], random & 0xffffu);
        b[j] = rounded_moment(second[j], random >> 16);
      }
      if constexpr (N == 1) {
        m.v[0] = __ushort_as_bfloat16((unsigned short)(a[0] >> 16));
        v.v[0] = __ushort_as_bfloat16((unsigned short)(b[0] >> 16));
      } else {
#pragma unroll
        for (int j = 0; j < N; j += 2) {
          m.pair[j / 2] = upper_halves(a[j], a[j + 1]);
          v.pair[j / 2] = upper_halves(b[j], b[j + 1]);
        }
      }
    }
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
    for (int i = 0; i < places; i++) x[i].update(p, step, at + i * apart);
    return;
  }
  const adamw_step step(p);
  if (step.is_skipped()) return;
  for (int64_t part = at; part < p.n && part < at + adamw_tile<S, N>; part += apart) /* the last */
    for (int64_t i = part; i < part + N && i < p.n; i++) {
      adamw_elements<G, S, W, 1> one;
      one.read(p, i);
      one.update(p, step, i);
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
