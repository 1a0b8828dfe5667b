/* Sorting token-expert pairs by expert, moving rows and gates into that order, and gates'
 * gradients.
 *
 * The plan is a stable counting sort in two kernels, without the host: each warp counts a chunk of
 * consecutive pairs by expert, and the block that ends last turns the counts into where each
 * chunk's pairs of each expert begin; then each warp places its chunk, 32 pairs at a time, the
 * pairs of one expert in lane order (match_any). The moves read the plan one way each, so every
 * output element has one writer and sums have a fixed order. */
#include "kernels/cuda/launch.cuh"

/* ---- plan ---------------------------------------------------------------------------------- */

struct sort_args {
  const int32_t *experts; /* [pairs] */
  int64_t pairs, chunk, chunks, room;
  int count; /* experts here: e */
  int pad;
  int32_t *begin;  /* [chunks + 1, e]: counts, then sums over the chunks before */
  unsigned *ended; /* of the blocks that count */
  int32_t *offsets, *pair, *slot;
};

constexpr int sort_most_warps = 16, sort_ahead = 8; /* of a block; numbers that a lane asks for */

/* A warp's chunk: put(i, at) for each pair i of expert j, at = cursor[j] + how many came before. */
template <typename F>
__device__ __forceinline__ void sort_chunk(const sort_args &p, int64_t chunk, int32_t *cursor,
                                           F put) {
  int lane = (int)threadIdx.x % 32;
  int64_t end = min((chunk + 1) * p.chunk, p.pairs);
  for (int64_t base = chunk * p.chunk; base < end; base += 32 * sort_ahead) {
    int ahead[sort_ahead];
#pragma unroll
    for (int u = 0; u < sort_ahead; u++)
      ahead[u] = base + 32 * u + lane < end ? p.experts[base + 32 * u + lane] : -1;
#pragma unroll
    for (int u = 0; u < sort_ahead; u++) {
      int expert = ahead[u] >= 0 && ahead[u] < p.count ? ahead[u] : -1;
      unsigned same = __match_any_sync(full_warp, expert);
      int rank = __popc(same & ((1u << lane) - 1));
      int32_t at = expert >= 0 ? cursor[expert] + rank : -1;
      __syncwarp();
      if (expert >= 0 && rank == 0) cursor[expert] += __popc(same);
      __syncwarp();
      if (base + 32 * u + lane < end) put(base + 32 * u + lane, at);
    }
  }
}

/* By one block: where each expert's padded segment starts, and each chunk's part within it. */
static __device__ void sort_offsets(const sort_args &p, int32_t *segment) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  for (int j = warp; j < p.count; j += (int)blockDim.x / 32) {
    int32_t sum = 0; /* of the chunks so far: begin becomes exclusive sums, chunk by chunk */
    for (int64_t base = lane; base - lane < p.chunks; base += 32 * sort_ahead) {
      int32_t mine[sort_ahead];
#pragma unroll
      for (int u = 0; u < sort_ahead; u++)
        mine[u] = base + 32 * u < p.chunks ? __ldcg(p.begin + (base + 32 * u) * p.count + j) : 0;
#pragma unroll
      for (int u = 0; u < sort_ahead; u++) {
        int32_t upto = warp_scan(mine[u]);
        if (base + 32 * u < p.chunks) p.begin[(base + 32 * u) * p.count + j] = sum + upto - mine[u];
        sum += __shfl_sync(full_warp, upto, 31);
      }
    }
    if (lane == 0) p.begin[p.chunks * p.count + j] = sum;
    if (lane == 0) segment[j] = (sum + p.pad - 1) / p.pad * p.pad;
  }
  __syncthreads();
  int32_t base = 0;
  for (int first = 0; first < p.count; first += (int)blockDim.x) {
    int j = first + (int)threadIdx.x;
    int32_t rows = j < p.count ? segment[j] : 0, total;
    int32_t at = base + block_scan(rows, &total);
    if (j < p.count) p.offsets[j] = at;
    base += total;
  }
  if (threadIdx.x == 0) p.offsets[p.count] = base;
}

/* A warp per chunk. */
__global__ void sort_count_kernel(sort_args p) {
  extern __shared__ int32_t cursors[]; /* [warps, e] */
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  int32_t *cursor = cursors + warp * p.count;
  int64_t chunk = (int64_t)blockIdx.x * (blockDim.x / 32) + warp;
  launch_wait();
  launch_release();
  if (chunk < p.chunks) {
    for (int j = lane; j < p.count; j += 32) cursor[j] = 0;
    __syncwarp();
    sort_chunk(p, chunk, cursor, [](int64_t, int32_t) {});
    for (int j = lane; j < p.count; j += 32) p.begin[chunk * p.count + j] = cursor[j];
  }
  if (block_is_last(p.ended)) sort_offsets(p, cursors);
}

