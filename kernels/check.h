/* What the checked entry points share: one sentence per tensor at the door, and in debug mode a
 * look at what came out. Private to kernels/. */
#ifndef MOE_KERNELS_CHECK_H
#define MOE_KERNELS_CHECK_H

#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Sets of types. */
enum {
  MOE_IS_F32 = 1 << MOE_F32,
  MOE_IS_I32 = 1 << MOE_I32,
  MOE_IS_F64 = 1 << MOE_F64,
  MOE_IS_LOW16 = 1 << MOE_LOW16,
  MOE_IS_STATE = 1 << MOE_F32 | 1 << MOE_BF16, /* of gradients and moments */
  MOE_IS_ACT = 1 << MOE_F32 | 1 << MOE_BF16 | 1 << MOE_F16
};
/* The set that holds only the type of `t`. */
static inline int moe_same_type(moe_tensor t) {
  return 1 << t.dtype;
}

/* Require tensor `name` of operation `op` to be there, of a type in the set, with the given
 * dimensions; MOE_ANY admits every size. A tensor without elements need not have memory.
 * MOE_INVALID says what it should be and what it is. */
enum { MOE_ANY = -1 };
moe_status moe_check_1d(const char *op, const char *name, moe_tensor t, int types, int64_t a);
moe_status moe_check_2d(const char *op, const char *name, moe_tensor t, int types, int64_t a,
                        int64_t b);
moe_status moe_check_3d(const char *op, const char *name, moe_tensor t, int types, int64_t a,
                        int64_t b, int64_t c);
moe_status moe_check_4d(const char *op, const char *name, moe_tensor t, int types, int64_t a,
                        int64_t b, int64_t c, int64_t d);
/* Any number of dimensions. */
moe_status moe_check_any(const char *op, const char *name, moe_tensor t, int types);
/* A condition on an operation's numbers; `rule` completes "op: ". */
moe_status moe_check_rule(const char *op, int holds, const char *rule);

/* moe_rms_norm's operands (ops.c). */
moe_status moe_check_norm(moe_norm norm);
/* moe_rms_norm_backward's. */
moe_status moe_check_norm_gradient(moe_norm_gradient norm);

/* Debug mode: MOE_DIVERGED names the operation, where it ran (moe_device_label) and the first
 * element of a floating-point output that is not finite. Nothing without options.debug. */
moe_status moe_check_finite(moe_device *dev, const char *op, const char *name, moe_tensor t);
/* The same for the rows of an expert buffer that offsets [e + 1] says are in use. */
moe_status moe_check_finite_rows(moe_device *dev, const char *op, const char *name, moe_tensor t,
                                 moe_tensor offsets);

#ifdef __cplusplus
}
#endif
#endif
