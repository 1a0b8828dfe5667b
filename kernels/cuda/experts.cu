/* The experts' SwiGLU networks: the table's slots, and the makers that need no special hardware.
 *
 * Here each expert's product is one cuBLASLt call, with a pass for SwiGLU after it. The calls need
 * the row counts on the host: offsets are copied to pinned memory and waited for, once per routing
 * (cuda_offsets_to_host keeps them until the memory is written again). That wait is what the Hopper
 * kernels of experts_sm90.cu save. Source: Shazeer 2020, arXiv:2002.05202. */
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/swiglu.cuh"

/* ---- which kernels ------------------------------------------------------------------------- */

moe_status cuda_experts_choose(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  const char *wish = getenv("MOE_EXPERT_GEMM");
  const cuda_expert_ops *hopper = nullptr;
#ifdef MOE_WITH_SM90A
  if (s->arch == 90) hopper = &cuda_experts_sm90;
#endif
  if (wish == nullptr || *wish == '\0') {
    s->experts = hopper != nullptr ? hopper : &cuda_experts_cublas;
  } else if (strcmp(wish, "cublas") == 0) {
    s->experts = &cuda_experts_cublas;
  } else if (strcmp(wish, "sm90") == 0 && hopper != nullptr) {
    s->experts = hopper;
  } else {
    return moe_fail(MOE_USAGE, "MOE_EXPERT_GEMM=%s: %s: use cublas", wish,
                    strcmp(wish, "sm90") == 0 ? "needs a Hopper GPU and a build for 90a"
                                              : "is neither cublas nor sm90");
  }
  return MOE_OK;
}

moe_status moe_cuda_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                              moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  return cuda_of(dev)->experts->up(dev, x, offsets, w13, gates, kind, gu, a);
}
moe_status moe_cuda_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                                moe_tensor y) {
  return cuda_of(dev)->experts->down(dev, a, offsets, w2, y);
}
moe_status moe_cuda_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                         moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                         moe_tensor gu, moe_tensor a, moe_tensor dgates) {
  return cuda_of(dev)->experts->down_backward(dev, dy, offsets, w2, gates, kind, gu, a, dgates);
}
moe_status moe_cuda_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                       moe_tensor w13, moe_tensor dx) {
  return cuda_of(dev)->experts->up_backward(dev, dgu, offsets, w13, dx);
}
moe_status moe_cuda_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                       moe_tensor offsets, int accumulate, moe_tensor dw,
                                       moe_tensor squares) {
  return cuda_of(dev)->experts->weight_grad(dev, left, right, offsets, accumulate, dw, squares);
}
int64_t moe_cuda_expert_scratch(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                                moe_dtype dtype) {
  return cuda_of(dev)->experts->scratch(dev, rows, hidden, ffn, dtype);
}

/* ---- offsets on the host ------------------------------------------------------------------- */

enum { OFFSETS_KEPT = 64, OFFSETS_MOST = 4097 };

struct cuda_offsets {
  int32_t *host; /* pinned [OFFSETS_KEPT, OFFSETS_MOST] */
  struct {
    const char *data; /* where they lie on the device; NULL: free */
    int64_t count;
  } known[OFFSETS_KEPT];
  int next; /* which to give up next */
};

moe_status cuda_offsets_create(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  s->offsets = static_cast<cuda_offsets *>(calloc(1, sizeof(cuda_offsets)));
  if (s->offsets == nullptr) return moe_fail(MOE_NO_MEMORY, "cuda: no memory for expert offsets");
  CUDA_TRY(dev, cudaMallocHost(reinterpret_cast<void **>(&s->offsets->host),
                               sizeof(int32_t) * OFFSETS_KEPT * OFFSETS_MOST));
  return MOE_OK;
}

void cuda_offsets_destroy(moe_device *dev) {
  cuda_offsets *o = cuda_of(dev)->offsets;
  if (o == nullptr) return;
  cudaFreeHost(o->host);
  free(o);
}

void cuda_offsets_changed(moe_device *dev, const void *data, int64_t bytes) {
  cuda_offsets *o = cuda_of(dev)->offsets;
  const char *begin = static_cast<const char *>(data);
  if (o == nullptr) return;
  for (auto &k : o->known)
    if (bytes == 0 || (k.data < begin + bytes && begin < k.data + 4 * k.count)) k.data = nullptr;
}

/* The e + 1 offsets, checked against the C rows of the buffer. Waits for the stream unless they are
 * known. A graph would repeat the sizes of its recording: refused. */
