/* Views of the weights, or gradients, that lie in a rank's flat pools (params.h). */
#ifndef MOE_CORE_MODEL_VIEWS_H
#define MOE_CORE_MODEL_VIEWS_H

#include "core/base/tensor.h"
#include "core/model/params.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A layer's tensors. D hidden, H, G, d heads, E experts, e of this rank, F FFN size. */
typedef struct {
  moe_tensor norm1;  /* [D] */
  moe_tensor qkv;    /* [(H+2G)d, D] */
  moe_tensor o;      /* [D, H d] */
  moe_tensor norm2;  /* [D] */
  moe_tensor router; /* [E, D] */
  moe_tensor w13;    /* [e, 2, F, D] */
  moe_tensor w2;     /* [e, D, F] */
} moe_layer_weights;

/* `rows` rows of what starts at the tensor named by the table's pattern. pools [MOE_POOLS]: weights
 * or gradients; of an absent pool the view is absent. */
moe_tensor moe_param_view(const moe_params *p, const moe_tensor *pools, const char *pattern,
                          int64_t layer, int64_t rows);
moe_layer_weights moe_layer_views(const moe_params *p, const moe_tensor *pools, int64_t layer);

#ifdef __cplusplus
}
#endif
#endif
