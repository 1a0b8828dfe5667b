/* The experts of a few tokens, for generation. Three kernels, no sorting, no host:
 *
 *   up       a block per 8 columns of one expert's hidden layer: the 8 rows of W1 and of W3 are the
 *            two halves of a tile of 16, so gate and up meet in one lane (skinny.cuh)
 *   down     a block per 16 rows of W2, one expert and a slice of F: partial sums, a row per pair
 *   combine  adds the slices of each choice, which makes its term, and the terms of each token
 *
 * A term's bits depend on nothing but its token, its expert and the sizes of the call: neither on
 * what else its expert has to do nor on which other experts are on this GPU. So terms that several
 * GPUs made give the sums that one would have made.
 *
 * A block finds the pairs of its expert by looking through all of them (128 for 32 tokens); up to
 * 32 pairs share one pass over the weights. With fewer pairs than experts, blocks are numbered by
 * pairs and an expert's first pair speaks for it, so no block looks for work in vain.
 *
 * Without the tensor cores, for float32 and for odd sizes a warp takes one row of weights and sums
 * in float32 FMA. The reading of weights is the cost in all of them. */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/skinny.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace {

/* A pair is a token and one of its choices, number token * K + k. */
struct decode_args {
  const void *x, *w13, *w2;
  const int32_t *experts; /* [T, K] */
  const float *gates;     /* [T, K] */
  void *hidden, *out;
  float *partial;                  /* [slices, pairs of this pass, D] */
  int64_t begin, end;              /* pairs of this pass */
  int k, first, count, width, ffn; /* K, the first expert here, e, D, F */
  int slices, chunks;              /* of F: chunks in all, in `slices` equal parts */
  bool by_pair;                    /* blockIdx.y numbers pairs, else experts */
  bool apart;                      /* out is to hold the terms, f32 [T K, D] */
};

/* A pair's expert, counted from the first here. Kernels read it ahead of launch_wait, where only
 * the L2 cache is to be trusted. */
__device__ __forceinline__ int decode_choice(const decode_args &p, int64_t pair) {
#ifdef __CUDA_ARCH__
  int e = __ldcg(p.experts + pair);
#else
  int e = p.experts[pair];
#endif
  return e < 0 ? -1 : e - p.first;
}

/* ---- who wants which expert ---------------------------------------------------------------- */

/* The expert this block works for; -1: none. All lanes of a warp must call. */
__device__ __forceinline__ int block_expert(const decode_args &p) {
  if (!p.by_pair) return (int)blockIdx.y;
  int64_t pair = p.begin + blockIdx.y;
  int e = decode_choice(p, pair);
  bool taken = e < 0 || e >= p.count;
  for (int64_t i = p.begin + threadIdx.x % 32; i < pair; i += 32)
    if (decode_choice(p, i) == e) taken = true;
  return __any_sync(full_warp, taken) ? -1 : e;
}

/* The next up to MOST pairs of expert e, from pair *next on, into this warp's list; returns how
 * many. *next: where the search goes on. Looks at 128 at once: one wait for 32 tokens. */
template <int MOST>
__device__ __forceinline__ int take_pairs(const decode_args &p, int e, int64_t *next, int *list) {
  constexpr int look = 4;
  int found = 0, lane = (int)threadIdx.x % 32;
  __syncwarp(); /* an earlier list has been read */
  while (*next < p.end && found < MOST) {
    int who[look];
#pragma unroll
    for (int j = 0; j < look; j++) {
      int64_t i = *next + 32 * j + lane;
      who[j] = i < p.end ? decode_choice(p, i) : -1;
    }
    int64_t begin = *next, end = begin + 32 * look;
    *next = end;
#pragma unroll
    for (int j = 0; j < look; j++) {
      unsigned mine = __ballot_sync(full_warp, who[j] == e);
      int at = found + __popc(mine & ((1u << lane) - 1));
      if (who[j] == e && at < MOST) list[at] = (int)(begin + 32 * j + lane);
      unsigned over = __ballot_sync(full_warp, who[j] == e && at == MOST);
      if (over != 0 && *next == end) /* the first that has no place */
        *next = begin + 32 * j + __ffs((int)over) - 1;
      found = min(found + __popc(mine), MOST);
    }
  }
  __syncwarp();
  return found;
}

/* ---- tensor cores -------------------------------------------------------------------------- */

/* This lane's row of each tile: the row of `x` (k elements each) that its pair reads. */
template <typename T, int TILES>
__device__ __forceinline__ void pair_rows(const T *(&row)[TILES], const T *x, int64_t width,
                                          const int *list, int n, int per_row) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    int slot = j * 8 + (int)threadIdx.x % 32 / 4;
    row[j] = slot < n ? x + list[slot] / per_row * width : nullptr;
  }
}

