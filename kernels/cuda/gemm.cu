/* Matrix products through cuBLASLt, with a plan per shape.
 *
 * cuBLASLt computes on column-major matrices. A row-major c [m, n] = A B is the column-major
 * c^T [n, m] = B^T A^T in the same memory, so the operands are handed over in reverse order. Asking
 * for an algorithm costs tens of microseconds; the answer is kept by shape, types and alignment. */
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/gemv.h"
#include "kernels/cuda/plain.h"
#include "kernels/cuda/plans.h"
#include "kernels/cuda/tiled.cuh"

/* ---- plans --------------------------------------------------------------------------------- */

struct plan {
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t a, b, c; /* in cuBLASLt's order: a is our b */
  cublasLtMatmulAlgo_t algorithm;
  bool found; /* false: cuBLASLt has no kernel for it, use our own */
};

struct cuda_plans {
  cuda_plan_index index;
  plan plans[CUDA_PLAN_COUNT];
};

static void plan_clear(plan *p) {
  if (p->a != nullptr) cublasLtMatrixLayoutDestroy(p->a);
  if (p->b != nullptr) cublasLtMatrixLayoutDestroy(p->b);
  if (p->c != nullptr) cublasLtMatrixLayoutDestroy(p->c);
  if (p->product != nullptr) cublasLtMatmulDescDestroy(p->product);
  *p = {};
}

void cuda_plans_destroy(cuda_plans *plans) {
  if (plans == nullptr) return;
  for (plan &p : plans->plans) plan_clear(&p);
  free(plans);
}

static moe_status blas_failed(moe_device *dev, cublasStatus_t status, const char *what) {
  return moe_fail(MOE_FAILED, "cuda: cuBLASLt: %s: %s%s%s", what, cublasLtGetStatusString(status),
                  dev->label != nullptr ? " in " : "", dev->label != nullptr ? dev->label : "");
}

#define BLAS_TRY(dev, call)                             \
  do {                                                  \
    cublasStatus_t blas_try_status_ = (call);           \
    if (blas_try_status_ != CUBLAS_STATUS_SUCCESS)      \
      return blas_failed(dev, blas_try_status_, #call); \
  } while (0)

static cudaDataType_t blas_type(int dtype) {
  return dtype == MOE_BF16 ? CUDA_R_16BF : dtype == MOE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

/* Product and layouts of a key. */
static moe_status plan_describe(moe_device *dev, const cuda_plan_key *k, plan *p) {
  bool tf32 = k->dtype == MOE_F32 && dev->options.tf32;
  BLAS_TRY(dev, cublasLtMatmulDescCreate(&p->product,
                                         tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
                                         CUDA_R_32F));
  cublasOperation_t first = k->form == MOE_NT ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasOperation_t second = k->form == MOE_TN ? CUBLAS_OP_T : CUBLAS_OP_N;
  BLAS_TRY(dev, cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                               sizeof first));
  BLAS_TRY(dev, cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                               sizeof second));
  /* column-major rows x columns as they lie in memory: our row length is their column length */
  uint64_t m = (uint64_t)k->m, n = (uint64_t)k->n, depth = (uint64_t)k->k;
  cudaDataType_t in = blas_type(k->dtype), out = blas_type(k->c_dtype);
  BLAS_TRY(dev, cublasLtMatrixLayoutCreate(&p->a, in, k->form == MOE_NT ? depth : n,
                                           k->form == MOE_NT ? n : depth, k->ldb));
  BLAS_TRY(dev, cublasLtMatrixLayoutCreate(&p->b, in, k->form == MOE_TN ? m : depth,
                                           k->form == MOE_TN ? depth : m, k->lda));
  BLAS_TRY(dev, cublasLtMatrixLayoutCreate(&p->c, out, n, m, k->ldc));
  return MOE_OK;
}

