/* Operations: checked entry points. Each checks shapes and types once, then calls the backend's
 * slot of the same name (backend.h): ops.c -> cpu/FAMILY.c or cuda/FAMILY.cu.
 *
 * Shape legend: T tokens here, S sequence length, D hidden, H query heads, G key/value heads, d
 * head size, E experts, e experts of this rank, K experts per token, F expert FFN size, V
 * vocabulary, R received token rows, C rows of the sorted expert buffer. `act` is the compute type
 * (f32, bf16 or f16); everything in one call marked act has one type. Arithmetic is f32 or wider
 * inside, rounded once on store. All calls are local and queued on the device's stream; MOE_INVALID
 * when shapes or types disagree. `in`, `out`, `inout` as marked; "adds" means out += result. */
#ifndef MOE_KERNELS_OPS_H
#define MOE_KERNELS_OPS_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- elementwise --------------------------------------------------------------------------- */

moe_status moe_zero(moe_device *dev, moe_tensor x);
/* x = value everywhere. x act. */
moe_status moe_fill(moe_device *dev, moe_tensor x, float value);
/* out[i] = normal draw number begin + i of (seed, stream), mean 0, deviation `std`, rounded from
 * f32 (core/base/rng.h): the same bits on any backend. out act, or low16: the halves that go with
 * the draws in bf16. */
moe_status moe_draw_normal(moe_device *dev, uint64_t seed, uint64_t stream, int64_t begin,
                           float std, moe_tensor out);
/* dst = src, converting between f32, bf16 and f16. Same count. */
moe_status moe_copy(moe_device *dev, moe_tensor dst, moe_tensor src);
/* y += x. act or f32 each. */
moe_status moe_add(moe_device *dev, moe_tensor y, moe_tensor x);
/* out [n] = the sum of x's rows [k, n], from the first to the last, one type. What out holds before
 * stands for row `own`, which is not read; -1: for none. squares f64 [1] or absent: += the sum of
 * out^2 as stored. */
moe_status moe_sum_rows(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                        moe_tensor squares);
/* x *= s. */
moe_status moe_scale(moe_device *dev, moe_tensor x, float s);
/* out f64 [1] += sum of x^2, summed in f64. A NaN or infinity in x reaches out. */
moe_status moe_sum_squares(moe_device *dev, moe_tensor x, moe_tensor out);

/* out [T, D] act = weight [V, D] act rows `tokens` i32 [T]. */
moe_status moe_embed(moe_device *dev, moe_tensor tokens, moe_tensor weight, moe_tensor out);
/* dweight f32 [V, D] adds dout [T, D] act at rows tokens; the order of addition is fixed. */
moe_status moe_embed_backward(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                              moe_tensor dweight);

/* ---- norm ---------------------------------------------------------------------------------- */

/* sum = x + residual;  out = sum * rstd * gain,  rstd = 1/sqrt(mean(sum^2) + eps)
 * x, residual, sum, out [T, D] act; residual may be absent (then sum is unused and may be absent);
 * sum may be x or residual. gain f32 [D]; rstd f32 [T] out.
 * Source: Zhang and Sennrich 2019, arXiv:1910.07467. */
moe_status moe_rms_norm(moe_device *dev, moe_tensor x, moe_tensor residual, moe_tensor gain,
                        double eps, moe_tensor sum, moe_tensor out, moe_tensor rstd);
/* Its arguments, for operations that begin with one. */
typedef struct {
  moe_tensor x, residual, gain;
  double eps;
  moe_tensor sum, out, rstd;
} moe_norm;
moe_status moe_rms_norm_of(moe_device *dev, moe_norm norm);
/* dx [T, D] act adds the gradient through the norm of `x` (the sum of the forward call);
 * dgain f32 [D] adds. */
moe_status moe_rms_norm_backward(moe_device *dev, moe_tensor dout, moe_tensor x, moe_tensor gain,
                                 moe_tensor rstd, moe_tensor dx, moe_tensor dgain);
/* Its arguments, for operations that end with one. */
typedef struct {
  moe_tensor dout, x, gain, rstd, dx, dgain;
} moe_norm_gradient;

/* ---- gemm ---------------------------------------------------------------------------------- */

typedef enum { MOE_NN, MOE_NT, MOE_TN } moe_gemm_form; /* A B, A B^T, A^T B */
/* c [m, n] = form(a, b) + beta c.  a, b act; c act or f32. beta 0 or 1 (0: c may hold anything).
 * NN: a [m,k] b [k,n]; NT: a [m,k] b [n,k]; TN: a [k,m] b [k,n]. */
