/* Checked entry points of the operations that dispatch (parallel/dispatch.c) needs of its own. */
#include "kernels/check.h"

moe_status moe_localize_experts(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                int64_t begin, int64_t count) {
  const char *op = "moe_localize_experts";
  MOE_TRY(moe_check_2d(op, "experts", experts, MOE_IS_I32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_2d(op, "gates", gates, MOE_IS_F32, experts.shape[0], experts.shape[1]));
  MOE_TRY(moe_check_rule(op, begin >= 0 && count >= 0 && begin + count <= INT32_MAX,
                         "begin and count are a range of int32"));
  if (moe_tensor_count(experts) == 0) return MOE_OK;
  return dev->backend->localize_experts(dev, experts, gates, begin, count);
}
