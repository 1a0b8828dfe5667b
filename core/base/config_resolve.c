/* Presets, and the checks that need more than one key.
 *
 * Each contradiction names the key to change, where both sides were set, and values that work. */
#include <stdio.h>
#include <string.h>

#include "core/base/config_rows.h"

/* ---- presets ------------------------------------------------------------------------------- */

typedef struct {
  int64_t vocab, hidden, layers, heads, kv_heads, head_dim, experts, top_k, ffn, context;
} preset;

/* In the order of model.preset's choices. */
static const preset presets[] = {
    /*  V     D   L   H  G   d   E  K    F  context */
    {1000, 64, 2, 4, 1, 16, 4, 2, 256, 512},         /* tiny */
    {4096, 256, 4, 4, 1, 64, 16, 4, 512, 1024},      /* small */
    {32000, 768, 4, 12, 1, 64, 16, 4, 6144, 32768},  /* 1b */
    {32000, 768, 30, 12, 1, 64, 16, 4, 6144, 32768}, /* 6.9b */
};

static void fill(moe_config *c, const char *section, const char *key, int64_t value,
                 const char *origin) {
  int row = moe_config_find(section, key);
  int64_t *member = moe_config_member_of(c, row);
  if (*member != 0) return;
  *member = value;
  snprintf(c->origin[row], MOE_CONFIG_TEXT, "%s", origin);
}

static void fill_from_preset(moe_config *c) {
  const preset *p = &presets[c->model.preset];
  char name[MOE_CONFIG_TEXT], origin[64];
  moe_config_value_text(c, moe_config_find("model", "preset"), name);
  snprintf(origin, sizeof origin, "preset %.32s", name);
  fill(c, "model", "vocab_size", p->vocab, origin);
  fill(c, "model", "hidden_size", p->hidden, origin);
  fill(c, "model", "num_layers", p->layers, origin);
  fill(c, "model", "num_heads", p->heads, origin);
  fill(c, "model", "num_kv_heads", p->kv_heads, origin);
  fill(c, "model", "head_dim", p->head_dim, origin);
  fill(c, "model", "num_experts", p->experts, origin);
  fill(c, "model", "top_k", p->top_k, origin);
  fill(c, "model", "ffn_size", p->ffn, origin);
  fill(c, "model", "context", p->context, origin);
  fill(c, "data", "sequence_length", c->model.context, "model.context");
}

/* ---- checks -------------------------------------------------------------------------------- */

static moe_status check_model(const moe_config *c) {
  int64_t heads = c->model.num_heads, groups = c->model.num_kv_heads;
  if (heads % groups != 0)
    return moe_config_conflict(c, "model", "num_heads",
                               "not a multiple of num_kv_heads = %lld (%s): use %lld or %lld, or a "
                               "num_kv_heads that divides it, as 1",
                               (long long)groups, moe_config_origin(c, "model", "num_kv_heads"),
                               (long long)(heads > groups ? heads / groups * groups : groups),
                               (long long)((heads / groups + 1) * groups));
  if (c->model.head_dim % 2 != 0)
    return moe_config_conflict(c, "model", "head_dim",
                               "odd, but rotary embedding turns pairs: use %lld or %lld",
                               (long long)(c->model.head_dim > 1 ? c->model.head_dim - 1 : 2),
                               (long long)c->model.head_dim + 1);
  if (c->model.head_dim == 2 && c->model.rope_alpha != 1.0)
    return moe_config_conflict(c, "model", "rope_alpha",
                               "its exponent d/(d-2) is infinite at head_dim = 2 (%s): use "
                               "head_dim of 4 or more, or rope_alpha = 1",
                               moe_config_origin(c, "model", "head_dim"));
  if (c->model.top_k > c->model.num_experts)
    return moe_config_conflict(
        c, "model", "top_k", "more than num_experts = %lld (%s): use at most %lld",
        (long long)c->model.num_experts, moe_config_origin(c, "model", "num_experts"),
        (long long)c->model.num_experts);
  /* Later code multiplies sizes in 64 bits; nobody holds 10^15 parameters. */
  double experts = (double)c->model.num_experts * (double)c->model.ffn_size * 3.0;
  double attention = 2.0 * (double)(heads + groups) * (double)c->model.head_dim;
  double width =
      (double)c->model.num_layers * (experts + attention) + 2.0 * (double)c->model.vocab_size;
  if (width * (double)c->model.hidden_size > 1e15)
    return moe_config_conflict(c, "model", "num_layers",
                               "the sizes make %.3g parameters: use smaller ones, at most 1e15 in "
                               "all",
                               width * (double)c->model.hidden_size);
  return MOE_OK;
}