moe_status moe_gemm(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b, float beta,
                    moe_tensor c);

/* rms_norm, then c = norm b^T: one kernel for few rows, where the backend has it.
 * norm.sum must be neither x nor residual; norm.out and norm.rstd are work. b [n, D] act. */
moe_status moe_norm_gemm(moe_device *dev, moe_norm norm, moe_tensor b, moe_tensor c);

/* ---- rope ---------------------------------------------------------------------------------- */

/* table f32 [positions, d]: row p holds cos(p w_i) then sin(p w_i), i < d/2,
 * w_i = b'^(-2i/d), b' = base * alpha^(d/(d-2)) (NTK-aware scaling), computed in f64.
 * Host memory; a set-up helper, not queued. */
void moe_rope_table_fill(double base, double alpha, int64_t positions, int64_t d, float *table);
/* The same into a table on the device. Waits. */
moe_status moe_rope_table_upload(moe_device *dev, double base, double alpha, moe_tensor table);
/* Rotate the query and key heads of qkv [T, (H+2G) d] act in place, pairs (i, i + d/2).
 * positions i32 [T]; direction +1 forward, -1 backward (the inverse rotation).
 * Source: Su et al. 2021, arXiv:2104.09864. */
moe_status moe_rope(moe_device *dev, moe_tensor qkv, moe_tensor positions, moe_tensor table,
                    int64_t heads, int64_t kv_heads, int direction);

/* ---- attention ----------------------------------------------------------------------------- */

typedef struct {
  int64_t batch, seq, heads, kv_heads, head_dim;
} moe_attention_shape;

/* Causal attention, scale 1/sqrt(d), query head h reads key/value head h / (H/G).
 * qkv [B S, (H+2G) d] act: all query heads, then key heads, then value heads.
 * doc_start i32 [B S] or absent: token i of its sequence sees [doc_start, i]; absent: [0, i].
 *   Values count from the start of the sequence, never decrease within it.
 * out [B S, H d] act; lse f32 [B, H, S] log-sum-exp of each row's scaled scores.
 * No S x S matrix is stored. Source: Dao et al. 2022, arXiv:2205.14135. */
moe_status moe_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                         moe_tensor doc_start, moe_tensor out, moe_tensor lse);
/* dqkv [B S, (H+2G) d] act out (written whole). */
moe_status moe_attention_backward(moe_device *dev, moe_attention_shape shape, moe_tensor dout,
                                  moe_tensor qkv, moe_tensor doc_start, moe_tensor out,
                                  moe_tensor lse, moe_tensor dqkv);
int64_t moe_attention_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype);

/* Append the keys and values of new tokens to a cache and attend over all of it; for generation.
 * shape: batch B sequences of seq n new tokens each. qkv [B n, (H+2G) d] act.
 * positions i32 [B n] and table f32 [.., d]: queries and keys are rotated first, as moe_rope does,
 *   perhaps in place; both absent: they have been.
 * keys, values [B, room, G d] act inout. lengths i32 [B]: tokens cached before, 0 or more.
 * Row i of sequence b has position lengths[b] + i, is stored there and sees positions 0 to that.
 * A row whose position is not below `room` is neither stored nor computed (its out is left alone).
 * What is cached must have been there before the operation queued last: it may be read early.
 * out [B n, H d] act. */
moe_status moe_attention_cached(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                moe_tensor positions, moe_tensor table, moe_tensor keys,
                                moe_tensor values, moe_tensor lengths, moe_tensor out);
int64_t moe_attention_cached_scratch(moe_device *dev, moe_attention_shape shape, int64_t room,
                                     moe_dtype dtype);

/* ---- router -------------------------------------------------------------------------------- */

/* Choose each token's K most probable experts.
 *
 *     p = softmax(x W^T), keep the K largest, scale them to sum to 1
 *
 * x [T, D] act; weight f32 [E, D]; bias f32 [E] or absent: added to p for the choice only
 *   (Wang et al. 2024, arXiv:2408.15664).
 * probs f32 [T, E] out; lse f32 [T] out: log-sum-exp of the logits.
 * experts i32 [T, K] out, most probable first (by p + bias), ties to the lower index.
 * gates f32 [T, K] out, rows sum to 1.
 * stats f32 [groups, 2 E + 1] out (written whole), for groups of T/groups consecutive tokens, as
 *   three blocks: [groups, E] assignments to each expert, [groups, E] sums of p, [groups] sums of
 *   lse^2.
 * Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.1; z loss: Zoph et al. 2022,
 * arXiv:2202.08906. */