/* A warp per chunk; and what is no pair's, padding and what follows the last segment, by all. */
__global__ void sort_place_kernel(sort_args p) {
  extern __shared__ int32_t cursors[];
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  int32_t *cursor = cursors + warp * p.count;
  int64_t chunk = (int64_t)blockIdx.x * (blockDim.x / 32) + warp;
  launch_wait();
  launch_release();
  if (chunk < p.chunks) {
    for (int j = lane; j < p.count; j += 32)
      cursor[j] = p.offsets[j] + p.begin[chunk * p.count + j];
    __syncwarp();
    sort_chunk(p, chunk, cursor, [&](int64_t i, int32_t at) {
      p.slot[i] = at;
      if (at >= 0 && at < p.room) p.pair[at] = (int32_t)i;
    });
  }
  stride((int64_t)p.count * p.pad, [&](int64_t i) {
    int64_t j = i / p.pad, at = p.offsets[j] + p.begin[p.chunks * p.count + j] + i % p.pad;
    if (at < p.offsets[j + 1] && at < p.room) p.pair[at] = -1;
  });
  int64_t end = p.offsets[p.count];
  stride(p.room - end, [&](int64_t i) { p.pair[end + i] = -1; });
}

moe_status moe_cuda_permute_plan(moe_device *dev, moe_tensor experts, int64_t pad,
                                 moe_tensor offsets, moe_tensor pair, moe_tensor slot) {
  cuda_state *s = cuda_of(dev);
  sort_args p = {};
  p.experts = cuda_data<int32_t>(experts);
  p.pairs = moe_tensor_count(experts);
  p.room = pair.shape[0];
  p.count = (int)(offsets.shape[0] - 1);
  p.pad = (int)pad;
  p.begin = (int32_t *)s->partial;
  p.offsets = cuda_data<int32_t>(offsets);
  p.pair = cuda_data<int32_t>(pair);
  p.slot = cuda_data<int32_t>(slot);
  p.ended = s->ended;
  constexpr int64_t room = 47 << 10; /* of 48 KiB, with what else the kernels have */
  if (4 * p.count > room)
    return moe_fail(MOE_INVALID, "cuda: permute_plan: %d experts on one rank are more than %d",
                    p.count, (int)(room / 4));
  cuda_offsets_changed(dev, offsets.data, moe_tensor_bytes(offsets));
  /* 256 pairs a chunk, more where the chunks' counters would not fit */
  int64_t row = 4 * max(p.count, 1), fits = s->partial_bytes / row - 1;
  p.chunk = max(round_up(div_up(p.pairs, fits), 32), (int64_t)32 * sort_ahead);
  p.chunks = div_up(p.pairs, p.chunk);
  int warps = (int)min(room / row, (int64_t)sort_most_warps), shared = (int)row * warps;
  dim3 blocks((unsigned)max(div_up(p.chunks, warps), (int64_t)1));
  MOE_TRY(cuda_start(dev, sort_count_kernel, blocks, 32 * warps, shared, p));
  return cuda_start(dev, sort_place_kernel, blocks, 32 * warps, shared, p);
}

__global__ void window_kernel(const int32_t *offsets, int64_t count, int64_t begin, int64_t rows,
                              int32_t *out) {
  stride(count, [=](int64_t j) {
    int64_t at = offsets[j] - begin;
    out[j] = (int32_t)(at < 0 ? 0 : at < rows ? at : rows);
  });
}

