/* Checked entry points: elementwise, norm, gemm, rope, attention, loss, adamw, decode. (The mixture
 * of experts is in ops_moe.c.)
 *
 * Each reads as the sentence of ops.h that it enforces, calls the backend's slot, and in debug mode
 * looks at what came out. */
#include "kernels/ops.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/check.h"

/* ---- elementwise ------------------------------------------------------------------------- */

moe_status moe_zero(moe_device *dev, moe_tensor x) {
  MOE_TRY(moe_check_any("zero", "x", x, MOE_IS_ACT | MOE_IS_I32 | MOE_IS_F64));
  return dev->backend->zero(dev, x);
}

moe_status moe_fill(moe_device *dev, moe_tensor x, float value) {
  MOE_TRY(moe_check_any("fill", "x", x, MOE_IS_ACT));
  return dev->backend->fill(dev, x, value);
}

moe_status moe_draw_normal(moe_device *dev, uint64_t seed, uint64_t stream, int64_t begin,
                           float std, moe_tensor out) {
  MOE_TRY(moe_check_any("draw_normal", "out", out, MOE_IS_ACT | MOE_IS_LOW16));
  MOE_TRY(moe_check_rule("draw_normal", begin >= 0, "draws count from 0"));
  MOE_TRY(moe_check_rule("draw_normal", std >= 0.0f && isfinite(std),
                         "the deviation must be 0 or above"));
  return dev->backend->draw_normal(dev, seed, stream, begin, std, out);
}

moe_status moe_copy(moe_device *dev, moe_tensor dst, moe_tensor src) {
  MOE_TRY(moe_check_any("copy", "dst", dst, MOE_IS_ACT));
  MOE_TRY(moe_check_any("copy", "src", src, MOE_IS_ACT));
  MOE_TRY(moe_check_rule("copy", moe_tensor_count(dst) == moe_tensor_count(src),
                         "dst and src must have the same number of elements"));
  MOE_TRY(dev->backend->copy(dev, dst, src));
  return moe_check_finite(dev, "copy", "dst", dst);
}

moe_status moe_add(moe_device *dev, moe_tensor y, moe_tensor x) {
  MOE_TRY(moe_check_any("add", "y", y, MOE_IS_ACT));
  MOE_TRY(moe_check_any("add", "x", x, MOE_IS_ACT));
  MOE_TRY(moe_check_rule("add", moe_tensor_count(y) == moe_tensor_count(x),
                         "y and x must have the same number of elements"));
  MOE_TRY(dev->backend->add(dev, y, x));
  return moe_check_finite(dev, "add", "y", y);
}