moe_status moe_router(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                      moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                      moe_tensor stats);
/* rms_norm, then the router of norm.out: one kernel for few tokens, where the backend has it.
 * norm.rstd is work. */
moe_status moe_norm_router(moe_device *dev, moe_norm norm, moe_tensor weight, moe_tensor bias,
                           moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                           moe_tensor stats);
/* Drop assignments beyond `capacity` per expert among these T tokens, least probable first (ties:
 * the later token goes): experts becomes -1 and the gate 0. dropped f32 [1] out: how many. */
moe_status moe_router_drop(moe_device *dev, moe_tensor probs, int64_t capacity, moe_tensor experts,
                           moe_tensor gates, moe_tensor dropped);
/* dgates f32 [T, K]. A dropped assignment's gate has no gradient.
 * load f32 [groups, E]: assignments per expert; aux_scale * load[g, e] is the gradient of the
 *   auxiliary loss with respect to p[t, e] (aux_coef * E / (N K) / N, times the loss scale).
 * z_scale: z_coef / N times the loss scale.
 * dlogits f32 [T, E] out (work); dx [T, D] act adds; dweight f32 [E, D] adds. */
moe_status moe_router_backward(moe_device *dev, moe_tensor dgates, moe_tensor x, moe_tensor weight,
                               moe_tensor probs, moe_tensor lse, moe_tensor experts,
                               moe_tensor gates, moe_tensor load, float aux_scale, float z_scale,
                               moe_tensor dlogits, moe_tensor dx, moe_tensor dweight);
/* router_backward of what a norm made, its dx being norm.dout, then that norm's: one kernel where
 * the backend has it. x [T, D]: what the norm made. norm.dout is work afterwards. */
moe_status moe_router_norm_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                    moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                    moe_tensor experts, moe_tensor gates, moe_tensor load,
                                    float aux_scale, float z_scale, moe_tensor dlogits,
                                    moe_tensor dweight, moe_norm_gradient norm);

/* ---- permute: sort token-expert pairs by expert ------------------------------------------------
 */

/* Sort the pairs of `experts` i32 [R, K] (this rank's numbers 0..e-1; anything else: not mine) by
 * expert, stable in row order, each expert's segment padded to a multiple of `pad` (a power of 2).
 * offsets i32 [e + 1] out: where each padded segment starts; offsets[e] rows in all.
 * pair i32 [P] out: sorted position -> r * K + k, or -1 in padding and after the end.
 * slot i32 [R, K] out: r, k -> sorted position, or -1.
 * P >= R * min(K, e) + e * (pad - 1) holds any routing. */
moe_status moe_permute_plan(moe_device *dev, moe_tensor experts, int64_t pad, moe_tensor offsets,
                            moe_tensor pair, moe_tensor slot);
/* The part of offsets inside the window [begin, begin + rows): out i32 [e + 1] =
 * clamp(offsets - begin, 0, rows). */
moe_status moe_permute_window(moe_device *dev, moe_tensor offsets, int64_t begin, int64_t rows,
                              moe_tensor out);
/* out [C, D] act: out[i] = src[pair[i] / group]; zero rows where pair is -1. src [R, D] act.
 * pair i32 [C]: a window of the plan. group: K. */
moe_status moe_gather_rows(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                           moe_tensor out);
/* out f32 [C]: out[i] = values[pair[i]], 0 where -1. values f32 [R, K]. */
moe_status moe_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair, moe_tensor out);
/* out [R, D] act: out[r] = (beta ? out[r] : 0) + sum over k with begin <= slot[r,k] < begin + C of
 * src[slot[r,k] - begin]. src [C, D] act; slot i32 [R, K]. The order of addition is fixed. */
moe_status moe_combine_rows(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                            int beta, moe_tensor out);
/* combine_rows of src, a whole plan's, to norm.residual, then rms_norm: one kernel where the
 * backend has it. norm.residual is work; norm.sum may not be it. */
moe_status moe_combine_norm(moe_device *dev, moe_tensor src, moe_tensor slot, moe_norm norm);
/* out f32 [R, K]: src[slot - begin] for slots in the window; others 0 when beta is 0, else kept. */
moe_status moe_combine_gates(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                             int beta, moe_tensor out);

/* experts i32 [R, K] inout: global numbers in [begin, begin + count) become 0..count-1, all others
 * -1. gates f32 [R, K] inout: 0 where the expert became -1. */
moe_status moe_localize_experts(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                int64_t begin, int64_t count);