/* Ask for the best algorithm. Split sums are to meet in float32, so that results round once. */
static moe_status plan_search(moe_device *dev, const cuda_plan_key *k, plan *p) {
  cuda_state *s = cuda_of(dev);
  cublasLtMatmulPreference_t wish;
  BLAS_TRY(dev, cublasLtMatmulPreferenceCreate(&wish));
  uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  uint32_t align_a = k->align_b, align_b = k->align_a, align_c = k->align_c;
  struct {
    cublasLtMatmulPreferenceAttributes_t name;
    const void *value;
    size_t bytes;
  } wishes[] = {
      {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &s->workspace_bytes, sizeof s->workspace_bytes},
      {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c},
      {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c}};
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  for (const auto &w : wishes)
    if (status == CUBLAS_STATUS_SUCCESS)
      status = cublasLtMatmulPreferenceSetAttribute(wish, w.name, w.value, w.bytes);
  cublasLtMatmulHeuristicResult_t best = {};
  int count = 0;
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatmulAlgoGetHeuristic(s->blas, p->product, p->a, p->b, p->c, p->c, wish, 1,
                                            &best, &count);
  cublasLtMatmulPreferenceDestroy(wish);
  p->found = status == CUBLAS_STATUS_SUCCESS && count > 0 && best.state == CUBLAS_STATUS_SUCCESS;
  p->algorithm = best.algo;
  /* "not supported" is an answer: the own kernel takes over */
  return status == CUBLAS_STATUS_SUCCESS || status == CUBLAS_STATUS_NOT_SUPPORTED
             ? MOE_OK
             : blas_failed(dev, status, "choosing an algorithm");
}

static moe_status plan_find(moe_device *dev, const cuda_plan_key *key, plan **out) {
  cuda_state *s = cuda_of(dev);
  if (s->plans == nullptr) s->plans = static_cast<cuda_plans *>(calloc(1, sizeof(cuda_plans)));
  if (s->plans == nullptr) return moe_fail(MOE_NO_MEMORY, "cuda: no memory for matrix plans");
  bool known;
  int at = cuda_plan_place(&s->plans->index, key, &known);
  plan *p = &s->plans->plans[at];
  *out = p;
  if (known) return MOE_OK;
  plan_clear(p); /* the place may have held an older plan */
  moe_status status = plan_describe(dev, key, p);
  if (status == MOE_OK) status = plan_search(dev, key, p);
  if (status != MOE_OK) cuda_plan_forget(&s->plans->index, at);
  return status;
}

/* ---- products ------------------------------------------------------------------------------ */

moe_status cuda_matmul_own(moe_device *dev, moe_gemm_form form, int64_t m, int64_t n, int64_t k,
                           cuda_matrix a, cuda_matrix b, float beta, cuda_matrix c) {
  if (m == 0 || n == 0) return MOE_OK;
  return cuda_act(a.dtype, [&](auto in) {
    using A = decltype(in);
    const A *x = static_cast<const A *>(a.data), *y = static_cast<const A *>(b.data);
    if (c.dtype == a.dtype)
      return tiled_matmul<A, A, A>(dev, form, m, n, k, x, a.ld, y, b.ld, beta,
                                   static_cast<A *>(c.data), c.ld);
    return tiled_matmul<A, A, float>(dev, form, m, n, k, x, a.ld, y, b.ld, beta,
                                     static_cast<float *>(c.data), c.ld);
  });
}

moe_status cuda_matmul(moe_device *dev, moe_gemm_form form, int64_t m, int64_t n, int64_t k,
                       cuda_matrix a, cuda_matrix b, float beta, cuda_matrix c) {
  cuda_state *s = cuda_of(dev);
  if (m == 0 || n == 0) return MOE_OK;
  if (s->own_gemm || k == 0) return cuda_matmul_own(dev, form, m, n, k, a, b, beta, c);
  cuda_plan_key key = cuda_plan_key_of(form, m, n, k, a.dtype, c.dtype, a.data, b.data, c.data,
                                       a.ld, b.ld, c.ld, beta);
  plan *p;
  MOE_TRY(plan_find(dev, &key, &p));
  if (!p->found) return cuda_matmul_own(dev, form, m, n, k, a, b, beta, c);
  float one = 1.0f;
  BLAS_TRY(dev, cublasLtMatmul(s->blas, p->product, &one, b.data, p->a, a.data, p->b, &beta, c.data,
                               p->c, c.data, p->c, &p->algorithm, s->workspace, s->workspace_bytes,
                               s->stream));
  return MOE_OK;
}

moe_status moe_cuda_gemm(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b,
                         float beta, moe_tensor c) {
  int64_t m = c.shape[0], n = c.shape[1], k = form == MOE_TN ? a.shape[0] : a.shape[1];
  static const bool by_tiles = cuda_plain("gemv");
  if (!by_tiles && !cuda_of(dev)->own_gemm && cuda_gemv_fits(dev, form, a, b))
    return cuda_gemv(dev, a, b, beta, c);
  return cuda_matmul(dev, form, m, n, k, {a.data, a.dtype, a.shape[1]},
                     {b.data, b.dtype, b.shape[1]}, beta, {c.data, c.dtype, c.shape[1]});
}
