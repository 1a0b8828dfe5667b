/* From global expert numbers to this rank's own. */
#include "kernels/cpu/cpu.h"

moe_status moe_cpu_localize_experts(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                    int64_t begin, int64_t count) {
  (void)dev;
  int32_t *expert = experts.data;
  float *gate = gates.data;
  int64_t n = moe_tensor_count(experts);
  for (int64_t i = 0; i < n; i++) {
    int64_t local = expert[i] - begin;
    bool mine = local >= 0 && local < count;
    expert[i] = mine ? (int32_t)local : -1;
    if (!mine) gate[i] = 0.0f;
  }
  return MOE_OK;
}
