/* Attention's slots: who computes, and what lies around the kernels (attention.cuh has the map).
 *
 *   forward    out, lse
 *   backward   delta -> dQ; dK, dV -> sum of parts
 *
 * On Hopper bf16 with heads of 64 goes to our own kernels for it (backward not with
 * run.deterministic); other bf16 and f16 without a document mask to cuDNN where it has a plan; with
 * tensor cores and 16-byte rows to our own tensor core kernels; all else is exact float32
 * arithmetic. MOE_ATTENTION in the environment names who may compute: cudnn (and what it leaves),
 * own (all but cuDNN), mma or exact.
 *
 * A K/V head's gradient is summed over all query heads that read it, by one block per key block.
 * With few K/V heads that is too few blocks: then its query heads are shared out in parts, whose
 * sums are added in a fixed order. So nothing is added atomically but the Hopper kernel's dQ. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/plain.h"

/* ---- choice -------------------------------------------------------------------------------- */

enum attention_maker { BY_CUDNN, BY_SM90, BY_MMA, BY_EXACT };

static bool wanted(const char *maker) {
  return cuda_wished("MOE_ATTENTION", maker);
}

static bool cudnn_fits(moe_device *dev, moe_attention_shape s, moe_dtype dtype) {
#ifdef MOE_WITH_CUDNN
  return !wanted("own") && !wanted("mma") && cuda_cudnn_fits(dev, s, dtype);
#else
  (void)dev, (void)s, (void)dtype;
  return false;
#endif
}

static bool sm90_fits(moe_device *dev, moe_attention_shape s, moe_dtype dtype, bool backward) {
#ifdef MOE_WITH_SM90A
  if (wanted("cudnn") || wanted("mma")) return false;
  return backward ? cuda_attention_sm90_fits(dev, s, dtype)
                  : cuda_attention_sm90_forward_fits(dev, s, dtype);
#else
  (void)dev, (void)s, (void)dtype, (void)backward;
  return false;
#endif
}

static attention_maker choose(moe_device *dev, moe_attention_shape s, moe_dtype dtype,
                              bool documents, bool backward, uintptr_t address_bits) {
  if (wanted("exact") || address_bits % 16 != 0 || !attention_mma_fits(dev, s.head_dim, dtype))
    return BY_EXACT;
  if (sm90_fits(dev, s, dtype, backward)) return BY_SM90;
  return !documents && cudnn_fits(dev, s, dtype) ? BY_CUDNN : BY_MMA;
}

static uintptr_t bits_of(moe_tensor t) {
  return reinterpret_cast<uintptr_t>(t.data);
}

/* ---- sizes --------------------------------------------------------------------------------- */

/* In how many parts a K/V head's query heads are shared out, a divisor of H/G: enough blocks of 64
 * keys to fill the chip a few times over. The Hopper kernel's blocks of 128 keys begin with the
 * longest, so it is enough that this one, all queries of its heads, is no more than a
 * multiprocessor's share of all the work. */
static int64_t backward_parts(const moe_device *dev, moe_attention_shape s, attention_maker by) {
  int64_t rep = s.heads / s.kv_heads, parts = 1, sms = cuda_of(dev)->sms;
  int64_t blocks =
      s.batch * s.kv_heads * (by == BY_SM90 ? div_up(s.seq, 128) + 1 : div_up(s.seq, 64));
  int64_t least = by == BY_SM90 ? 2 * sms : 8 * sms;
  while (parts < rep && (rep % parts != 0 || blocks * parts < least)) parts++;
  return parts;
}

/* attention_sm90.cu takes 128 queries at a time, whether there are so many or not. */
static int64_t padded_rows(int64_t seq) {
  return round_up(seq, 128);
}
/* Of delta, and of lse2. */
static int64_t terms_bytes(moe_attention_shape s) {
  return 4 * s.batch * s.heads * padded_rows(s.seq);
}
/* Where backward's scratch ends: terms, for the Hopper kernel lse2 and dq too, partial sums. */
static int64_t backward_bytes(const moe_device *dev, moe_attention_shape s, attention_maker by) {
  int64_t parts = backward_parts(dev, s, by), each = s.batch * s.kv_heads * 2 * s.seq * s.head_dim;
  return terms_bytes(s) * (by == BY_SM90 ? 2 + s.head_dim : 1) + (parts > 1 ? 4 * parts * each : 0);
}

int64_t moe_cuda_attention_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype) {
  if (shape.batch == 0 || shape.seq == 0) return 0;
  int64_t bytes = backward_bytes(dev, shape, BY_MMA), other = 0;
  if (sm90_fits(dev, shape, dtype, true)) other = backward_bytes(dev, shape, BY_SM90);
  if (other > bytes) bytes = other;
#ifdef MOE_WITH_CUDNN
  bool own = sm90_fits(dev, shape, dtype, false) && sm90_fits(dev, shape, dtype, true);
  if (!own && cudnn_fits(dev, shape, dtype)) other = cuda_cudnn_scratch(dev, shape, dtype);
#endif
  return other > bytes ? other : bytes;
}

