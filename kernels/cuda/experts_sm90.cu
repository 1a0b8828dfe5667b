/* The expert products on Hopper (sm_90a): which calls the own kernels take, and their tensor maps.
 *
 * The kernels are persistent wgmma + TMA products (sm90_gemm.cuh is their skeleton) for bf16, D and
 * F multiples of 64; every other call goes to cuBLAS, expert by expert. Tensor maps are encoded
 * anew for each launch: that is a few hundred nanoseconds of host arithmetic, less than keeping
 * them in step with the memory they describe would cost. */
#include "kernels/cuda/sm90_gemm.cuh"

#include <cudaTypedefs.h>

/* ---- tensor maps ----------------------------------------------------------------------------- */

static moe_status encoder(moe_device *dev, PFN_cuTensorMapEncodeTiled_v12000 *out) {
  static PFN_cuTensorMapEncodeTiled_v12000 known; /* every caller finds the same */
  if (known == nullptr) {
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    CUDA_TRY(dev, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                   cudaEnableDefault, &found));
#else
    CUDA_TRY(dev,
             cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || entry == nullptr)
      return moe_fail(MOE_FAILED, "cuda: the driver has no cuTensorMapEncodeTiled: update it, or "
                                  "set MOE_EXPERT_GEMM=cublas");
    known = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }
  *out = known;
  return MOE_OK;
}

moe_status sm90_map(moe_device *dev, CUtensorMap *out, const sm90_view &view) {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  MOE_TRY(encoder(dev, &encode));
  cuuint64_t size[4], stride[3], item = (cuuint64_t)moe_dtype_size(view.dtype);
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; i++) {
    size[i] = (cuuint64_t)view.size[i];
    box[i] = (cuuint32_t)view.box[i];
    if (i < 3)
      stride[i] = (cuuint64_t)(view.stride[i] != 0 ? view.stride[i] : view.stride[0]) * item;
  }
  CUresult result = encode(
      out,
      view.dtype == MOE_F32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      view.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      view.swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return moe_fail(MOE_FAILED,
                    "cuda: cuTensorMapEncodeTiled: error %d for %s [%lld, %lld, %lld, %lld], "
                    "strides %lld, %lld, %lld, box [%d, %d, %d, %d] at %p",
                    (int)result, moe_dtype_name(view.dtype), (long long)view.size[3],
                    (long long)view.size[2], (long long)view.size[1], (long long)view.size[0],
                    (long long)stride[2], (long long)stride[1], (long long)stride[0], view.box[3],
                    view.box[2], view.box[1], view.box[0], view.data);
  return MOE_OK;
}

/* ---- which calls ----------------------------------------------------------------------------- */

static bool fits_sizes(moe_dtype dtype, int64_t rows, int64_t a, int64_t b) {
  return dtype == MOE_BF16 && rows > 0 && rows <= INT32_MAX - SM90_M && a > 0 && a % 64 == 0 &&
         b > 0 && b % 64 == 0 && a <= 1 << 24 && b <= 1 << 24;
}
/* The copy engine wants 16-byte alignment. */
template <typename... Tensors>
static bool fits(moe_tensor rows, int64_t width, moe_tensor offsets, const Tensors &...others) {
  uintptr_t bits =
      (reinterpret_cast<uintptr_t>(rows.data) | ... | reinterpret_cast<uintptr_t>(others.data));
  int64_t experts = offsets.shape[0] - 1;
  return fits_sizes(rows.dtype, rows.shape[0], rows.shape[1], width) && bits % 16 == 0 &&
         experts >= 1 && experts <= SM90_MOST_EXPERTS;
}

static moe_status up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                     moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  return (fits(x, a.shape[1], offsets, w13, gu, a) ? sm90_expert_up : cuda_experts_cublas.up)(
      dev, x, offsets, w13, gates, kind, gu, a);
}

static moe_status down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                       moe_tensor y) {
  return (fits(a, y.shape[1], offsets, w2, y) ? sm90_expert_down
                                              : cuda_experts_cublas.down)(dev, a, offsets, w2, y);
}

static moe_status down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets, moe_tensor w2,
                                moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a,
                                moe_tensor dgates) {
  return (fits(dy, a.shape[1], offsets, w2, gu, a) ? sm90_expert_down_backward
                                                   : cuda_experts_cublas.down_backward)(
      dev, dy, offsets, w2, gates, kind, gu, a, dgates);
}

static moe_status up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets, moe_tensor w13,
                              moe_tensor dx) {
  return (fits(dgu, dx.shape[1], offsets, w13, dx)
              ? sm90_expert_up_backward
              : cuda_experts_cublas.up_backward)(dev, dgu, offsets, w13, dx);
}

static moe_status weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                              moe_tensor offsets, int accumulate, moe_tensor dw,
                              moe_tensor squares) {
  return (fits(left, right.shape[1], offsets, right, dw) ? sm90_expert_weight_grad
                                                         : cuda_experts_cublas.weight_grad)(
      dev, left, right, offsets, accumulate, dw, squares);
}

static int64_t scratch(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                       moe_dtype dtype) {
  int64_t own = fits_sizes(dtype, rows, hidden, ffn) ? sm90_down_backward_scratch(rows, ffn) : 0;
  int64_t other = cuda_experts_cublas.scratch(dev, rows, hidden, ffn, dtype);
  return own > other ? own : other;
}

const cuda_expert_ops cuda_experts_sm90 = {"sm90",      up,          down,   down_backward,
                                           up_backward, weight_grad, scratch};
