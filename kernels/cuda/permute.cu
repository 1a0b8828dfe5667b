/* Sorting token-expert pairs by expert, and moving rows into and out of that order.
 *
 * The plan is a stable counting sort in three kernels, without atomics and without the host: each
 * warp counts a chunk of consecutive pairs by expert; one block turns the counts into where each
 * chunk's pairs of each expert begin; each warp places its chunk, 32 pairs at a time, the pairs of
 * one expert in lane order (match_any). The moves read the plan one way each, so every output
 * element has one writer and sums have a fixed order. */
#include "kernels/cuda/launch.cuh"

/* ---- plan ---------------------------------------------------------------------------------- */

struct sort_args {
  const int32_t *experts; /* [pairs] */
  int64_t pairs, chunk, chunks, room;
  int count; /* experts here: e */
  int pad;
  int32_t *begin; /* [chunks, e]: counts, then sums over the chunks before */
  int32_t *offsets, *pair, *slot;
};

constexpr int sort_warps = 2;

/* One warp per chunk; `cursor` is its e counters. PLACE: write pair and slot, else count. */
template <bool PLACE> __global__ void sort_kernel(sort_args p) {
  extern __shared__ int32_t cursors[];
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  int32_t *cursor = cursors + warp * p.count;
  int64_t chunk = (int64_t)blockIdx.x * sort_warps + warp;
  if (chunk >= p.chunks) return;
  int32_t *begin = p.begin + chunk * p.count;
  for (int j = lane; j < p.count; j += 32) cursor[j] = PLACE ? p.offsets[j] + begin[j] : 0;
  __syncwarp();
  int64_t end = (chunk + 1) * p.chunk < p.pairs ? (chunk + 1) * p.chunk : p.pairs;
  for (int64_t base = chunk * p.chunk; base < end; base += 32) {
    int64_t i = base + lane;
    int expert = i < end ? p.experts[i] : -1;
    if (expert < 0 || expert >= p.count) expert = -1;
    unsigned same = __match_any_sync(full_warp, expert);
    int rank = __popc(same & ((1u << lane) - 1));
    int32_t at = expert >= 0 ? cursor[expert] + rank : -1;
    __syncwarp();
    if (expert >= 0 && rank == 0) cursor[expert] += __popc(same);
    __syncwarp();
    if constexpr (PLACE) {
      if (i < end) p.slot[i] = at;
      if (at >= 0 && at < p.room) p.pair[at] = (int32_t)i;
    }
  }
  if constexpr (!PLACE)
    for (int j = lane; j < p.count; j += 32) begin[j] = cursor[j];
}

/* One block: where each expert's padded segment starts, and each chunk's part within it. */
__global__ void __launch_bounds__(512) sort_offsets_kernel(sort_args p) {
  extern __shared__ int32_t segment[]; /* [e]: padded rows */
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  for (int j = warp; j < p.count; j += (int)blockDim.x / 32) {
    int32_t sum = 0; /* of the chunks so far: begin becomes exclusive sums, chunk by chunk */
    for (int64_t base = 0; base < p.chunks; base += 32) {
      int64_t chunk = base + lane;
      int32_t mine = chunk < p.chunks ? p.begin[chunk * p.count + j] : 0, upto = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        int32_t before = __shfl_up_sync(full_warp, upto, step);
        if (lane >= step) upto += before;
      }
      if (chunk < p.chunks) p.begin[chunk * p.count + j] = sum + upto - mine;
      sum += __shfl_sync(full_warp, upto, 31);
    }
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
  int64_t cursors = (int64_t)sort_warps * p.count * 4;
  if (cursors > 48 << 10)
    return moe_fail(MOE_INVALID, "cuda: permute_plan: %d experts on one rank are more than %d",
                    p.count, (48 << 10) / (sort_warps * 4));
  cuda_offsets_changed(dev, offsets.data, moe_tensor_bytes(offsets));
  /* 256 pairs a chunk, more where the chunks' counters would not fit */
  int64_t fits = s->partial_bytes / (4 * (p.count > 0 ? p.count : 1));
  int64_t least = round_up(div_up(p.pairs, fits), 32);
  p.chunk = least > 256 ? least : 256;
  p.chunks = div_up(p.pairs, p.chunk);
  unsigned blocks = (unsigned)div_up(p.chunks, sort_warps);
  if (p.room > 0)
    CUDA_TRY(dev, cudaMemsetAsync(p.pair, 0xff, (size_t)p.room * 4, s->stream)); /* all -1 */
  if (blocks > 0) sort_kernel<false><<<blocks, 32 * sort_warps, (size_t)cursors, s->stream>>>(p);
  CUDA_LAUNCHED(dev);
  sort_offsets_kernel<<<1, 512, (size_t)p.count * 4, s->stream>>>(p);
  CUDA_LAUNCHED(dev);
  if (blocks > 0) sort_kernel<true><<<blocks, 32 * sort_warps, (size_t)cursors, s->stream>>>(p);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
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
          gather_rows_kernel<T, N>
              <<<(unsigned)div_up(warps, row_warps), 32 * row_warps, 0, cuda_of(dev)->stream>>>(
                  cuda_data<T>(src), p, cuda_data<T>(out));
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)src.data, (char *)out.data);
  });
}

struct combine_args {
  const void *src;
  const int32_t *slot;
  void *out;
  int64_t begin, window, rows, k, width;
  int beta;
};

template <typename T, int N> __global__ void combine_rows_kernel(combine_args p) {
  int64_t row = (int64_t)blockIdx.x * row_warps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int32_t *slot = p.slot + row * p.k;
  T *y = (T *)p.out + row * p.width;
  for (int64_t c = threadIdx.x % 32 * N; c < p.width; c += 32 * N) {
    float sum[N] = {};
    if (p.beta) load<T, N>(sum, y + c);
#pragma unroll 4
    for (int64_t k = 0; k < p.k; k++) {
      int64_t at = slot[k] < 0 ? -1 : slot[k] - p.begin;
      if (at < 0 || at >= p.window) continue;
      float v[N];
      load<T, N>(v, (const T *)p.src + at * p.width + c);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += v[i];
    }
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
          combine_rows_kernel<T, N>
              <<<(unsigned)div_up(p.rows, row_warps), 32 * row_warps, 0, cuda_of(dev)->stream>>>(p);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)src.data, (char *)out.data);
  });
}

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

__global__ void gather_gates_kernel(const float *values, const int32_t *pair, int64_t n,
                                    float *out) {
  stride(n, [=](int64_t i) { out[i] = pair[i] < 0 ? 0.0f : values[pair[i]]; });
}

moe_status moe_cuda_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair,
                                 moe_tensor out) {
  int64_t n = out.shape[0];
  if (n == 0) return MOE_OK;
  gather_gates_kernel<<<cuda_blocks(dev, n, 256), 256, 0, cuda_of(dev)->stream>>>(
      cuda_data<float>(values), cuda_data<int32_t>(pair), n, cuda_data<float>(out));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

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