static attention_args make_args(moe_attention_shape s, moe_tensor qkv, moe_tensor doc_start) {
  attention_args p = {};
  p.batch = s.batch;
  p.seq = (int)s.seq;
  p.heads = (int)s.heads;
  p.kv_heads = (int)s.kv_heads;
  p.d = (int)s.head_dim;
  p.rep = (int)(s.heads / s.kv_heads);
  p.parts = 1;
  p.stride = (s.heads + 2 * s.kv_heads) * s.head_dim;
  p.out_stride = s.heads * s.head_dim;
  p.scale = (float)(1.0 / sqrt((double)s.head_dim));
  p.doc_start = cuda_data<const int32_t>(doc_start);
  p.qkv = qkv.data;
  return p;
}

static moe_status check_size(moe_attention_shape s) {
  if (s.head_dim <= attention_exact_most && s.seq < (1 << 30)) return MOE_OK;
  return moe_fail(MOE_INVALID,
                  "cuda: attention: head size %lld and sequence length %lld: at most %lld and %d "
                  "are built",
                  (long long)s.head_dim, (long long)s.seq, (long long)attention_exact_most,
                  (1 << 30) - 1);
}

/* ---- forward ------------------------------------------------------------------------------- */

moe_status moe_cuda_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                              moe_tensor doc_start, moe_tensor out, moe_tensor lse) {
  if (shape.batch == 0 || shape.seq == 0) return MOE_OK;
  MOE_TRY(check_size(shape));
  attention_maker by = choose(dev, shape, qkv.dtype, moe_tensor_present(doc_start), false,
                              bits_of(qkv) | bits_of(out) | bits_of(lse));
#ifdef MOE_WITH_CUDNN
  if (by == BY_CUDNN) return cuda_cudnn_attention(dev, shape, qkv, out, lse);
#endif
  attention_args p = make_args(shape, qkv, doc_start);
  p.out = out.data;
  p.lse = cuda_data<float>(lse);
#ifdef MOE_WITH_SM90A
  if (by == BY_SM90) return cuda_attention_sm90_forward(dev, p);
#endif
  return by == BY_MMA ? cuda_attention_mma(dev, qkv.dtype, p)
                      : cuda_attention_exact(dev, qkv.dtype, p);
}

/* ---- backward ------------------------------------------------------------------------------ */

/* delta[b, h, i] = sum over d of dout * out; lse2; zeros in dq. LANES neighbours share a row. */
template <typename T, int N> __global__ void __launch_bounds__(256) delta_kernel(attention_args p) {
  constexpr int lanes = N == 1 ? 32 : 8, rows_at_once = 256 / lanes;
  const T *dout = static_cast<const T *>(p.dout), *out = static_cast<const T *>(p.out);
  int64_t rows = p.batch * p.seq * p.heads;
  int own = (int)threadIdx.x / lanes, lane = (int)threadIdx.x % lanes;
  for (int64_t row0 = (int64_t)blockIdx.x * rows_at_once; row0 < rows;
       row0 += (int64_t)gridDim.x * rows_at_once) {
    int64_t row = row0 + own;
    float sum = 0.0f;
    for (int c = row < rows ? lane * N : p.d; c < p.d; c += lanes * N) {
      float a[N], b[N];
      load<T, N>(a, dout + row * p.d + c);
      load<T, N>(b, out + row * p.d + c);
#pragma unroll
      for (int i = 0; i < N; i++) sum = fmaf(a[i], b[i], sum);
    }
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(full_warp, sum, step);
    if (row >= rows) continue;
    int64_t token = row / p.heads, head = row % p.heads;
    int64_t plane = token / p.seq * p.heads + head, i = token % p.seq, at = plane * p.padded + i;
    if (p.dq != nullptr)
      for (int c = lane * 4; c < p.d; c += lanes * 4)
        *reinterpret_cast<float4 *>(p.dq + at * p.d + c) = float4{};
    if (lane != 0) continue;
    p.delta[at] = sum;
    if (p.lse2 != nullptr) p.lse2[at] = log2_e * p.lse[plane * p.seq + i];
  }
}