/* ---- experts: SwiGLU over sorted rows ----------------------------------------------------------
 * offsets i32 [e + 1] on the device: expert j owns rows [offsets[j], offsets[j+1]) of the C rows.
 * Rows past offsets[e] are left alone. Weights: w13 [e, 2, F, D] (W1 gate, then W3 up),
 * w2 [e, D, F], both act. The gate multiplies the hidden activation, so the rows that leave are
 * ready to be summed:   a = gate * silu(g) * u,   [g | u] = x w13^T,   y = a w2^T.
 * The bits of an expert's rows do not depend on which other experts are here (on Hopper, as long as
 * they are at most 128: more take other kernels).
 * Source: Shazeer 2020, arXiv:2002.05202. */

/* What up leaves in gu [C, 2 F] for down_backward, and what that one has a [C, F] for. */
typedef enum {
  MOE_GU_VALUES, /* [g | u]; a, out: the forward's again, bit for bit */
  MOE_GU_AND_A,  /* [g | u]; a, in and left: the forward's */
  MOE_GU_SLOPES  /* a's derivatives [gate u silu'(g) | gate silu(g)]; a: work space, for callers
                    that keep the forward's elsewhere */
} moe_gu_kind;
/* x [C, D], gates f32 [C] -> gu [C, 2 F], a [C, F]. */
moe_status moe_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                         moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a);
/* a [C, F] -> y [C, D]. */
moe_status moe_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                           moe_tensor y);
/* dy [C, D] -> da = dy w2; gu inout: what up left becomes [dg | du]; dgates f32 [C] out: sum over F
 * of da * silu(g) * u, but of slopes absent (gates_backward makes them), and gates are not looked
 * at: slopes have them. a must not overlap gu. */
moe_status moe_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                    moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                    moe_tensor gu, moe_tensor a, moe_tensor dgates);
/* The gates' gradients from the rows y [C, D] that down made of them, D terms each in place of F:
 *     dgates[r, k] = dy[r] . y[slot[r, k]] / gates[r, k],   y = gate W2 (silu(g) u)
 * dy [R, D] act; slot i32 [R, K]; gates, dgates f32 [R, K]. 0 where slot is not in 0..C-1, and
 * where the gate is 0, for then y is. */
moe_status moe_gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                              moe_tensor gates, moe_tensor dgates);
/* gather_rows of dy to out [C, D], and gates_backward: one kernel where the backend has it, which
 * reads dy once. pair i32 [C] and slot must be of one plan, from its first row on. */
moe_status moe_gather_backward(moe_device *dev, moe_tensor dy, moe_tensor pair, moe_tensor y,
                               moe_tensor slot, moe_tensor gates, moe_tensor out,
                               moe_tensor dgates);
/* dgu [C, 2 F] -> dx [C, D] = dg w1 + du w3. */
moe_status moe_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                  moe_tensor w13, moe_tensor dx);
/* dw [e, M, N]: dw[j] (+)= left_j^T right_j over expert j's rows; left [C, M], right [C, N] act.
 * accumulate 0 writes every expert, zero where it has no rows. (w13: M = 2F, left = dgu, right
 * = x; w2: M = D, left = dy, right = a.)
 * dw is f32, or bf16 where act is: then the f32 sums are rounded to nearest when they are written,
 * and a call that adds rounds the new sum (on Hopper what is added, too).
 * squares f64 [1] or absent: adds the sum of squares of dw as the call leaves it. Hopper's kernel
 * takes them (in f32, their sum in f64) from what it stores; others, and calls that add, read dw
 * again. */
moe_status moe_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                  moe_tensor offsets, int accumulate, moe_tensor dw,
                                  moe_tensor squares);
/* Scratch for any of the above with at most `rows` rows. */
int64_t moe_expert_scratch(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                           moe_dtype dtype);

/* The experts' part of a layer for few tokens, without sorting:
 *
 *     out[t] = sum over k of W2_e (gates[t,k] * silu(W1_e x[t]) * (W3_e x[t])),  e = experts[t,k]
 *
 * x [T, D]; experts i32 [T, K], of which `first` is the first expert of w13 and w2; those that they
 *   do not have, and numbers such as -1, are skipped; gates f32 [T, K];
 * w13, w2 as above; hidden [T K, F] act: work.
 * out, written whole: [T, D] act, or f32 [T K, D]: each choice's term for itself, zeros where it is
 *   skipped. moe_sum_choices makes the one of the other, bit for bit.
 * A chosen expert's weights are read once for every 32 tokens or more. A term's bits depend on
 * nothing but its token, its expert and the sizes T, K, D and F: not on which other experts are
 * here. */
moe_status moe_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts, moe_tensor gates,
                              int64_t first, moe_tensor w13, moe_tensor w2, moe_tensor hidden,
                              moe_tensor out);
