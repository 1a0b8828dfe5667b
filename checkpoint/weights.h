/* Weights: a read-only source of a model's parameters, wherever they are kept.
 *
 * The idea: exports, proofs and comparisons want the same thing from a checkpoint, a Hugging Face
 * folder or a GGUF file: element ranges of the parameters of params.h, as f32, in our layout (an
 * opener undoes whatever its file does: merged experts, permuted rotary rows). Everything is read
 * when it is asked for, so a source needs no more memory than its buffers. All functions are local.
 * Any threads may read from a source at once, up to MOE_WEIGHTS_TENSORS tensors at a time; opening,
 * closing and changing its settings is one's. */
#ifndef MOE_CHECKPOINT_WEIGHTS_H
#define MOE_CHECKPOINT_WEIGHTS_H

#include "checkpoint/checkpoint.h"
#include "core/model/params.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_weights moe_weights;

enum {
  MOE_WEIGHTS_TENSORS = 64, /* being read at a time */
  MOE_WEIGHTS_BLOCK = 32    /* elements that a source may round together */
};

/* What a source can do. `read`: elements [begin, begin + count) of p, range checked by the caller.
 * `round`, in place of `read` for a source that is another one rounded: its values from that one's,
 * whole blocks of them (or the tensor's last elements). `close` releases the source itself. */
typedef struct {
  moe_status (*read)(moe_weights *w, const moe_param *p, int64_t begin, int64_t count, float *out);
  void (*round)(const moe_weights *w, const moe_param *p, int64_t count, float *values);
  moe_dtype (*dtype)(const moe_weights *w, const moe_param *p);
  void (*close)(moe_weights *w);
} moe_weights_kind;

/* The part all sources share; a source's own struct begins with it. */
struct moe_weights {
  const moe_weights_kind *kind;
  moe_weights *exact;  /* what `round` works on, borrowed; or NULL */
  char name[MOE_PATH]; /* for messages: the file or folder */
  moe_dims dims;
  double norm_eps;
  double rope_base, rope_alpha; /* the base used is moe_weights_theta */
  int64_t context;              /* positions the model was trained for; 0: not known */
  moe_dtype compute;            /* what the run computes in, or the file says to compute in */
  double init_std, aux_coef;    /* of the run; 0: not known */
  int64_t router_bias_count;    /* L E, or 0 */
  float *router_bias;           /* [L, E] selection bias (ops.h, moe_router), or NULL */
  char *config;                 /* resolved INI text of the run, or NULL; malloc'd */
  moe_params params;            /* the whole model: experts {0, E} */
};

/* Open a checkpoint's step folder. Masters are preferred to params where there are any, as the
 * values rounded least. Hashes are checked as bytes pass, so what was read of a slice may be wrong
 * until its last element was; reading a tensor in order reads each byte once, reading elsewhere in
 * it begins anew. MOE_DAMAGED, MOE_IO. */
moe_status moe_weights_open_checkpoint(const char *step_folder, moe_weights **out);
/* The same values rounded to the type an export keeps them in (moe_pool_dtype(pool, dtype): norms
 * and routers stay f32). Borrows w, which must outlive it. */
moe_status moe_weights_round(moe_weights *w, moe_dtype dtype, moe_weights **out);
void moe_weights_close(moe_weights *w);

/* Elements [begin, begin + count) of p as f32. p: any moe_param of these dims. MOE_INVALID when the
 * range is outside it. */
moe_status moe_weights_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                            float *out);
/* How the source keeps p: f32, bf16 or f16 (the widest of them when its own type is another). */
moe_dtype moe_weights_dtype(const moe_weights *w, const moe_param *p);
/* base * alpha^(d/(d-2)): rotary base with its NTK scaling folded in. */
double moe_weights_theta(const moe_weights *w);

/* For openers: a new source of `size` bytes (its struct) with kind and name set and everything else
 * zero; and, once dims are known and checked, its list of parameters. moe_weights_close releases it
 * at any point after moe_weights_new. */
moe_status moe_weights_new(const moe_weights_kind *kind, size_t size, const char *name,
                           moe_weights **out);
moe_status moe_weights_list(moe_weights *w);

#ifdef __cplusplus
}
#endif
#endif