static moe_status make_terms(moe_device *dev, moe_dtype dtype, const attention_args &p) {
  size_t bytes = (size_t)(4 * p.batch * p.heads * p.padded);
  if (p.padded > p.seq) { /* queries that are not there: exp2(-3e38) is their probability */
    CUDA_TRY(dev, cudaMemsetAsync(p.delta, 0, bytes, cuda_of(dev)->stream));
    CUDA_TRY(dev, cudaMemsetAsync(p.lse2, 0x7f, bytes, cuda_of(dev)->stream));
    CUDA_TRY(dev, cudaMemsetAsync(p.dq, 0, bytes * (size_t)p.d, cuda_of(dev)->stream));
  }
  return cuda_act(dtype, [&](auto x) {
    using T = decltype(x);
    return cuda_width(
        p.d,
        [&](auto n) {
          constexpr int N = decltype(n)::value;
          int64_t rows = p.batch * p.seq * p.heads;
          delta_kernel<T, N>
              <<<cuda_blocks(dev, rows * (N == 1 ? 32 : 8), 256), 256, 0, cuda_of(dev)->stream>>>(
                  p);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        p.dout, p.out);
  });
}

/* dqkv's keys and values = the sums of the parts, in their order. */
template <typename T, int N> __global__ void sum_parts_kernel(attention_args p) {
  int64_t each = p.batch * p.kv_heads * 2 * p.seq * p.d;
  stride(each / N, [&](int64_t i) {
    float sum[N] = {};
    for (int part = 0; part < p.parts; part++) {
      float x[N];
      load<float, N>(x, p.partial + part * each + i * N);
#pragma unroll
      for (int e = 0; e < N; e++) sum[e] += x[e];
    }
    int64_t c = i * N % p.d, row = i * N / p.d % p.seq, plane = i * N / p.d / p.seq; /* [B, G, 2] */
    int which = (int)(plane % 2), kv = (int)(plane / 2 % p.kv_heads);
    auto to = qkv_rows(p, static_cast<T *>(p.dqkv), plane / 2 / p.kv_heads,
                       p.heads + which * p.kv_heads + kv);
    store<T, N>(to.data + row * to.stride + c, sum);
  });
}

static moe_status sum_parts(moe_device *dev, moe_dtype dtype, const attention_args &p) {
  if (p.parts == 1) return MOE_OK;
  return cuda_act(dtype, [&](auto x) {
    return cuda_width(
        p.d,
        [&](auto n) {
          constexpr int N = decltype(n)::value;
          int64_t each = p.batch * p.kv_heads * 2 * p.seq * p.d;
          sum_parts_kernel<decltype(x), N>
              <<<cuda_blocks(dev, each / N, 256), 256, 0, cuda_of(dev)->stream>>>(p);
          CUDA_LAUNCHED(dev);
          return MOE_OK;
        },
        p.partial, p.dqkv);
  });
}

/* Lay backward's buffers out in the device's scratch. All of what was planned must be there,
 * so that a plan that is too small is found whoever computes. */
static moe_status take_scratch(moe_device *dev, moe_attention_shape s, moe_dtype dtype,
                               attention_maker by, attention_args *p) {
  int64_t bytes = moe_cuda_attention_scratch(dev, s, dtype);
  char *scratch = static_cast<char *>(moe_device_scratch(dev, bytes));
  if (scratch == nullptr)
    return moe_fail(MOE_NO_MEMORY,
                    "kernel scratch is too small: attention_backward needs %lld bytes: plan it "
                    "with moe_attention_scratch",
                    (long long)bytes);
  int64_t terms = terms_bytes(s) / 4;
  p->parts = (int)backward_parts(dev, s, by);
  p->padded = by == BY_SM90 ? padded_rows(s.seq) : s.seq;
  p->delta = reinterpret_cast<float *>(scratch);
  p->partial = p->delta + terms;
  if (by != BY_SM90) return MOE_OK;
  p->lse2 = p->delta + terms;
  p->dq = p->lse2 + terms;
  p->partial = p->dq + terms * s.head_dim;
  return MOE_OK;
}

moe_status moe_cuda_attention_backward(moe_device *dev, moe_attention_shape shape, moe_tensor dout,
                                       moe_tensor qkv, moe_tensor doc_start, moe_tensor out,
                                       moe_tensor lse, moe_tensor dqkv) {
  if (shape.batch == 0 || shape.seq == 0) return MOE_OK;
  MOE_TRY(check_size(shape));
  attention_maker by =
      choose(dev, shape, qkv.dtype, moe_tensor_present(doc_start), true,
             bits_of(qkv) | bits_of(out) | bits_of(lse) | bits_of(dout) | bits_of(dqkv));
  attention_args p = make_args(shape, qkv, doc_start);
  MOE_TRY(take_scratch(dev, shape, qkv.dtype, by, &p));
#ifdef MOE_WITH_CUDNN
  if (by == BY_CUDNN) return cuda_cudnn_attention_backward(dev, shape, dout, qkv, out, lse, dqkv);
#endif
  p.dout = dout.data;
  p.out = out.data;
  p.lse = cuda_data<float>(lse);
  p.dqkv = dqkv.data;
  MOE_TRY(make_terms(dev, qkv.dtype, p));
#ifdef MOE_WITH_SM90A
  if (by == BY_SM90) MOE_TRY(cuda_attention_sm90_backward(dev, p));
#endif
  if (by == BY_MMA) MOE_TRY(cuda_attention_mma_backward(dev, qkv.dtype, p));
  if (by == BY_EXACT) MOE_TRY(cuda_attention_exact_backward(dev, qkv.dtype, p));
  return sum_parts(dev, qkv.dtype, p);
}