/* out [T, D] act = the sum of each token's K rows of terms [T K, D], act or f32, in their order. */
moe_status moe_sum_choices(moe_device *dev, moe_tensor terms, moe_tensor out);

/* ---- loss ---------------------------------------------------------------------------------- */

/* Cross-entropy of logits [n, V] act or f32 (inout: becomes scale * (softmax - onehot) when
 * with_grad) against targets i32 [n]; target -1 counts nothing (its gradient is zero).
 * loss f64 [2] adds: sum of -log p(target), number of targets counted. row_loss f32 [n] or absent:
 * each row's -log p. */
moe_status moe_cross_entropy(moe_device *dev, moe_tensor logits, moe_tensor targets, float scale,
                             int with_grad, moe_tensor loss, moe_tensor row_loss);

/* ---- adamw --------------------------------------------------------------------------------- */

typedef struct {
  double beta1, beta2, eps, weight_decay;
  int64_t first; /* number of the first element: with the step it names its random bits */
} moe_adamw_args;

/* What changes from step to step, as `now` of moe_adamw: in device memory, so that an update that
 * was recorded (device.h) reads this step's. The corrections of bias c = 1 / (1 - b^t) are drawn
 * out of the root and the quotient, and elements have less to do: lr (c1 m / (sqrt(c2 v) + eps) +
 * decay w) = RATE (m / (sqrt(v) + EPS) + DECAY decay w) */
enum { MOE_ADAMW_RATE, MOE_ADAMW_EPS, MOE_ADAMW_DECAY, MOE_ADAMW_STEP, MOE_ADAMW_NUMBERS };
/* now [MOE_ADAMW_NUMBERS] out, on the host: those of step = 1, 2, ... MOE_INVALID below 1. */
moe_status moe_adamw_numbers(moe_adamw_args args, double lr, int64_t step, double *now);

/* scale f32 [1] out: what to multiply gradients by so that their global norm, sqrt(sum_squares) *
 * unscale, is at most max_norm (0: no limit): unscale * min(1, max_norm / norm). -1 when
 * sum_squares f64 [1] is not finite: the step is to be skipped. */
moe_status moe_clip_scale(moe_device *dev, moe_tensor sum_squares, double max_norm, double unscale,
                          moe_tensor scale);

/* One AdamW update of n parameters with decoupled decay:
 *     m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
 *     w = w - lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + weight_decay w)
 * with g = grad * scale[0]; a negative scale changes nothing (moe_clip_scale's non-finite step).
 * now f64 [MOE_ADAMW_NUMBERS] on the device; grad f32 or bf16; scale f32 [1] on the device; master
 * inout; m, v inout, both f32 or both bf16; weight act out = master rounded, or absent when master
 * is the weight. master is f32, but low16 where weight is bf16: then both together are the f32 that
 * is updated (core/base/halves.h), and weight is inout.
 *
 * The update uses this step's m and v in f32. bf16 m and v are stored by stochastic rounding: up
 * with the probability of the part that is cut off (rounding.h), because with b2 close to 1
 * rounding to nearest would give v back unchanged. The random bits are a function of step and
 * first + i: the same on any backend, and on any rank that numbers its elements alike.
 * Sources: Loshchilov and Hutter 2019, arXiv:1711.05101; rounding: Gupta et al. 2015,
 * arXiv:1502.02551; in training state: Zamirai et al. 2020, arXiv:2010.06192. */
moe_status moe_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                     moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                     moe_tensor weight);

/* ---- decode -------------------------------------------------------------------------------- */

typedef struct {
  float temperature; /* 0: greedy */
  int64_t top_k;     /* 0: all */
  float top_p;       /* 1: all */
  uint64_t seed;
} moe_sample_args;

/* token i32 [n] out from logits [n, V] f32: argmax (ties to the lower index), or a draw from
 * softmax(logits / temperature) cut to the top_k largest and then to the smallest set whose mass
 * reaches top_p. Row i draws number positions[i] of stream streams[i] (i32 [n] each, on the device,
 * so that a step may be queued without knowing them): the same text on any backend and batch.
 * Source of top-p: Holtzman et al. 2020, arXiv:1904.09751. */
moe_status moe_sample(moe_device *dev, moe_tensor logits, moe_sample_args args, moe_tensor streams,
                      moe_tensor positions, moe_tensor token);
/* counts i32 [n] += by i32 [n]: the lengths of sequences after a step, without the host. */
moe_status moe_advance(moe_device *dev, moe_tensor counts, moe_tensor by);

#ifdef __cplusplus
}
#endif
#endif