static moe_status cuda_offsets_to_host(moe_device *dev, moe_tensor offsets, int64_t rows,
                                       const int32_t **out) {
  cuda_state *s = cuda_of(dev);
  cuda_offsets *o = s->offsets;
  int64_t count = offsets.shape[0];
  if (count > OFFSETS_MOST)
    return moe_fail(MOE_INVALID, "cuda: %lld experts on one rank are more than %d",
                    (long long)count - 1, OFFSETS_MOST - 1);
  if (dev->recording)
    return moe_fail(MOE_INVALID, "cuda: expert products by cuBLAS, which want each expert's rows "
                                 "on the host, cannot be recorded");
  int at = 0;
  while (at < OFFSETS_KEPT && (o->known[at].data != offsets.data || o->known[at].count != count))
    at++;
  if (at == OFFSETS_KEPT) {
    at = o->next;
    o->next = (o->next + 1) % OFFSETS_KEPT;
    o->known[at].data = nullptr;
    CUDA_TRY(dev, cudaMemcpyAsync(o->host + at * OFFSETS_MOST, offsets.data, (size_t)(4 * count),
                                  cudaMemcpyDeviceToHost, s->stream));
    CUDA_TRY(dev, cudaStreamSynchronize(s->stream));
    o->known[at] = {cuda_data<char>(offsets), count};
  }
  const int32_t *host = o->host + at * OFFSETS_MOST;
  for (int64_t j = 0; j < count; j++)
    if (host[j] < (j > 0 ? host[j - 1] : 0) || host[j] > rows)
      return moe_fail(MOE_INVALID,
                      "cuda: expert offset %lld is %d: offsets must rise from 0 to at "
                      "most the %lld rows of the buffer",
                      (long long)j, host[j], (long long)rows);
  *out = host;
  return MOE_OK;
}

/* ---- products ------------------------------------------------------------------------------ */

static char *row_of(moe_tensor t, int64_t row) {
  return static_cast<char *>(t.data) + row * t.shape[1] * moe_dtype_size(t.dtype);
}

/* result = form(left, weights of the row's expert), expert by expert. left [C, k], result [C, n],
 * weights [e, n k]. *used: rows in all. An expert's rows are one call by themselves: its bits could
 * depend on the other experts only by the alignment of where it lies, which cuBLASLt may choose by,
 * and which is full where segments are padded to 128 rows and n k is a multiple of 128. */
static moe_status grouped_product(moe_device *dev, moe_gemm_form form, moe_tensor left,
                                  moe_tensor offsets, moe_tensor weights, moe_tensor result,
                                  int64_t *used) {
  int64_t k = left.shape[1], n = result.shape[1], experts = offsets.shape[0] - 1;
  const int32_t *at;
  MOE_TRY(cuda_offsets_to_host(dev, offsets, left.shape[0], &at));
  for (int64_t j = 0; j < experts; j++) {
    char *w = static_cast<char *>(weights.data) + j * n * k * moe_dtype_size(weights.dtype);
    MOE_TRY(cuda_matmul(dev, form, at[j + 1] - at[j], n, k, {row_of(left, at[j]), left.dtype, k},
                        {w, weights.dtype, form == MOE_NT ? k : n}, 0.0f,
                        {row_of(result, at[j]), result.dtype, n}));
  }
  *used = at[experts];
  return MOE_OK;
}

static moe_status weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                              moe_tensor offsets, int accumulate, moe_tensor dw,
                              moe_tensor squares) {
  int64_t m = left.shape[1], n = right.shape[1], experts = offsets.shape[0] - 1;
  const int32_t *at;
  MOE_TRY(cuda_offsets_to_host(dev, offsets, left.shape[0], &at));
  for (int64_t j = 0; j < experts; j++) {
    char *grad = cuda_data<char>(dw) + j * m * n * moe_dtype_size(dw.dtype);
    if (at[j + 1] == at[j] && accumulate) continue;
    MOE_TRY(cuda_matmul(dev, MOE_TN, m, n, at[j + 1] - at[j], {row_of(left, at[j]), left.dtype, m},
                        {row_of(right, at[j]), right.dtype, n}, accumulate ? 1.0f : 0.0f,
                        {grad, dw.dtype, n}));
  }
  return moe_tensor_present(squares) ? moe_cuda_sum_squares(dev, dw, squares) : MOE_OK;
}

/* ---- SwiGLU: a block per row --------------------------------------------------------------- */

struct swiglu_args {
  void *gu, *a;
  const float *gates;
  float *dgates;
  int64_t ffn;
  bool slopes; /* gu's, forward out, backward in */
};

