/* SwiGLU and its derivative for one element, shared by the plain and the fused expert kernels so
 * that forward and backward make the same `a`:   h = silu(g) u,   a = gate h. */
#ifndef MOE_KERNELS_CUDA_SWIGLU_CUH
#define MOE_KERNELS_CUDA_SWIGLU_CUH

#include "kernels/cuda/common.cuh"

/* 1 / (1 + exp(-x)): full precision for f32 results; two hardware approximations, about 1e-6
 * relative, for half precision. */
template <typename T> __device__ __forceinline__ float sigmoid_for(float x) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return inverse_fast(1.0f + exp2_fast(-1.44269504f * x)); /* log2 e */
}

template <typename T> __device__ __forceinline__ float swiglu(float gate, float g, float u) {
  return gate * (g * sigmoid_for<T>(g) * u);
}

/* From da: g, u become dg, du; returns a; adds da h to *dgate. */
template <typename T>
__device__ __forceinline__ float swiglu_backward(float gate, float da, float *g, float *u,
                                                 float *dgate) {
  float s = sigmoid_for<T>(*g), silu = *g * s, h = silu * *u, dh = gate * da;
  *dgate += da * h;
  float dg = dh * *u * fmaf(silu, 1.0f - s, s); /* silu' = s (1 + g (1 - s)) */
  *u = dh * silu;
  *g = dg;
  return gate * h;
}

/* g, u become the derivatives of a with respect to them; returns a. */
template <typename T>
__device__ __forceinline__ float swiglu_slopes(float gate, float *g, float *u) {
  float s = sigmoid_for<T>(*g), by_u = gate * (*g * s), a = by_u * *u;
  *g = *u * fmaf(s, gate - by_u, by_u); /* gate silu' = gate s + gate silu (1 - s) */
  *u = by_u;
  return a;
}

#endif
