/* The router's products where experts are few, at most 64: logits = x W^T and, on the way back,
 * dx += dlogits W and dW += dlogits^T x. General tiles waste such skinny results.
 *
 * A thread keeps 64 sums in registers, for eight consecutive elements of rows or for eight experts.
 * 16 experts are one pass; those that are missing count as zeros. Rows come through shared memory
 * by asynchronous copies of 16 bytes. All arithmetic is float32, all orders of addition are fixed.
 */
#ifndef MOE_KERNELS_CUDA_ROUTER_FEW_CUH
#define MOE_KERNELS_CUDA_ROUTER_FEW_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

constexpr int few_most = 64, few_pass = 16;
/* Tokens of one warp at once. */
template <typename T> constexpr int few_tokens = sizeof(T) == 2 ? 8 : 4;

/* Part of a matrix in shared memory: ROWS rows, SLICES times eight columns. Neighbouring threads
 * take neighbouring slices, so where a slice is two words, first come all the first words. */
template <typename T, int ROWS, int SLICES> struct few_tile {
  static constexpr int words = (int)sizeof(T) / 2, row_words = words * SLICES;
  uint4 word[ROWS][row_words];

  /* Start copying rows and columns from (row, column) on; zeros where the matrix ends. */
  template <int THREADS>
  __device__ __forceinline__ void stage(const T *matrix, int64_t row, int64_t rows, int64_t column,
                                        int64_t width) {
    static_assert(THREADS % row_words == 0 && ROWS * row_words % THREADS == 0, "equal shares");
    constexpr int step = THREADS / row_words;
    int r = (int)threadIdx.x / row_words, w = (int)threadIdx.x % row_words;
    int64_t c = column + w * (16 / (int)sizeof(T));
    int left = c < width ? (int)min(rows - row, (int64_t)ROWS) : 0;
    const T *from = matrix + (row + r) * width + c;
    uint4 *to = &word[r][w % words * SLICES + w / words];
#pragma unroll
    for (int k = 0; k < ROWS; k += step, from += step * width)
      copy_start<16>(to + k * row_words, r + k < left ? from : matrix, r + k < left);
  }
  /* Elements 4 q to 4 q + 3 of a slice. */
  __device__ __forceinline__ void read(float (&v)[4], int row, int slice, int q) const {
    if constexpr (words == 2) {
      float4 u = reinterpret_cast<const float4 &>(word[row][q * SLICES + slice]);
      v[0] = u.x, v[1] = u.y, v[2] = u.z, v[3] = u.w;
    } else {
      uint2 u = reinterpret_cast<const uint2 *>(&word[row][slice])[q];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = to_float(reinterpret_cast<const T *>(&u)[i]);
    }
  }
  /* All eight. */
  __device__ __forceinline__ void read(float (&v)[8], int row, int slice) const {
    cuda_pack<T, 8> u;
#pragma unroll
    for (int i = 0; i < words; i++)
      reinterpret_cast<uint4 *>(u.v)[i] = word[row][i * SLICES + slice];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(u.v[i]);
  }
  __device__ __forceinline__ void write(int row, int slice, const float (&v)[8]) {
    cuda_pack<T, 8> u;
#pragma unroll
    for (int i = 0; i < 8; i++) u.v[i] = from_float<T>(v[i]);
#pragma unroll
    for (int i = 0; i < words; i++)
      word[row][i * SLICES + slice] = reinterpret_cast<const uint4 *>(u.v)[i];
  }
};

/* What the three kernels work on. */
struct few_size {
  int64_t tokens, width;
  int experts;
};

/* sum += a times each of b. */
__device__ __forceinline__ void few_add(float (&sum)[8], float a, const float (&b)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] = fmaf(a, b[i], sum[i]);
}

/* Eight elements to memory, in whole words: the compiler takes apart what store() says here. */
template <typename T> __device__ __forceinline__ void few_store(T *to, const float (&v)[8]) {
  cuda_pack<T, 8> u;
#pragma unroll
  for (int i = 0; i < 8; i++) u.v[i] = from_float<T>(v[i]);
#pragma unroll
  for (int i = 0; i < u.words; i++) {
    uint4 w = reinterpret_cast<const uint4 *>(u.v)[i];
    asm volatile(
        "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4 *>(to) + i),
        "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
        : "memory");
  }
}

/* ---- logits: a warp takes a few tokens, a thread every 16th slice and half the experts ------ */