moe_status moe_cuda_permute_window(moe_device *dev, moe_tensor offsets, int64_t begin, int64_t rows,
                                   moe_tensor out) {
  int64_t count = offsets.shape[0];
  if (count == 0) return MOE_OK;
  cuda_offsets_changed(dev, out.data, moe_tensor_bytes(out));
  window_kernel<<<cuda_blocks(dev, count, 128), 128, 0, cuda_of(dev)->stream>>>(
      cuda_data<int32_t>(offsets), count, begin, rows, cuda_data<int32_t>(out));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

__global__ void localize_kernel(int32_t *experts, float *gates, int64_t n, int64_t begin,
                                int64_t count) {
  stride(n, [=](int64_t i) {
    int64_t local = experts[i] - begin;
    bool mine = local >= 0 && local < count;
    experts[i] = mine ? (int32_t)local : -1;
    if (!mine) gates[i] = 0.0f;
  });
}

moe_status moe_cuda_localize_experts(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                     int64_t begin, int64_t count) {
  int64_t n = moe_tensor_count(experts);
  if (n == 0) return MOE_OK;
  localize_kernel<<<cuda_blocks(dev, n, 256), 256, 0, cuda_of(dev)->stream>>>(
      cuda_data<int32_t>(experts), cuda_data<float>(gates), n, begin, count);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* ---- rows: a warp per row, or for two ------------------------------------------------------ */

constexpr int row_warps = 8, gather_each = 2, gather_stripes = 16;

struct gather_args {
  const int32_t *pair;
  int64_t rows, width, stripe; /* rows of a stripe: a multiple of gather_each */
  int group, stripes;
};

/* The rows are in the order of experts, and within an expert in the order of tokens. Neighbouring
 * warps take rows from all over: two from each of the stripes. So the rows of a token are fetched
 * at about the same time, and from memory once. */
template <typename T, int N>
__global__ void gather_rows_kernel(const T *src, gather_args p, T *out) {
  launch_wait();
  launch_release();
  int64_t warp = (int64_t)blockIdx.x * row_warps + threadIdx.x / 32;
  int64_t begin = warp % p.stripes * p.stripe, end = min(begin + p.stripe, p.rows);
  int64_t first = begin + warp / p.stripes * gather_each;
  int32_t from[gather_each];
#pragma unroll
  for (int i = 0; i < gather_each; i++) from[i] = first + i < end ? p.pair[first + i] : -1;
#pragma unroll
  for (int i = 0; i < gather_each; i++)
    if (from[i] >= 0) from[i] /= p.group;
  out += first * p.width;
#pragma unroll 1
  for (int64_t c = threadIdx.x % 32 * N; c < p.width; c += 32 * N) {
    cuda_pack<T, N> v[gather_each];
#pragma unroll
    for (int i = 0; i < gather_each; i++) {
      if (from[i] >= 0) {
        v[i].load(src + from[i] * p.width + c);
      } else {
#pragma unroll
        for (int j = 0; j < N; j++) v[i].v[j] = from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < gather_each; i++)
      if (first + i < end) v[i].store(out + i * p.width + c);
  }
}

moe_status moe_cuda_gather_rows(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                                moe_tensor out) {
  static const bool in_order = cuda_plain("gather");
  int64_t rows = out.shape[0], width = out.shape[1];
  if (rows == 0 || width == 0) return MOE_OK;
  gather_args p = {cuda_data<int32_t>(pair),     rows, width, 0, (int)group,
                   in_order ? 1 : gather_stripes};
  p.stripe = round_up(div_up(rows, p.stripes), gather_each);
  return cuda_act(src.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          int64_t warps = p.stripes * p.stripe / gather_each;
          return cuda_start(dev, gather_rows_kernel<T, N>, dim3((unsigned)div_up(warps, row_warps)),
                            32 * row_warps, 0, cuda_data<T>(src), p, cuda_data<T>(out));
        },
        (char *)src.data, (char *)out.data);
  });
}

/* ---- gates --------------------------------------------------------------------------------- */

__global__ void gather_gates_kernel(const float *values, const int32_t *pair, int64_t n,
                                    float *out) {
  launch_wait();
  launch_release();
  stride(n, [=](int64_t i) { out[i] = pair[i] < 0 ? 0.0f : values[pair[i]]; });
}

moe_status moe_cuda_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair,
                                 moe_tensor out) {
  int64_t n = out.shape[0];
  if (n == 0) return MOE_OK;
  return cuda_start(dev, gather_gates_kernel, dim3(cuda_blocks(dev, n, 256)), 256, 0,
                    cuda_data<float>(values), cuda_data<int32_t>(pair), n, cuda_data<float>(out));
}

/* ---- their gradients: a warp per token ------------------------------------------------------- */

struct gates_args {
  const void *dy, *y;
  const int32_t *slot;
  const float *gates;
  float *dgates;
  int64_t rows, window, width;
  int k;
  const int32_t *pair; /* where rows are moved: [window]; padding is -1 */
  void *out;           /* [window, width] */
};

constexpr int gates_warps = 8, gates_each = 4;

