/* Rotary position embedding, in place: a thread rotates N neighbouring pairs (i, i + d/2). */
#include <cmath>

#include "kernels/cuda/launch.cuh"

struct rope_args {
  void *qkv;
  const int32_t *positions;
  const float *table; /* [positions, d]: cosines, then sines */
  int64_t table_rows, row, rotated, d, groups;
  float direction;
};

/* A position outside the table (the planner sizes it for the longest sequence) gives NaN. */
template <typename T, int N> __global__ void rope_kernel(rope_args p) {
  int64_t half = p.d / 2, per_head = half / N, per_token = p.rotated * per_head;
  launch_wait();
  launch_release();
  stride(p.groups, [=](int64_t g) {
    int64_t t = g / per_token, head = g % per_token / per_head, i = g % per_head * N;
    T *x = (T *)p.qkv + t * p.row + head * p.d + i;
    int64_t position = p.positions[t];
    float a[N], b[N], cosine[N], sine[N];
    load<T, N>(a, x);
    load<T, N>(b, x + half);
    if (position >= 0 && position < p.table_rows) {
      load<float, N>(cosine, p.table + position * p.d + i);
      load<float, N>(sine, p.table + position * p.d + half + i);
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) cosine[j] = sine[j] = NAN;
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
      float s = p.direction * sine[j], first = a[j], second = b[j];
      a[j] = first * cosine[j] - second * s;
      b[j] = second * cosine[j] + first * s;
    }
    store<T, N>(x, a);
    store<T, N>(x + half, b);
  });
}

moe_status moe_cuda_rope(moe_device *dev, moe_tensor qkv, moe_tensor positions, moe_tensor table,
                         int64_t heads, int64_t kv_heads, int direction) {
  int64_t d = table.shape[1], rotated = heads + kv_heads;
  int64_t pairs = qkv.shape[0] * rotated * (d / 2);
  rope_args p = {qkv.data,
                 cuda_data<int32_t>(positions),
                 cuda_data<float>(table),
                 table.shape[0],
                 qkv.shape[1],
                 rotated,
                 d,
                 0,
                 (float)direction};
  if (pairs == 0) return MOE_OK;
  return cuda_act(qkv.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        d / 2,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          p.groups = pairs / N;
          constexpr int threads = 256;
          return cuda_start(dev, rope_kernel<T, N>, dim3(cuda_blocks(dev, p.groups, threads)),
                            threads, 0, p);
        },
        (char *)qkv.data, (char *)table.data);
  });
}