/* Not looked at in debug mode, as sum_squares below. */
moe_status moe_sum_rows(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                        moe_tensor squares) {
  MOE_TRY(moe_check_2d("sum_rows", "x", x, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_1d("sum_rows", "out", out, moe_same_type(x), x.shape[1]));
  MOE_TRY(
      moe_check_rule("sum_rows", own >= -1 && own < x.shape[0], "own must be a row of x, or -1"));
  if (moe_tensor_present(squares))
    MOE_TRY(moe_check_1d("sum_rows", "squares", squares, MOE_IS_F64, 1));
  return dev->backend->sum_rows(dev, x, own, out, squares);
}

moe_status moe_scale(moe_device *dev, moe_tensor x, float s) {
  MOE_TRY(moe_check_any("scale", "x", x, MOE_IS_ACT));
  MOE_TRY(dev->backend->scale(dev, x, s));
  return moe_check_finite(dev, "scale", "x", x);
}

/* Not looked at in debug mode: an overflow of fp16 gradients is found here, and survived. */
moe_status moe_sum_squares(moe_device *dev, moe_tensor x, moe_tensor out) {
  MOE_TRY(moe_check_any("sum_squares", "x", x, MOE_IS_ACT));
  MOE_TRY(moe_check_1d("sum_squares", "out", out, MOE_IS_F64, 1));
  return dev->backend->sum_squares(dev, x, out);
}

moe_status moe_embed(moe_device *dev, moe_tensor tokens, moe_tensor weight, moe_tensor out) {
  MOE_TRY(moe_check_2d("embed", "weight", weight, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_1d("embed", "tokens", tokens, MOE_IS_I32, MOE_ANY));
  MOE_TRY(
      moe_check_2d("embed", "out", out, moe_same_type(weight), tokens.shape[0], weight.shape[1]));
  MOE_TRY(dev->backend->embed(dev, tokens, weight, out));
  return moe_check_finite(dev, "embed", "out", out);
}

moe_status moe_embed_backward(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                              moe_tensor dweight) {
  MOE_TRY(moe_check_1d("embed_backward", "tokens", tokens, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_2d("embed_backward", "dout", dout, MOE_IS_ACT, tokens.shape[0], MOE_ANY));
  MOE_TRY(moe_check_2d("embed_backward", "dweight", dweight, MOE_IS_F32, MOE_ANY, dout.shape[1]));
  MOE_TRY(dev->backend->embed_backward(dev, tokens, dout, dweight));
  return moe_check_finite(dev, "embed_backward", "dweight", dweight);
}

/* ---- norm -------------------------------------------------------------------------------- */

moe_status moe_check_norm(moe_norm n) {
  const char *op = "rms_norm";
  MOE_TRY(moe_check_2d(op, "x", n.x, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  int64_t rows = n.x.shape[0], width = n.x.shape[1];
  int act = moe_same_type(n.x);
  if (moe_tensor_present(n.residual)) {
    MOE_TRY(moe_check_2d(op, "residual", n.residual, act, rows, width));
    MOE_TRY(moe_check_2d(op, "sum", n.sum, act, rows, width));
  }
  MOE_TRY(moe_check_1d(op, "gain", n.gain, MOE_IS_F32, width));
  MOE_TRY(moe_check_2d(op, "out", n.out, act, rows, width));
  MOE_TRY(moe_check_1d(op, "rstd", n.rstd, MOE_IS_F32, rows));
  return moe_check_rule(op, n.eps > 0.0, "eps must be above 0");
}

moe_status moe_rms_norm_of(moe_device *dev, moe_norm n) {
  const char *op = "rms_norm";
  MOE_TRY(moe_check_norm(n));
  MOE_TRY(dev->backend->rms_norm(dev, n.x, n.residual, n.gain, n.eps, n.sum, n.out, n.rstd));
  if (moe_tensor_present(n.residual)) MOE_TRY(moe_check_finite(dev, op, "sum", n.sum));
  MOE_TRY(moe_check_finite(dev, op, "rstd", n.rstd));
  return moe_check_finite(dev, op, "out", n.out);
}

moe_status moe_rms_norm(moe_device *dev, moe_tensor x, moe_tensor residual, moe_tensor gain,
                        double eps, moe_tensor sum, moe_tensor out, moe_tensor rstd) {
  return moe_rms_norm_of(dev, (moe_norm){x, residual, gain, eps, sum, out, rstd});
}

moe_status moe_check_norm_gradient(moe_norm_gradient n) {
  const char *op = "rms_norm_backward";
  MOE_TRY(moe_check_2d(op, "x", n.x, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  int64_t rows = n.x.shape[0], width = n.x.shape[1];
  MOE_TRY(moe_check_2d(op, "dout", n.dout, moe_same_type(n.x), rows, width));
  MOE_TRY(moe_check_1d(op, "gain", n.gain, MOE_IS_F32, width));
  MOE_TRY(moe_check_1d(op, "rstd", n.rstd, MOE_IS_F32, rows));
  MOE_TRY(moe_check_2d(op, "dx", n.dx, moe_same_type(n.x), rows, width));
  return moe_check_1d(op, "dgain", n.dgain, MOE_IS_F32, width);
}

moe_status moe_rms_norm_backward(moe_device *dev, moe_tensor dout, moe_tensor x, moe_tensor gain,
                                 moe_tensor rstd, moe_tensor dx, moe_tensor dgain) {
  const char *op = "rms_norm_backward";
  MOE_TRY(moe_check_norm_gradient((moe_norm_gradient){dout, x, gain, rstd, dx, dgain}));
  MOE_TRY(dev->backend->rms_norm_backward(dev, dout, x, gain, rstd, dx, dgain));
  MOE_TRY(moe_check_finite(dev, op, "dx", dx));
  return moe_check_finite(dev, op, "dgain", dgain);
}

/* ---- gemm -------------------------------------------------------------------------------- */

moe_status moe_gemm(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b, float beta,
                    moe_tensor c) {
  MOE_TRY(moe_check_rule("gemm", form == MOE_NN || form == MOE_NT || form == MOE_TN,
                         "form must be NN, NT or TN"));
  MOE_TRY(moe_check_2d("gemm", "a", a, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  int64_t m = form == MOE_TN ? a.shape[1] : a.shape[0];
  int64_t k = form == MOE_TN ? a.shape[0] : a.shape[1];
  MOE_TRY(moe_check_2d("gemm", "b", b, moe_same_type(a), form == MOE_NT ? MOE_ANY : k,
                       form == MOE_NT ? k : MOE_ANY));
  int64_t n = form == MOE_NT ? b.shape[0] : b.shape[1];
  MOE_TRY(moe_check_2d("gemm", "c", c, moe_same_type(a) | MOE_IS_F32, m, n));
  MOE_TRY(moe_check_rule("gemm", m <= INT32_MAX && n <= INT32_MAX && k <= INT32_MAX,
                         "each size must be below 2^31"));
  MOE_TRY(moe_check_rule("gemm", beta * (1.0f - beta) == 0.0f, "beta must be 0 or 1"));
  MOE_TRY(dev->backend->gemm(dev, form, a, b, beta, c));
  return moe_check_finite(dev, "gemm", "c", c);
}

moe_status moe_norm_gemm(moe_device *dev, moe_norm n, moe_tensor b, moe_tensor c) {
  bool done = false;
  MOE_TRY(moe_check_norm(n));
  MOE_TRY(moe_check_2d("norm_gemm", "b", b, moe_same_type(n.x), MOE_ANY, n.x.shape[1]));
  MOE_TRY(
      moe_check_2d("norm_gemm", "c", c, moe_same_type(n.x) | MOE_IS_F32, n.x.shape[0], b.shape[0]));
  MOE_TRY(moe_check_rule("norm_gemm",
                         !moe_tensor_present(n.residual) ||
                             (n.sum.data != n.x.data && n.sum.data != n.residual.data),
                         "sum must be neither x nor residual"));
  if (dev->backend->norm_gemm) MOE_TRY(dev->backend->norm_gemm(dev, n, b, c, &done));
  if (done) return moe_check_finite(dev, "norm_gemm", "c", c);
  MOE_TRY(moe_rms_norm_of(dev, n));
  return moe_gemm(dev, MOE_NT, n.out, b, 0.0f, c);
}

/* ---- rope and attention ------------------------------------------------------------------ */

void moe_rope_table_fill(double base, double alpha, int64_t positions, int64_t d, float *table) {
  int64_t half = d / 2;
  double scaled = d > 2 ? base * pow(alpha, (double)d / (double)(d - 2)) : base;
  for (int64_t i = 0; i < half; i++) {
    double frequency = pow(scaled, -2.0 * (double)i / (double)d);
    for (int64_t p = 0; p < positions; p++) {
      table[p * d + i] = (float)cos((double)p * frequency);
      table[p * d + half + i] = (float)sin((double)p * frequency);
    }
  }
}

moe_status moe_rope_table_upload(moe_device *dev, double base, double alpha, moe_tensor table) {
  int64_t bytes = moe_tensor_bytes(table);
  MOE_TRY(moe_check_2d("rope", "table", table, MOE_IS_F32, MOE_ANY, MOE_ANY));
  float *host = malloc((size_t)bytes);
  if (!host) return moe_fail(MOE_NO_MEMORY, "out of memory: rotary table");
  moe_rope_table_fill(base, alpha, table.shape[0], table.shape[1], host);
  moe_status status = moe_device_upload(dev, table.data, host, bytes);
  if (status == MOE_OK) status = moe_device_sync(dev);
  free(host);
  return status;
}

static moe_status check_heads(const char *op, int64_t heads, int64_t kv_heads) {
  return moe_check_rule(op, heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
                        "heads must be a multiple of kv_heads");
}

static moe_status check_table(const char *op, moe_tensor table, moe_tensor positions,
                              int64_t tokens) {
  MOE_TRY(moe_check_2d(op, "table", table, MOE_IS_F32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_rule(op, table.shape[1] > 0 && table.shape[1] % 2 == 0,
                         "the head size must be even"));
  return moe_check_1d(op, "positions", positions, MOE_IS_I32, tokens);
}

moe_status moe_rope(moe_device *dev, moe_tensor qkv, moe_tensor positions, moe_tensor table,
                    int64_t heads, int64_t kv_heads, int direction) {
  MOE_TRY(check_heads("rope", heads, kv_heads));
  MOE_TRY(check_table("rope", table, positions, MOE_ANY));
  MOE_TRY(moe_check_2d("rope", "qkv", qkv, MOE_IS_ACT, positions.shape[0],
                       (heads + 2 * kv_heads) * table.shape[1]));
  MOE_TRY(moe_check_rule("rope", direction == 1 || direction == -1, "direction must be 1 or -1"));
  MOE_TRY(dev->backend->rope(dev, qkv, positions, table, heads, kv_heads, direction));
  return moe_check_finite(dev, "rope", "qkv", qkv);
}

static moe_status check_attention(const char *op, moe_attention_shape s, moe_tensor qkv,
                                  moe_tensor doc_start, moe_tensor out, moe_tensor lse) {
  MOE_TRY(moe_check_rule(op, s.batch >= 0 && s.seq >= 0 && s.head_dim > 0,
                         "batch, seq and head_dim must not be negative"));
  MOE_TRY(check_heads(op, s.heads, s.kv_heads));
  int64_t tokens = s.batch * s.seq;
  MOE_TRY(
      moe_check_2d(op, "qkv", qkv, MOE_IS_ACT, tokens, (s.heads + 2 * s.kv_heads) * s.head_dim));
  if (moe_tensor_present(doc_start))
    MOE_TRY(moe_check_1d(op, "doc_start", doc_start, MOE_IS_I32, tokens));
  MOE_TRY(moe_check_2d(op, "out", out, moe_same_type(qkv), tokens, s.heads * s.head_dim));
  return moe_check_3d(op, "lse", lse, MOE_IS_F32, s.batch, s.heads, s.seq);
}

moe_status moe_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                         moe_tensor doc_start, moe_tensor out, moe_tensor lse) {
  MOE_TRY(check_attention("attention", shape, qkv, doc_start, out, lse));
  MOE_TRY(dev->backend->attention(dev, shape, qkv, doc_start, out, lse));
  MOE_TRY(moe_check_finite(dev, "attention", "lse", lse));
  return moe_check_finite(dev, "attention", "out", out);
}

moe_status moe_attention_backward(moe_device *dev, moe_attention_shape shape, moe_tensor dout,
                                  moe_tensor qkv, moe_tensor doc_start, moe_tensor out,
                                  moe_tensor lse, moe_tensor dqkv) {
  const char *op = "attention_backward";
  MOE_TRY(check_attention(op, shape, qkv, doc_start, out, lse));
  MOE_TRY(moe_check_2d(op, "dout", dout, moe_same_type(qkv), out.shape[0], out.shape[1]));
  MOE_TRY(moe_check_2d(op, "dqkv", dqkv, moe_same_type(qkv), qkv.shape[0], qkv.shape[1]));
  MOE_TRY(dev->backend->attention_backward(dev, shape, dout, qkv, doc_start, out, lse, dqkv));
  return moe_check_finite(dev, op, "dqkv", dqkv);
}

int64_t moe_attention_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype) {
  return dev->backend->attention_scratch(dev, shape, dtype);
}

static moe_status check_cached(moe_attention_shape s, moe_tensor qkv, moe_tensor keys,
                               moe_tensor values, moe_tensor lengths, moe_tensor out) {
  const char *op = "attention_cached";
  MOE_TRY(moe_check_rule(op, s.batch >= 0 && s.seq >= 0 && s.head_dim > 0,
                         "batch, seq and head_dim must not be negative"));
  MOE_TRY(check_heads(op, s.heads, s.kv_heads));
  int64_t tokens = s.batch * s.seq, width = s.kv_heads * s.head_dim;
  int act = moe_same_type(qkv);
  MOE_TRY(
      moe_check_2d(op, "qkv", qkv, MOE_IS_ACT, tokens, (s.heads + 2 * s.kv_heads) * s.head_dim));
  MOE_TRY(moe_check_3d(op, "keys", keys, act, s.batch, MOE_ANY, width));
  MOE_TRY(moe_check_3d(op, "values", values, act, s.batch, keys.shape[1], width));
  MOE_TRY(moe_check_1d(op, "lengths", lengths, MOE_IS_I32, s.batch));
  MOE_TRY(moe_check_rule(op, keys.shape[1] <= INT32_MAX - s.seq,
                         "positions are counted in 32 bits: make room for fewer"));
  return moe_check_2d(op, "out", out, act, tokens, s.heads * s.head_dim);
}

/* Debug mode: the rows that were computed. */
static moe_status check_cached_rows(moe_device *dev, moe_attention_shape s, int64_t room,
                                    moe_tensor lengths, moe_tensor out) {
  for (int64_t b = 0; dev->options.debug && b < s.batch; b++) {
    int32_t length = 0;
    MOE_TRY(moe_device_download(dev, &length, (const int32_t *)lengths.data + b, sizeof length));
    MOE_TRY(moe_device_sync(dev));
    int64_t left = room - length, rows = left < 0 ? 0 : left < s.seq ? left : s.seq;
    MOE_TRY(
        moe_check_finite(dev, "attention_cached", "out", moe_tensor_rows(out, b * s.seq, rows)));
  }
  return MOE_OK;
}

moe_status moe_attention_cached(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                moe_tensor positions, moe_tensor table, moe_tensor keys,
                                moe_tensor values, moe_tensor lengths, moe_tensor out) {
  MOE_TRY(check_cached(shape, qkv, keys, values, lengths, out));
  if (moe_tensor_present(table)) {
    MOE_TRY(check_table("attention_cached", table, positions, shape.batch * shape.seq));
    MOE_TRY(moe_check_2d("attention_cached", "table", table, MOE_IS_F32, MOE_ANY, shape.head_dim));
  }
  if (moe_tensor_count(out) == 0 || keys.shape[1] == 0) return MOE_OK;
  MOE_TRY(dev->backend->attention_cached(dev, shape, qkv, positions, table, keys, values, lengths,
                                         out));
  return check_cached_rows(dev, shape, keys.shape[1], lengths, out);
}

int64_t moe_attention_cached_scratch(moe_device *dev, moe_attention_shape shape, int64_t room,
                                     moe_dtype dtype) {
  return dev->backend->attention_cached_scratch(dev, shape, room, dtype);
}

/* ---- loss -------------------------------------------------------------------------------- */

moe_status moe_cross_entropy(moe_device *dev, moe_tensor logits, moe_tensor targets, float scale,
                             int with_grad, moe_tensor loss, moe_tensor row_loss) {
  const char *op = "cross_entropy";
  MOE_TRY(moe_check_2d(op, "logits", logits, MOE_IS_ACT, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_rule(op, logits.shape[1] > 0, "the vocabulary must not be empty"));
  MOE_TRY(moe_check_1d(op, "targets", targets, MOE_IS_I32, logits.shape[0]));
  MOE_TRY(moe_check_1d(op, "loss", loss, MOE_IS_F64, 2));
  if (moe_tensor_present(row_loss))
    MOE_TRY(moe_check_1d(op, "row_loss", row_loss, MOE_IS_F32, logits.shape[0]));
  MOE_TRY(dev->backend->cross_entropy(dev, logits, targets, scale, with_grad, loss, row_loss));
  MOE_TRY(moe_check_finite(dev, op, "loss", loss));
  return moe_check_finite(dev, op, "logits", logits);
}

/* ---- adamw ------------------------------------------------------------------------------- */

moe_status moe_clip_scale(moe_device *dev, moe_tensor sum_squares, double max_norm, double unscale,
                          moe_tensor scale) {
  MOE_TRY(moe_check_1d("clip_scale", "sum_squares", sum_squares, MOE_IS_F64, 1));
  MOE_TRY(moe_check_1d("clip_scale", "scale", scale, MOE_IS_F32, 1));
  MOE_TRY(moe_check_rule("clip_scale", max_norm >= 0.0, "max_norm must not be negative"));
  MOE_TRY(moe_check_rule("clip_scale", unscale > 0.0, "unscale must be above 0"));
  return dev->backend->clip_scale(dev, sum_squares, max_norm, unscale, scale);
}

moe_status moe_adamw_numbers(moe_adamw_args args, double lr, int64_t step, double *now) {
  MOE_TRY(moe_check_rule("adamw", step >= 1, "steps count from 1"));
  double correct2 = sqrt(1.0 - pow(args.beta2, (double)step));
  double ratio = correct2 / (1.0 - pow(args.beta1, (double)step));
  now[MOE_ADAMW_RATE] = lr * ratio;
  now[MOE_ADAMW_EPS] = args.eps * correct2;
  now[MOE_ADAMW_DECAY] = 1.0 / ratio;
  now[MOE_ADAMW_STEP] = (double)step;
  return MOE_OK;
}

moe_status moe_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                     moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                     moe_tensor weight) {
  bool halves = moe_tensor_present(weight) && weight.dtype == MOE_BF16;
  MOE_TRY(moe_check_any("adamw", "master", master, halves ? MOE_IS_LOW16 : MOE_IS_F32));
  int64_t n = moe_tensor_count(master);
  MOE_TRY(moe_check_any("adamw", "grad", grad, MOE_IS_STATE));
  MOE_TRY(moe_check_any("adamw", "m", m, MOE_IS_STATE));
  MOE_TRY(moe_check_any("adamw", "v", v, moe_same_type(m)));
  bool same = moe_tensor_count(grad) == n && moe_tensor_count(m) == n && moe_tensor_count(v) == n;
  if (moe_tensor_present(weight)) {
    MOE_TRY(moe_check_any("adamw", "weight", weight, MOE_IS_ACT));
    same = same && moe_tensor_count(weight) == n;
  }
  MOE_TRY(
      moe_check_rule("adamw", same, "grad, m, v and weight must have as many elements as master"));
  MOE_TRY(moe_check_1d("adamw", "scale", scale, MOE_IS_F32, 1));
  MOE_TRY(moe_check_1d("adamw", "now", now, MOE_IS_F64, MOE_ADAMW_NUMBERS));
  MOE_TRY(moe_check_rule("adamw", args.first >= 0, "elements count from 0"));
  MOE_TRY(moe_check_rule("adamw",
                         args.beta1 >= 0.0 && args.beta1 < 1.0 && args.beta2 >= 0.0 &&
                             args.beta2 < 1.0 && args.eps > 0.0,
                         "beta1 and beta2 must be in [0, 1) and eps above 0"));
  MOE_TRY(dev->backend->adamw(dev, args, now, grad, scale, master, m, v, weight));
  MOE_TRY(moe_check_finite(dev, "adamw", "v", v));
  return halves ? moe_check_finite(dev, "adamw", "weight", weight)
                : moe_check_finite(dev, "adamw", "master", master);
}

/* ---- decode ------------------------------------------------------------------------------ */

moe_status moe_sample(moe_device *dev, moe_tensor logits, moe_sample_args args, moe_tensor streams,
                      moe_tensor positions, moe_tensor token) {
  MOE_TRY(moe_check_2d("sample", "logits", logits, MOE_IS_F32, MOE_ANY, MOE_ANY));
  MOE_TRY(moe_check_rule("sample", logits.shape[1] > 0, "the vocabulary must not be empty"));
  MOE_TRY(moe_check_1d("sample", "streams", streams, MOE_IS_I32, logits.shape[0]));
  MOE_TRY(moe_check_1d("sample", "positions", positions, MOE_IS_I32, logits.shape[0]));
  MOE_TRY(moe_check_1d("sample", "token", token, MOE_IS_I32, logits.shape[0]));
  MOE_TRY(moe_check_rule("sample", args.temperature >= 0.0f && isfinite(args.temperature),
                         "temperature must be 0 or above"));
  MOE_TRY(moe_check_rule("sample", args.top_k >= 0, "top_k must be 0 (all) or above"));
  MOE_TRY(
      moe_check_rule("sample", args.top_p > 0.0f && args.top_p <= 1.0f, "top_p must be in (0, 1]"));
  return dev->backend->sample(dev, logits, args, streams, positions, token);
}

moe_status moe_advance(moe_device *dev, moe_tensor counts, moe_tensor by) {
  MOE_TRY(moe_check_1d("advance", "counts", counts, MOE_IS_I32, MOE_ANY));
  MOE_TRY(moe_check_1d("advance", "by", by, MOE_IS_I32, counts.shape[0]));
  return dev->backend->advance(dev, counts, by);
}