constexpr int few_logit_threads = 128;

/* Each of 2 STEP neighbouring threads has N parts of sums; thread s gets the sums from
 * N / (2 STEP) s on. */
template <int STEP, int N> __device__ __forceinline__ void few_gather(float (&v)[N]) {
  constexpr int half = N / 16 * STEP;
  bool upper = threadIdx.x & STEP;
#pragma unroll
  for (int i = 0; i < half; i++) {
    float low = v[i], high = v[i + half];
    v[i] = (upper ? high : low) + __shfl_xor_sync(full_warp, upper ? low : high, STEP);
  }
  if constexpr (STEP > 1) few_gather<STEP / 2>(v);
}

template <typename T>
__global__ void __launch_bounds__(few_logit_threads, 4)
    few_logits_kernel(const T *x, const float *weight, float *logits, few_size size) {
  constexpr int many = few_tokens<T>, tokens = few_logit_threads / 32 * many, columns = 16 * 8;
  __shared__ few_tile<float, few_pass, 16> w[2];
  __shared__ few_tile<T, tokens, 16> rows[2];
  int slice = (int)threadIdx.x % 16, half = (int)threadIdx.x / 16 % 2 * 8;
  int passes = (int)div_up(size.experts, few_pass), first = (int)blockIdx.x % passes * few_pass;
  int64_t token = (int64_t)(blockIdx.x / passes) * tokens;
  int mine = (int)threadIdx.x / 32 * many;
  auto stage = [&](int to, int64_t column) {
    w[to].template stage<few_logit_threads>(weight, first, size.experts, column, size.width);
    rows[to].template stage<few_logit_threads>(x, token, size.tokens, column, size.width);
  };
  float sum[many * 8] = {}; /* [token, expert of this half] */
  int now = 0;
  stage(0, 0);
#pragma unroll 1
  for (int64_t column = 0; column < size.width; column += columns, now ^= 1) {
    copy_wait();
    __syncthreads(); /* `now` is here, and none reads the other any more */
    if (column + columns < size.width) stage(now ^ 1, column + columns);
#pragma unroll 1
    for (int q = 0; q < 2; q++) { /* half a slice: both would not fit the registers */
      float v[many][4];
#pragma unroll
      for (int t = 0; t < many; t++) rows[now].read(v[t], mine + t, slice, q);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        float u[4];
        w[now].read(u, half + e, slice, q);
#pragma unroll
        for (int t = 0; t < many; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) sum[t * 8 + e] = fmaf(v[t][i], u[i], sum[t * 8 + e]);
      }
    }
  }
  few_gather<8>(sum);
#pragma unroll
  for (int i = 0; i < many / 2; i++) {
    int at = slice * (many / 2) + i, e = first + half + at % 8;
    int64_t t = token + mine + at / 8;
    if (t < size.tokens && e < size.experts) logits[t * size.experts + e] = sum[i];
  }
}