template <typename T, int TILES>
__global__ void __launch_bounds__(skinny_threads, TILES == 1 ? 5 : 4)
    decode_up_kernel(decode_args p) {
  __shared__ skinny_sums<TILES> sums;
  __shared__ int lists[skinny_warps][TILES * 8];
  launch_wait();
  launch_release();
  if constexpr (mma_built<T>()) {
    int e = block_expert(p);
    if (e < 0) return;
    int warp = (int)threadIdx.x / 32, f = (int)blockIdx.x * 8 + (int)threadIdx.x % 32 / 4;
    int *list = lists[warp];
    const T *gate = nullptr, *up = nullptr;
    if (f < p.ffn) {
      gate = static_cast<const T *>(p.w13) + (2LL * e * p.ffn + f) * p.width;
      up = gate + (int64_t)p.ffn * p.width;
    }
    int64_t next = p.begin;
    for (int n; (n = take_pairs<TILES * 8>(p, e, &next, list)) > 0;) {
      skinny_range r = {warp, (int)div_up(p.width, skinny_chunk), p.width};
      skinny_batch<T, 6> batch; /* all of D = 768 */
      batch.load(gate, up, r);
      const T *rows[TILES];
      pair_rows<T, TILES>(rows, static_cast<const T *>(p.x), p.width, list, n, p.k);
      float c[TILES][4], scale[2]; /* asked for early: of the two columns this lane will finish */
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int slot = skinny_slot(i);
        scale[i] = slot < n ? p.gates[list[slot]] : 0.0f;
      }
      skinny_product(c, batch, gate, up, rows, n, r);
      skinny_finish<TILES>(sums, c, n, [&](int slot, float g, float u) {
        if (f < p.ffn)
          static_cast<T *>(p.hidden)[(int64_t)list[slot] * p.ffn + f] =
              from_float<T>(swiglu<T>(scale[slot % 2], g, u));
      });
    }
  }
}

template <typename T, int TILES>
__global__ void __launch_bounds__(skinny_threads, 4) decode_down_kernel(decode_args p) {
  __shared__ skinny_sums<TILES> sums;
  __shared__ int lists[skinny_warps][TILES * 8];
  if constexpr (mma_built<T>()) {
    /* The kernel before is `up`, which writes neither choices nor weights. */
    int e = block_expert(p), warp = (int)threadIdx.x / 32, *list = lists[warp], n = 0;
    int row = (int)blockIdx.x * skinny_rows + (int)threadIdx.x % 32 / 4;
    int64_t next = p.begin, pairs = p.end - p.begin;
    if (e >= 0) n = take_pairs<TILES * 8>(p, e, &next, list);
    const T *first = static_cast<const T *>(p.w2) + ((int64_t)max(e, 0) * p.width + row) * p.ffn;
    const T *low = row < p.width ? first : nullptr;
    const T *high = row + 8 < p.width ? first + 8LL * p.ffn : nullptr;
    int part = (int)div_up(p.chunks, p.slices), begin = (int)blockIdx.z * part;
    skinny_range all = {begin + warp, min(begin + part, p.chunks), p.ffn};
    constexpr int at_once = TILES == 1 ? 8 : 6;
    skinny_batch<T, at_once> batch;
    if (n > 0) batch.load(low, high, all);
    launch_wait();
    launch_release();
    while (n > 0) {
      const T *rows[TILES];
      pair_rows<T, TILES>(rows, static_cast<const T *>(p.hidden), p.ffn, list, n, 1);
      float c[TILES][4];
      skinny_product(c, batch, low, high, rows, n, all);
      skinny_finish<TILES>(sums, c, n, [&](int slot, float x, float y) {
        float *to = p.partial + (blockIdx.z * pairs + list[slot] - p.begin) * p.width + row;
        if (row < p.width) to[0] = x;
        if (row + 8 < p.width) to[8] = y;
      });
      n = take_pairs<TILES * 8>(p, e, &next, list);
      if (n > 0) batch.load(low, high, all);
    }
  } else {
    launch_wait();
    launch_release();
  }
}