static moe_status check_batch(const moe_config *c) {
  if (c->data.sequence_length > c->model.context)
    return moe_config_conflict(
        c, "data", "sequence_length",
        "longer than [model] context = %lld (%s): use at most %lld, or raise "
        "context (and rope_alpha, if the weights come from a shorter one)",
        (long long)c->model.context, moe_config_origin(c, "model", "context"),
        (long long)c->model.context);
  /* Rows of the expert exchange are counted in 32 bits. */
  int64_t most = INT32_MAX / (c->data.sequence_length * c->model.top_k);
  if (c->train.micro_batch > most)
    return moe_config_conflict(
        c, "train", "micro_batch",
        "micro_batch * sequence_length * top_k = %lld * %lld * %lld is above "
        "%d: use a micro_batch of at most %lld and a larger global_batch",
        (long long)c->train.micro_batch, (long long)c->data.sequence_length,
        (long long)c->model.top_k, INT32_MAX, (long long)most);
  if (c->train.eval_interval > 0 && c->data.valid[0] == '\0' && c->data.valid_fraction == 0.0)
    return moe_config_conflict(
        c, "train", "eval_interval",
        "nothing to evaluate on, [data] valid is empty and valid_fraction is "
        "0 (%s): set one of them, or eval_interval = 0",
        moe_config_origin(c, "data", "valid_fraction"));
  return MOE_OK;
}

static moe_status check_train(const moe_config *c) {
  if (c->train.recompute_layers > c->model.num_layers)
    return moe_config_conflict(c, "train", "recompute_layers",
                               "more than [model] num_layers = %lld (%s): use at most %lld, or 0 "
                               "for all",
                               (long long)c->model.num_layers,
                               moe_config_origin(c, "model", "num_layers"),
                               (long long)c->model.num_layers);
  if (c->train.recompute_layers > 0 && c->train.recompute == MOE_RECOMPUTE_NONE)
    return moe_config_conflict(c, "train", "recompute_layers",
                               "nothing is recomputed with recompute = none (%s): set recompute to "
                               "swiglu, experts or block, or recompute_layers = 0",
                               moe_config_origin(c, "train", "recompute"));
  double kept = c->train.capacity_factor * (double)c->train.micro_batch *
                (double)c->data.sequence_length * (double)c->model.top_k /
                (double)c->model.num_experts;
  if (c->train.capacity_factor > 0.0 && kept < 1.0)
    return moe_config_conflict(c, "train", "capacity_factor",
                               "an expert would keep no token at all: use 1 or more, or 0 for "
                               "dropless");
  return MOE_OK;
}

static moe_status check_optim(const moe_config *c) {
  char lr[MOE_CONFIG_REAL];
  if (c->optim.min_lr < 0.0 && c->optim.min_lr != -1.0)
    return moe_config_conflict(c, "optim", "min_lr",
                               "negative: use 0 or more, or -1 for a tenth of lr");
  if (c->optim.min_lr > c->optim.lr)
    return moe_config_conflict(
        c, "optim", "min_lr",
        "above the peak lr = %s (%s): use at most that, or -1 for a tenth of "
        "it",
        moe_config_real_text(c->optim.lr, lr), moe_config_origin(c, "optim", "lr"));
  int64_t steps = c->train.steps;
  if (steps == 0) return MOE_OK; /* nothing is trained, so no schedule to contradict */
  if (c->optim.warmup_steps > steps)
    return moe_config_conflict(c, "optim", "warmup_steps",
                               "longer than the run, [train] steps = %lld (%s): use at most %lld, "
                               "as %lld, a tenth of it",
                               (long long)steps, moe_config_origin(c, "train", "steps"),
                               (long long)steps, (long long)(steps / 10));
  if (c->optim.schedule == MOE_SCHEDULE_WSD && c->optim.decay_steps > steps - c->optim.warmup_steps)
    return moe_config_conflict(
        c, "optim", "decay_steps",
        "longer than what warmup_steps = %lld (%s) leaves of [train] steps = "
        "%lld (%s): use at most %lld, or 0 for a tenth of the run",
        (long long)c->optim.warmup_steps, moe_config_origin(c, "optim", "warmup_steps"),
        (long long)steps, moe_config_origin(c, "train", "steps"),
        (long long)(steps - c->optim.warmup_steps));
  return MOE_OK;
}