template <typename T>
static moe_status few_logits(moe_device *dev, const T *x, const float *weight, float *logits,
                             few_size size) {
  int64_t blocks = div_up(size.tokens, few_logit_threads / 32 * few_tokens<T>);
  few_logits_kernel<T><<<(unsigned)(blocks * div_up(size.experts, few_pass)), few_logit_threads, 0,
                         cuda_of(dev)->stream>>>(x, weight, logits, size);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* ---- gradients: a warp takes 256 columns, a thread one slice of them ------------------------ */

constexpr int few_columns = 32 * 8;

/* Start copying grad of TOKENS tokens and a pass's experts to place(t, e); zeros where there are no
 * more. */
template <int TOKENS, int THREADS, typename P>
__device__ __forceinline__ void few_stage_grad(const float *grad, int64_t token, int64_t end,
                                               int first, int experts, P place) {
#pragma unroll
  for (int k = 0; k < TOKENS * few_pass / THREADS; k++) {
    int i = k * THREADS + (int)threadIdx.x, t = i / few_pass, e = i % few_pass;
    bool inside = first + e < experts && token + t < end;
    copy_start<4>(&place(t, e), grad + (inside ? (token + t) * experts + first + e : 0), inside);
  }
}

constexpr int few_dx_threads = 128, few_dx_blocks = 4; /* at a time on a multiprocessor */

/* dx += grad W, for the blockIdx.x-th `part` tokens and blockIdx.y-th columns. */
template <typename T>
__global__ void __launch_bounds__(few_dx_threads, few_dx_blocks)
    few_dx_kernel(T *dx, const float *weight, const float *grad, int64_t part, few_size size) {
  constexpr int many = few_tokens<T>, tokens = few_dx_threads / 32 * many;
  __shared__ few_tile<float, few_pass, 32> w;
  __shared__ few_tile<T, tokens, 32> old;
  __shared__ alignas(16) float g[few_pass][tokens + 4];
  int lane = (int)threadIdx.x % 32, mine = (int)threadIdx.x / 32 * many;
  int64_t column = (int64_t)blockIdx.y * few_columns, c = column + lane * 8;
  int64_t begin = blockIdx.x * part, end = min(begin + part, size.tokens);
#pragma unroll 1
  for (int64_t token = begin; token < end; token += tokens) {
    float sum[many][8] = {};
#pragma unroll 1
    for (int first = 0; first < size.experts; first += few_pass) {
      __syncthreads(); /* what was here has been read */
      if (first == 0) old.template stage<few_dx_threads>(dx, token, end, column, size.width);
      if (token == begin || size.experts > few_pass)
        w.template stage<few_dx_threads>(weight, first, size.experts, column, size.width);
      few_stage_grad<tokens, few_dx_threads>(grad, token, end, first, size.experts,
                                             [&](int t, int e) -> float & { return g[e][t]; });
      copy_wait();
      __syncthreads();
#pragma unroll 2
      for (int e = 0; e < few_pass; e++) {
        float u[8];
        w.read(u, e, lane);
#pragma unroll
        for (int t = 0; t < many; t += 4) {
          float4 d = *reinterpret_cast<const float4 *>(&g[e][mine + t]);
          few_add(sum[t], d.x, u);
          few_add(sum[t + 1], d.y, u);
          few_add(sum[t + 2], d.z, u);
          few_add(sum[t + 3], d.w, u);
        }
      }
    }
    T *to = dx + (token + mine) * size.width + c;
    int left = c < size.width ? (int)min(end - token - mine, (int64_t)many) : 0;
#pragma unroll
    for (int t = 0; t < many; t++, to += size.width) {
      float v[8];
      old.read(v, mine + t, lane);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += sum[t][i];
      if (t < left) few_store(to, v);
    }
  }
}

constexpr int few_dw_threads = 256, few_dw_teams = few_dw_threads / 64; /* teams of two warps */

struct few_parts {
  float *partial; /* [parts, experts, width] */
  int64_t tokens; /* of each part */
  int parts;
};

/* Part blockIdx.x of grad^T x, for blockIdx.y-th columns and pass blockIdx.z. A warp of a team
 * takes eight experts; the teams share the tokens. */
template <typename T>
__global__ void __launch_bounds__(few_dw_threads, 2)
    few_dw_kernel(const T *x, const float *grad, few_parts parts, few_size size) {
  constexpr int many = few_tokens<T>, tokens = few_dw_teams * many; /* of one round */
  using tile = few_tile<T, tokens, 32>;
  using result = few_tile<float, few_pass, 32>;
  static_assert(sizeof(result) <= sizeof(tile), "the result takes a tile's place");
  __shared__ tile rows[2];
  __shared__ alignas(16) float g[2][tokens][few_pass];
  int lane = (int)threadIdx.x % 32, half = (int)threadIdx.x / 32 % 2 * 8;
  int team = (int)threadIdx.x / 64, first = (int)blockIdx.z * few_pass;
  int64_t begin = blockIdx.x * parts.tokens, end = min(begin + parts.tokens, size.tokens);
  int64_t column = (int64_t)blockIdx.y * few_columns;
  auto stage = [&](int to, int64_t token) {
    rows[to].template stage<few_dw_threads>(x, token, end, column, size.width);
    few_stage_grad<tokens, few_dw_threads>(grad, token, end, first, size.experts,
                                           [&](int t, int e) -> float & { return g[to][t][e]; });
  };
  float sum[8][8] = {}; /* [expert of this half, column] */
  int now = 0;
  stage(0, begin);
#pragma unroll 1
  for (int64_t token = begin; token < end; token += tokens, now ^= 1) {
    copy_wait();
    __syncthreads(); /* `now` is here, and none reads the other any more */
    if (token + tokens < end) stage(now ^ 1, token + tokens);
#pragma unroll 2
    for (int t = team * many; t < (team + 1) * many; t++) {
      float v[8];
      rows[now].read(v, t, lane);
      const float4 *d = reinterpret_cast<const float4 *>(&g[now][t][half]);
      float4 low = d[0], high = d[1];
      few_add(sum[0], low.x, v);
      few_add(sum[1], low.y, v);
      few_add(sum[2], low.z, v);
      few_add(sum[3], low.w, v);
      few_add(sum[4], high.x, v);
      few_add(sum[5], high.y, v);
      few_add(sum[6], high.z, v);
      few_add(sum[7], high.w, v);
    }
  }
  result &all = reinterpret_cast<result &>(rows);
#pragma unroll 1
  for (int r = 0; r < few_dw_teams; r++) { /* the teams' sums, in order */
    __syncthreads();
    if (team != r) continue;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      float before[8] = {};
      if (r > 0) all.read(before, half + e, lane);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[e][i] += before[i];
      all.write(half + e, lane, sum[e]);
    }
  }
  __syncthreads();
  float *to = parts.partial + ((int64_t)blockIdx.x * size.experts + first) * size.width + column;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < few_pass * few_columns / 8; i += few_dw_threads) {
    int e = i / 32, slice = i % 32;
    float v[8];
    all.read(v, e, slice);
    if (first + e < size.experts && column + slice * 8 < size.width)
      few_store(to + e * size.width + slice * 8, v);
  }
}