template <typename T, int N> __global__ void swiglu_kernel(swiglu_args p) {
  T *g_row = (T *)p.gu + blockIdx.x * 2 * p.ffn, *u_row = g_row + p.ffn;
  T *a_row = (T *)p.a + blockIdx.x * p.ffn;
  float gate = p.gates[blockIdx.x];
  for (int64_t c = threadIdx.x * N; c < p.ffn; c += blockDim.x * N) {
    float g[N], u[N], a[N];
    load<T, N>(g, g_row + c);
    load<T, N>(u, u_row + c);
    if (p.slopes) {
#pragma unroll
      for (int i = 0; i < N; i++) a[i] = swiglu_slopes<T>(gate, &g[i], &u[i]);
      store<T, N>(g_row + c, g);
      store<T, N>(u_row + c, u);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) a[i] = swiglu<T>(gate, g[i], u[i]);
    }
    store<T, N>(a_row + c, a);
  }
}

/* a holds da; gets the forward's a, but where gu holds slopes. */
template <typename T, int N> __global__ void swiglu_backward_kernel(swiglu_args p) {
  T *g_row = (T *)p.gu + blockIdx.x * 2 * p.ffn, *u_row = g_row + p.ffn;
  T *a_row = (T *)p.a + blockIdx.x * p.ffn;
  float gate = p.gates[blockIdx.x], dgate = 0;
  for (int64_t c = threadIdx.x * N; c < p.ffn; c += blockDim.x * N) {
    float g[N], u[N], a[N];
    load<T, N>(g, g_row + c);
    load<T, N>(u, u_row + c);
    load<T, N>(a, a_row + c);
    if (p.slopes) {
#pragma unroll
      for (int i = 0; i < N; i++) g[i] *= a[i], u[i] *= a[i];
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) a[i] = swiglu_backward<T>(gate, a[i], &g[i], &u[i], &dgate);
      store<T, N>(a_row + c, a);
    }
    store<T, N>(g_row + c, g);
    store<T, N>(u_row + c, u);
  }
  if (p.slopes) return;
  dgate = block_sum(dgate);
  if (threadIdx.x == 0) p.dgates[blockIdx.x] = dgate;
}

/* Run the forward or the backward pass over `rows` rows. */
static moe_status swiglu_rows(moe_device *dev, bool backward, int64_t rows, moe_gu_kind kind,
                              moe_tensor gu, moe_tensor a, moe_tensor gates, moe_tensor dgates) {
  swiglu_args p = {gu.data,
                   a.data,
                   cuda_data<float>(gates),
                   cuda_data<float>(dgates),
                   a.shape[1],
                   kind == MOE_GU_SLOPES};
  cudaStream_t stream = cuda_of(dev)->stream;
  if (rows == 0) return MOE_OK;
  return cuda_act(a.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        p.ffn,
        [&](auto w) {
          constexpr int N = decltype(w)::value;
          unsigned threads = cuda_threads(p.ffn / N, 256);
          if (backward)
            swiglu_backward_kernel<T, N><<<(unsigned)rows, threads, 0, stream>>>(p);
          else
            swiglu_kernel<T, N><<<(unsigned)rows, threads, 0, stream>>>(p);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        (char *)p.gu, (char *)p.a);
  });
}

/* ---- the table ----------------------------------------------------------------------------- */

static moe_status up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                     moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  int64_t used;
  MOE_TRY(grouped_product(dev, MOE_NT, x, offsets, w13, gu, &used));
  return swiglu_rows(dev, false, used, kind, gu, a, gates, moe_tensor_none());
}

static moe_status down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                       moe_tensor y) {
  int64_t used;
  return grouped_product(dev, MOE_NT, a, offsets, w2, y, &used);
}

/* da waits where a may be. */
static moe_status down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets, moe_tensor w2,
                                moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a,
                                moe_tensor dgates) {
  int64_t used;
  MOE_TRY(grouped_product(dev, MOE_NN, dy, offsets, w2, a, &used));
  return swiglu_rows(dev, true, used, kind, gu, a, gates, dgates);
}

static moe_status up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets, moe_tensor w13,
                              moe_tensor dx) {
  int64_t used;
  return grouped_product(dev, MOE_NN, dgu, offsets, w13, dx, &used);
}

static int64_t scratch(moe_device *, int64_t, int64_t, int64_t, moe_dtype) {
  return 0;
}

const cuda_expert_ops cuda_experts_cublas = {"cublas",    up,          down,   down_backward,
                                             up_backward, weight_grad, scratch};