static moe_status check_global_batch(const moe_config *c, int world) {
  int64_t unit = c->train.micro_batch * world;
  int64_t below = c->train.global_batch / unit * unit;
  if (c->train.global_batch == below) return MOE_OK;
  char values[64];
  if (below > 0)
    snprintf(values, sizeof values, "%lld or %lld", (long long)below, (long long)(below + unit));
  else
    snprintf(values, sizeof values, "%lld", (long long)unit);
  return moe_config_conflict(c, "train", "global_batch",
                             "not a multiple of micro_batch * ranks = %lld * %d = %lld "
                             "(micro_batch: %s): use %s, or another micro_batch or number of ranks",
                             (long long)c->train.micro_batch, world, (long long)unit,
                             moe_config_origin(c, "train", "micro_batch"), values);
}

static moe_status check_ep(const moe_config *c, int world) {
  int64_t ep = c->parallel.ep, experts = c->model.num_experts;
  if (ep == 0 || (world % ep == 0 && ep <= experts)) return MOE_OK;
  char values[256];
  size_t used = 0;
  for (int64_t i = 1; i <= world && i <= experts && used + 32 < sizeof values; i++)
    if (world % i == 0)
      used += (size_t)snprintf(values + used, sizeof values - used, "%s%lld", used > 0 ? ", " : "",
                               (long long)i);
  return moe_config_conflict(c, "parallel", "ep",
                             "must divide the %d ranks and be at most num_experts = %lld (%s): use "
                             "%s, or 0 for the largest of them",
                             world, (long long)experts,
                             moe_config_origin(c, "model", "num_experts"), values);
}

/* A sum in bf16 is rounded at every addition, so there must be none; and a product's sums leave the
 * matrix units as its own type or as f32. */
static moe_status check_grad_type(const moe_config *c) {
  char dtype[MOE_CONFIG_TEXT];
  if (c->precision.grad_dtype != MOE_STATE_BF16 || c->precision.dtype == MOE_PRECISION_BF16)
    return MOE_OK;
  moe_config_value_text(c, moe_config_find("precision", "dtype"), dtype);
  return moe_config_conflict(c, "precision", "grad_dtype",
                             "the compute type is dtype = %.8s (%s): use grad_dtype = fp32, or "
                             "dtype = bf16",
                             dtype, moe_config_origin(c, "precision", "dtype"));
}

static moe_status check_grad_sums(const moe_config *c, int world) {
  int64_t per_pass = c->train.micro_batch * world;
  if (c->precision.grad_dtype != MOE_STATE_BF16 || moe_config_allows_bf16_grads(c, world))
    return MOE_OK;
  return moe_config_conflict(c, "precision", "grad_dtype",
                             "global_batch = %lld (%s) makes %lld micro-batches per step, whose "
                             "sum would be rounded at every addition: use grad_dtype = fp32, or "
                             "global_batch = %lld",
                             (long long)c->train.global_batch,
                             moe_config_origin(c, "train", "global_batch"),
                             (long long)(c->train.global_batch / per_pass), (long long)per_pass);
}

moe_status moe_config_resolve(moe_config *c, int world) {
  fill_from_preset(c);
  MOE_TRY(check_model(c));
  MOE_TRY(check_batch(c));
  MOE_TRY(check_train(c));
  MOE_TRY(check_optim(c));
  MOE_TRY(check_grad_type(c));
  if (world < 1) return MOE_OK;
  fill(c, "train", "global_batch", c->train.micro_batch * world, "micro_batch * ranks");
  MOE_TRY(check_global_batch(c, world));
  MOE_TRY(check_grad_sums(c, world));
  return check_ep(c, world);
}

moe_dtype moe_config_compute_dtype(const moe_config *c) {
  switch (c->precision.dtype) {
  case MOE_PRECISION_BF16:
    return MOE_BF16;
  case MOE_PRECISION_FP16:
    return MOE_F16;
  default:
    return MOE_F32;
  }
}

static moe_dtype state_dtype(int choice) {
  return choice == MOE_STATE_BF16 ? MOE_BF16 : MOE_F32;
}

moe_dtype moe_config_grad_dtype(const moe_config *c) {
  return state_dtype(c->precision.grad_dtype);
}

moe_dtype moe_config_moment_dtype(const moe_config *c) {
  return state_dtype(c->precision.moment_dtype);
}

bool moe_config_allows_bf16_grads(const moe_config *c, int world) {
  return c->precision.dtype == MOE_PRECISION_BF16 &&
         c->train.global_batch <= c->train.micro_batch * world;
}