constexpr int few_sum_rows = 8;

/* to += the sum over parts, every 8th first. 32 columns by 8 shares of the parts. */
static __global__ void few_sum_kernel(few_parts parts, int64_t count, float *to) {
  __shared__ float row[few_sum_rows][32];
  int column = (int)threadIdx.x % 32, share = (int)threadIdx.x / 32;
  int64_t i = (int64_t)blockIdx.x * 32 + column;
  float sum = 0;
  launch_wait();
  launch_release();
#pragma unroll 8
  for (int part = share; part < parts.parts; part += few_sum_rows)
    sum += i < count ? parts.partial[part * count + i] : 0.0f;
  row[share][column] = sum;
  __syncthreads();
  if (share > 0 || i >= count) return;
  for (int r = 1; r < few_sum_rows; r++) sum += row[r][column];
  to[i] += sum;
}

static inline moe_status few_sum(moe_device *dev, few_parts parts, int64_t count, float *to) {
  return cuda_start(dev, few_sum_kernel, dim3((unsigned)div_up(count, 32)), 32 * few_sum_rows, 0,
                    parts, count, to);
}

/* Two blocks for each multiprocessor, where the partial sums fit; parts is 0 if none does. */
static inline few_parts few_split(const moe_device *dev, int64_t tokens, int64_t width,
                                  int64_t experts) {
  const cuda_state *s = cuda_of(dev);
  int64_t tiles = div_up(width, few_columns) * div_up(experts, few_pass);
  int64_t parts = div_up(2 * s->sms, tiles), fits = s->partial_bytes / (4 * experts * width);
  if (parts > fits) parts = fits;
  if (parts < 1) return few_parts{};
  int64_t each = round_up(div_up(tokens, parts), 32);
  return {reinterpret_cast<float *>(s->partial), each, (int)div_up(tokens, each)};
}

/* dx += grad W and dweight += grad^T x; `parts` as few_split gives them. */
template <typename T>
static moe_status few_backward(moe_device *dev, const T *x, const float *weight, const float *grad,
                               few_parts parts, few_size size, T *dx, float *dweight) {
  cudaStream_t stream = cuda_of(dev)->stream;
  unsigned tiles = (unsigned)div_up(size.width, few_columns);
  int64_t count = size.experts * size.width; /* of dweight */
  int64_t tokens = few_dx_threads / 32 * few_tokens<T>;
  int64_t rounds = div_up(div_up(size.tokens, tokens) * tiles, few_dx_blocks * cuda_of(dev)->sms);
  dim3 grid((unsigned)div_up(size.tokens, rounds * tokens), tiles);
  few_dx_kernel<T><<<grid, few_dx_threads, 0, stream>>>(dx, weight, grad, rounds * tokens, size);
  CUDA_LAUNCHED(dev);
  grid = dim3((unsigned)parts.parts, tiles, (unsigned)div_up(size.experts, few_pass));
  few_dw_kernel<T><<<grid, few_dw_threads, 0, stream>>>(x, grad, parts, size);
  CUDA_LAUNCHED(dev);
  return few_sum(dev, parts, count, dweight);
}

#endif