/* Zeros where none of 32 pairs from `first` on is. */
template <typename T, int N>
__device__ __forceinline__ void clear_padding(const gates_args &p, int64_t first) {
  int lane = (int)threadIdx.x % 32;
  const float zero[N] = {};
  bool none = first + lane < p.window && p.pair[first + lane] < 0;
  for (unsigned left = __ballot_sync(full_warp, none); left != 0; left &= left - 1) {
    T *row = (T *)p.out + (first + __ffs((int)left) - 1) * p.width;
    for (int64_t c = lane * N; c < p.width; c += 32 * N) store<T, N>(row + c, zero);
  }
}

/* A row of dy meets gates_each rows of y at a time: as many loads are on their way. MOVE: and is
 * written where they are, by further warps zeros between. */
template <typename T, int N, bool MOVE> __global__ void gates_backward_kernel(gates_args p) {
  launch_wait();
  launch_release();
  int64_t row = (int64_t)blockIdx.x * gates_warps + threadIdx.x / 32;
  int lane = (int)threadIdx.x % 32;
  if (MOVE && row >= p.rows) clear_padding<T, N>(p, (row - p.rows) * 32);
  if (row >= p.rows) return;
  const T *dy = (const T *)p.dy + row * p.width;
  for (int first = 0; first < p.k; first += gates_each) {
    int32_t slot[gates_each];
    float dot[gates_each] = {};
#pragma unroll
    for (int i = 0; i < gates_each; i++) {
      slot[i] = first + i < p.k ? p.slot[row * p.k + first + i] : -1;
      if (slot[i] >= p.window) slot[i] = -1;
    }
    for (int64_t c = lane * N; c < p.width; c += 32 * N) {
      float l[N], r[gates_each][N] = {};
      load<T, N>(l, dy + c);
#pragma unroll
      for (int i = 0; i < gates_each; i++)
        if (slot[i] >= 0) load<T, N>(r[i], (const T *)p.y + slot[i] * p.width + c);
#pragma unroll
      for (int i = 0; i < gates_each; i++)
        if (MOVE && slot[i] >= 0) store<T, N>((T *)p.out + slot[i] * p.width + c, l);
#pragma unroll
      for (int i = 0; i < gates_each; i++)
#pragma unroll
        for (int j = 0; j < N; j++) dot[i] = fmaf(l[j], r[i][j], dot[i]);
    }
#pragma unroll
    for (int i = 0; i < gates_each; i++) {
      float sum = warp_sum(dot[i]);
      if (lane != i || first + i >= p.k) continue;
      float gate = p.gates[row * p.k + first + i];
      p.dgates[row * p.k + first + i] = slot[i] >= 0 && gate != 0 ? sum / gate : 0;
    }
  }
}

/* pair and out may be absent: then nothing is moved. */
static moe_status gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                                 moe_tensor gates, moe_tensor dgates, moe_tensor pair,
                                 moe_tensor out) {
  gates_args p = {dy.data,
                  y.data,
                  cuda_data<int32_t>(slot),
                  cuda_data<float>(gates),
                  cuda_data<float>(dgates),
                  dy.shape[0],
                  y.shape[0],
                  dy.shape[1],
                  (int)slot.shape[1],
                  cuda_data<int32_t>(pair),
                  out.data};
  bool moves = moe_tensor_present(out);
  int64_t warps = p.rows + (moves ? div_up(p.window, 32) : 0);
  if (warps == 0 || p.k == 0) return MOE_OK;
  return cuda_act(dy.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        p.width,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          auto kernel =
              moves ? gates_backward_kernel<T, N, true> : gates_backward_kernel<T, N, false>;
          return cuda_start(dev, kernel, dim3((unsigned)div_up(warps, gates_warps)),
                            32 * gates_warps, 0, p);
        },
        (char *)dy.data, (char *)y.data, (char *)out.data);
  });
}

moe_status moe_cuda_gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                                   moe_tensor gates, moe_tensor dgates) {
  return gates_backward(dev, dy, y, slot, gates, dgates, moe_tensor_none(), moe_tensor_none());
}

moe_status moe_cuda_gather_backward(moe_device *dev, moe_tensor dy, moe_tensor pair, moe_tensor y,
                                    moe_tensor slot, moe_tensor gates, moe_tensor out,
                                    moe_tensor dgates, bool *done) {
  static const bool apart = cuda_plain("joint");
  *done = !apart;
  return apart ? MOE_OK : gates_backward(dev, dy, y, slot, gates, dgates, pair, out);
}