/* ---- float32 arithmetic: any type and size ------------------------------------------------- */

constexpr int plain_pairs = 8;

/* sum[i] = w . the row of x that list[i] reads, for i < n, in every lane. */
template <typename T, int N>
__device__ __forceinline__ void plain_products(float (&sum)[plain_pairs], const T *w, const T *x,
                                               int width, const int *list, int n, int per_row) {
#pragma unroll
  for (int i = 0; i < plain_pairs; i++) sum[i] = 0.0f;
  for (int c = (int)threadIdx.x % 32 * N; c < width; c += 32 * N) {
    float u[N], v[N];
    load<T, N>(u, w + c);
#pragma unroll
    for (int i = 0; i < plain_pairs; i++) {
      if (i >= n) break;
      load<T, N>(v, x + (int64_t)(list[i] / per_row) * width + c);
#pragma unroll
      for (int j = 0; j < N; j++) sum[i] = fmaf(u[j], v[j], sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < plain_pairs; i++) sum[i] = warp_sum(sum[i]);
}

/* A warp per column of the hidden layer. */
template <typename T, int N>
__global__ void __launch_bounds__(skinny_threads) plain_up_kernel(decode_args p) {
  __shared__ int lists[skinny_warps][plain_pairs];
  launch_wait();
  launch_release();
  int warp = (int)threadIdx.x / 32, *list = lists[warp], e = block_expert(p);
  int f = (int)blockIdx.x * skinny_warps + warp;
  if (e < 0 || f >= p.ffn) return;
  const T *w = static_cast<const T *>(p.w13) + (2LL * e * p.ffn + f) * p.width;
  const T *x = static_cast<const T *>(p.x);
  int64_t next = p.begin;
  for (int n; (n = take_pairs<plain_pairs>(p, e, &next, list)) > 0;) {
    float gate[plain_pairs], up[plain_pairs];
    plain_products<T, N>(gate, w, x, p.width, list, n, p.k);
    plain_products<T, N>(up, w + (int64_t)p.ffn * p.width, x, p.width, list, n, p.k);
    if (threadIdx.x % 32 != 0) continue;
#pragma unroll
    for (int i = 0; i < plain_pairs; i++)
      if (i < n)
        static_cast<T *>(p.hidden)[(int64_t)list[i] * p.ffn + f] =
            from_float<T>(swiglu<T>(p.gates[list[i]], gate[i], up[i]));
  }
}

/* A warp per row of W2. */
template <typename T, int N>
__global__ void __launch_bounds__(skinny_threads) plain_down_kernel(decode_args p) {
  __shared__ int lists[skinny_warps][plain_pairs];
  launch_wait();
  launch_release();
  int warp = (int)threadIdx.x / 32, *list = lists[warp], e = block_expert(p);
  int row = (int)blockIdx.x * skinny_warps + warp;
  if (e < 0 || row >= p.width) return;
  const T *w = static_cast<const T *>(p.w2) + ((int64_t)e * p.width + row) * p.ffn;
  int64_t next = p.begin;
  for (int n; (n = take_pairs<plain_pairs>(p, e, &next, list)) > 0;) {
    float sum[plain_pairs];
    plain_products<T, N>(sum, w, static_cast<const T *>(p.hidden), p.ffn, list, n, 1);
    if (threadIdx.x % 32 != 0) continue;
#pragma unroll
    for (int i = 0; i < plain_pairs; i++)
      if (i < n) p.partial[(list[i] - p.begin) * p.width + row] = sum[i];
  }
}

/* ---- combine ------------------------------------------------------------------------------- */

constexpr int combine_warps = 8, combine_threads = 32 * combine_warps;
constexpr int combine_choices = combine_warps / 2; /* at a time: two warps for each */

/* One half (0: even, 1: odd) of a choice's slices, added up: N elements at `from` of the first. */
template <int N>
__device__ __forceinline__ void add_slices(float (&sum)[N], const float *from, int64_t apart,
                                           int half, int slices, bool wanted) {
#pragma unroll 8
  for (int z = half; z < slices; z += 2) {
    if constexpr (N == 4) {
      uint4 v = load_once(from + z * apart, wanted);
      sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y);
      sum[2] += __uint_as_float(v.z), sum[3] += __uint_as_float(v.w);
    } else {
      sum[0] += wanted ? from[z * apart] : 0.0f;
    }
  }
}

/* A block per 32 N neighbouring elements of one token (blockIdx.y). Skipped choices wrote nothing:
 * their terms are zeros. */
template <typename T, int N>
__global__ void __launch_bounds__(combine_threads) decode_combine_kernel(decode_args p) {
  __shared__ float sums[combine_warps][32 * N];
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  int64_t token = p.begin / p.k + blockIdx.y, pairs = p.end - p.begin, first = token * p.k;
  auto taken = [&](int k) {
    int e = k < p.k ? decode_choice(p, first + k) : -1;
    return e >= 0 && e < p.count;
  };
  /* The kernel before is `down`, which does not write choices. */
  unsigned early = __ballot_sync(full_warp, taken(lane));
  launch_wait();
  launch_release();
  int c = ((int)blockIdx.x * 32 + lane) * N;
  int at = (int)threadIdx.x, to = (int)blockIdx.x * 32 * N + at;
  bool finishes = at < 32 * N && to < p.width;
  float total = 0.0f;
  for (int begin = 0; begin < p.k; begin += combine_choices) {
    int k = begin + warp / 2;
    bool wanted = c < p.width && (k < 32 ? early >> k & 1 : taken(k));
    const float *from = p.partial + (first + k - p.begin) * p.width + c;
    float sum[N] = {};
    if (k < p.k) add_slices<N>(sum, from, pairs * p.width, warp % 2, p.slices, wanted);
    if (begin > 0) __syncthreads(); /* the last round's sums have been read */
#pragma unroll
    for (int i = 0; i < N; i++) sums[warp][lane * N + i] = sum[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < combine_choices; i++) {
      if (!finishes || begin + i >= p.k) break;
      float term = sums[2 * i][at] + sums[2 * i + 1][at];
      if (p.apart) static_cast<float *>(p.out)[(first + begin + i) * p.width + to] = term;
      total += term;
    }
  }
  if (finishes && !p.apart) static_cast<T *>(p.out)[token * p.width + to] = from_float<T>(total);
}

/* ---- launches ------------------------------------------------------------------------------ */

template <typename T, int TILES> moe_status by_tensor_cores(moe_device *dev, const decode_args &p) {
  unsigned slots = (unsigned)(p.by_pair ? p.end - p.begin : p.count);
  dim3 up((unsigned)div_up(p.ffn, 8), slots);
  dim3 down((unsigned)div_up(p.width, skinny_rows), slots, (unsigned)p.slices);
  MOE_TRY(cuda_start(dev, decode_up_kernel<T, TILES>, up, skinny_threads, 0, p));
  return cuda_start(dev, decode_down_kernel<T, TILES>, down, skinny_threads, 0, p);
}

template <typename T, int N> moe_status by_plain_sums(moe_device *dev, const decode_args &p) {
  unsigned slots = (unsigned)(p.by_pair ? p.end - p.begin : p.count);
  dim3 up((unsigned)div_up(p.ffn, skinny_warps), slots);
  dim3 down((unsigned)div_up(p.width, skinny_warps), slots);
  MOE_TRY(cuda_start(dev, plain_up_kernel<T, N>, up, skinny_threads, 0, p));
  return cuda_start(dev, plain_down_kernel<T, N>, down, skinny_threads, 0, p);
}

template <typename T> moe_status combine(moe_device *dev, const decode_args &p) {
  unsigned tokens = (unsigned)((p.end - p.begin) / p.k);
  if (p.width % 4 == 0)
    return cuda_start(dev, decode_combine_kernel<T, 4>,
                      dim3((unsigned)div_up(p.width, 128), tokens), combine_threads, 0, p);
  return cuda_start(dev, decode_combine_kernel<T, 1>, dim3((unsigned)div_up(p.width, 32), tokens),
                    combine_threads, 0, p);
}

/* The pairs [begin, end) of p. */
moe_status one_pass(moe_device *dev, moe_dtype dtype, decode_args p, bool tensor_cores) {
  int64_t pairs = p.end - p.begin, row = 4LL * p.width;
  p.by_pair = pairs < p.count;
  if (tensor_cores) {
    /* Slices of F for a few blocks on every multiprocessor, where pairs share 16 experts: by the
     * sizes alone, as terms are to be the same wherever their expert is. */
    int64_t slots = pairs < 16 ? pairs : 16, blocks = div_up(p.width, skinny_rows) * slots;
    int64_t wanted = div_up(8LL * cuda_of(dev)->sms, blocks);
    int64_t fit = cuda_of(dev)->partial_bytes / (pairs * row);
    p.chunks = (int)div_up(p.ffn, skinny_chunk);
    int64_t most = div_up(p.chunks, 2 * skinny_warps); /* else warps stand idle */
    int64_t slices = wanted < 16 ? wanted : 16;
    if (slices > fit) slices = fit;
    if (slices > most) slices = most;
    p.slices = (int)(slices < 1 ? 1 : slices);
    bool few = pairs / p.k <= 8;
    if (dtype == MOE_F16)
      MOE_TRY((few ? by_tensor_cores<__half, 1> : by_tensor_cores<__half, 4>)(dev, p));
    else
      MOE_TRY(
          (few ? by_tensor_cores<__nv_bfloat16, 1> : by_tensor_cores<__nv_bfloat16, 4>)(dev, p));
    return dtype == MOE_F16 ? combine<__half>(dev, p) : combine<__nv_bfloat16>(dev, p);
  }
  p.slices = 1;
  return cuda_act(dtype, [&](auto act) {
    using T = decltype(act);
    const T *w13 = static_cast<const T *>(p.w13), *w2 = static_cast<const T *>(p.w2);
    const T *x = static_cast<const T *>(p.x), *hidden = static_cast<const T *>(p.hidden);
    MOE_TRY(cuda_width(
        p.width % 8 == 0 ? p.ffn : 1,
        [&](auto n) { return by_plain_sums<T, decltype(n)::value>(dev, p); }, w13, w2, x, hidden));
    return combine<T>(dev, p);
  });
}

} /* namespace */

