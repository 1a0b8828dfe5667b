/* Normal draws where the weights live: the host's bits (core/base/normal.h), eight per thread and
 * step from two blocks of Philox. CMake compiles this file with -fmad=false. */
#include "core/base/normal.h"
#include "kernels/cuda/common.cuh"

struct normal_stream {
  uint64_t seed, stream;
  double std;
};

/* Draws [index, index + N): N is 1 or a multiple of 4, and then so is index. */
template <typename T, int N>
__device__ __forceinline__ void draw(const normal_stream &s, int64_t index, T *out) {
  float v[N];
  if constexpr (N == 1) {
    moe_philox_block b = moe_philox_draw(s.seed, (uint64_t)index / 4, s.stream);
    bool second = index & 2;
    float even, odd;
    moe_normal_pair(second ? b.word[2] : b.word[0], second ? b.word[3] : b.word[1], s.std, &even,
                    &odd);
    v[0] = index & 1 ? odd : even;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      moe_philox_block b = moe_philox_draw(s.seed, (uint64_t)(index + i) / 4, s.stream);
      moe_normal_pair(b.word[0], b.word[1], s.std, &v[i], &v[i + 1]);
      moe_normal_pair(b.word[2], b.word[3], s.std, &v[i + 2], &v[i + 3]);
    }
  }
  store<T, N>(out, v);
}

template <typename T, int N>
__global__ void draw_kernel(normal_stream s, int64_t begin, T *out, int64_t n) {
  stride<N>(
      n, [=](int64_t i) { draw<T, N>(s, begin + i, out + i); },
      [=](int64_t i) { draw<T, 1>(s, begin + i, out + i); });
}

moe_status moe_cuda_draw_normal(moe_device *dev, uint64_t seed, uint64_t stream, int64_t begin,
                                float std, moe_tensor out) {
  int64_t n = moe_tensor_count(out);
  normal_stream s = {seed, stream, (double)std};
  if (n == 0) return MOE_OK;
  auto launch = [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        begin,
        [&](auto width) {
          constexpr int N = decltype(width)::value;
          draw_kernel<T, N><<<cuda_blocks(dev, div_up(n, N), 256), 256, 0, cuda_of(dev)->stream>>>(
              s, begin, cuda_data<T>(out), n);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)out.data);
  };
  return out.dtype == MOE_LOW16 ? launch(low16{}) : cuda_act(out.dtype, launch);
}