moe_status moe_cuda_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts,
                                   moe_tensor gates, int64_t first, moe_tensor w13, moe_tensor w2,
                                   moe_tensor hidden, moe_tensor out) {
  const cuda_state *s = cuda_of(dev);
  decode_args p = {};
  p.x = x.data, p.w13 = w13.data, p.w2 = w2.data;
  p.experts = cuda_data<int32_t>(experts);
  p.gates = cuda_data<float>(gates);
  p.hidden = hidden.data, p.out = out.data;
  p.apart = moe_decodes_apart(experts, out);
  p.partial = reinterpret_cast<float *>(s->partial);
  p.k = (int)experts.shape[1], p.first = (int)first, p.count = (int)w2.shape[0];
  p.width = (int)x.shape[1], p.ffn = (int)w2.shape[2];
  bool tensor_cores = skinny_fits(dev, x.dtype, p.width, w13.data, x.data) &&
                      skinny_fits(dev, x.dtype, p.ffn, w2.data, hidden.data);
  /* Tokens whose partial sums fit, and whose blocks a grid can number. */
  int64_t tokens = x.shape[0], fit = s->partial_bytes / (4LL * p.width * p.k);
  if (fit > 65535 / p.k) fit = 65535 / p.k;
  if (fit < 1 || p.count > 65535)
    return moe_fail(MOE_INVALID,
                    "cuda: experts_decode: %d choices of %d experts with %d elements are beyond "
                    "the kernels",
                    p.k, p.count, p.width);
  for (int64_t t = 0; t < tokens; t += fit) {
    p.begin = t * p.k;
    p.end = (t + fit < tokens ? t + fit : tokens) * p.k;
    MOE_TRY(one_pass(dev, x.dtype, p, tensor_cores));
  }
  return MOE_OK;
}
