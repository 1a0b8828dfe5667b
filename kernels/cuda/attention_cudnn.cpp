/* Attention through cuDNN's fused kernels, described with the header-only cudnn-frontend.
 *
 * A graph names its tensors by strides, so q, k and v are read where they lie inside qkv, and their
 * gradients written inside dqkv, without copies. Plans depend on the shape alone; each shape's two
 * graphs are built at set-up (building takes seconds) and kept for the device's life. */
#include "kernels/cuda/attention_cudnn.h"

#include <cudnn_frontend.h>

#include <cmath>
#include <memory>
#include <new>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/state.h"

namespace fe = cudnn_frontend;

namespace {

enum Uid : int64_t { Q = 1, K, V, O, STATS, DO, DQ, DK, DV };

using Graph = std::shared_ptr<fe::graph::Graph>;
using Attributes = std::shared_ptr<fe::graph::Tensor_attributes>;

struct Plan {
  moe_attention_shape shape;
  moe_dtype dtype;
  bool built; /* false: cuDNN has no kernel for it */
  Graph forward, backward;
  int64_t workspace;
};

} /* namespace */

struct cuda_cudnn {
  cudnnHandle_t handle;
  std::vector<Plan> plans;
};

namespace {

bool same(const moe_attention_shape &a, const moe_attention_shape &b) {
  return a.batch == b.batch && a.seq == b.seq && a.heads == b.heads && a.kv_heads == b.kv_heads &&
         a.head_dim == b.head_dim;
}

/* `heads` heads of [B, S, width], of which this tensor's first begins at the pointer it is given.
 */
Attributes heads(Graph &g, Uid uid, const moe_attention_shape &s, int64_t count, int64_t width) {
  return g->tensor(fe::graph::Tensor_attributes()
                       .set_uid(uid)
                       .set_dim({s.batch, count, s.seq, s.head_dim})
                       .set_stride({s.seq * width, s.head_dim, width, 1}));
}

void output(const Attributes &t, Uid uid, const moe_attention_shape &s, int64_t count,
            int64_t width) {
  t->set_output(true)
      .set_uid(uid)
      .set_dim({s.batch, count, s.seq, s.head_dim})
      .set_stride({s.seq * width, s.head_dim, width, 1});
}

int64_t qkv_width(const moe_attention_shape &s) {
  return (s.heads + 2 * s.kv_heads) * s.head_dim;
}

Graph new_graph(moe_dtype dtype) {
  auto g = std::make_shared<fe::graph::Graph>();
  g->set_io_data_type(dtype == MOE_BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  return g;
}

float scale_of(const moe_attention_shape &s) {
  return 1.0f / std::sqrt(static_cast<float>(s.head_dim));
}

Graph forward_graph(const moe_attention_shape &s, moe_dtype dtype) {
  Graph g = new_graph(dtype);
  int64_t width = qkv_width(s);
  auto options =
      fe::graph::SDPA_attributes().set_generate_stats(true).set_causal_mask(true).set_attn_scale(
          scale_of(s));
  auto [out, stats] = g->sdpa(heads(g, Q, s, s.heads, width), heads(g, K, s, s.kv_heads, width),
                              heads(g, V, s, s.kv_heads, width), options);
  output(out, O, s, s.heads, s.heads * s.head_dim);
  stats->set_output(true).set_uid(STATS).set_data_type(fe::DataType_t::FLOAT);
  return g;
}

Graph backward_graph(const moe_attention_shape &s, moe_dtype dtype, bool deterministic) {
  Graph g = new_graph(dtype);
  int64_t width = qkv_width(s), own = s.heads * s.head_dim;
  Attributes stats = g->tensor(fe::graph::Tensor_attributes()
                                   .set_uid(STATS)
                                   .set_dim({s.batch, s.heads, s.seq, 1})
                                   .set_stride({s.heads * s.seq, s.seq, 1, 1})
                                   .set_data_type(fe::DataType_t::FLOAT));
  auto options = fe::graph::SDPA_backward_attributes()
                     .set_causal_mask(true)
                     .set_attn_scale(scale_of(s))
                     .set_deterministic_algorithm(deterministic);
  auto [dq, dk, dv] =
      g->sdpa_backward(heads(g, Q, s, s.heads, width), heads(g, K, s, s.kv_heads, width),
                       heads(g, V, s, s.kv_heads, width), heads(g, O, s, s.heads, own),
                       heads(g, DO, s, s.heads, own), stats, options);
  output(dq, DQ, s, s.heads, width);
  output(dk, DK, s, s.kv_heads, width);
  output(dv, DV, s, s.kv_heads, width);
  return g;
}

/* Builds the graph; says why not in the trail of errors when it cannot. */
bool build(Graph &g, cudnnHandle_t handle) {
  return g->build(handle, {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK}).is_good();
}

Plan make_plan(moe_device *dev, cuda_cudnn *c, moe_attention_shape shape, moe_dtype dtype) {
  Plan p = {shape, dtype, false, nullptr, nullptr, 0};
  p.forward = forward_graph(shape, dtype);
  p.backward = backward_graph(shape, dtype, dev->options.deterministic);
  p.built = build(p.forward, c->handle) && build(p.backward, c->handle);
  int64_t sizes[2] = {0, 0};
  if (p.built) {
    p.built = p.forward->get_workspace_size(sizes[0]).is_good() &&
              p.backward->get_workspace_size(sizes[1]).is_good();
  }
  p.workspace = sizes[0] > sizes[1] ? sizes[0] : sizes[1];
  return p;
}

cuda_cudnn *open(moe_device *dev) {
  cuda_state *state = cuda_of(dev);
  if (state->cudnn != nullptr) return state->cudnn;
  auto *c = new (std::nothrow) cuda_cudnn{nullptr, {}};
  if (c == nullptr) return nullptr;
  if (cudnnCreate(&c->handle) != CUDNN_STATUS_SUCCESS ||
      cudnnSetStream(c->handle, state->stream) != CUDNN_STATUS_SUCCESS) {
    if (c->handle != nullptr) cudnnDestroy(c->handle);
    delete c;
    return nullptr;
  }
  state->cudnn = c;
  return c;
}

/* The plan of a shape, made at the first question. NULL: cuDNN cannot be used. */
const Plan *plan_of(moe_device *dev, moe_attention_shape shape, moe_dtype dtype) {
  cuda_cudnn *c = open(dev);
  if (c == nullptr) return nullptr;
  for (const Plan &p : c->plans)
    if (p.dtype == dtype && same(p.shape, shape)) return p.built ? &p : nullptr;
  c->plans.reserve(64); /* so that what was handed out stays where it is */
  if (c->plans.size() == 64) return nullptr;
  c->plans.push_back(make_plan(dev, c, shape, dtype));
  return c->plans.back().built ? &c->plans.back() : nullptr;
}

char *at(moe_tensor t, int64_t elements) {
  return static_cast<char *>(t.data) + elements * moe_dtype_size(t.dtype);
}

moe_status execute(moe_device *dev, const Plan *p, const Graph &g,
                   std::unordered_map<int64_t, void *> &pointers, const char *what) {
  void *workspace = moe_device_scratch(dev, p->workspace);
  if (p->workspace > 0 && workspace == nullptr)
    return moe_fail(MOE_INVALID, "%s: the scratch that was planned is too small for cuDNN", what);
  fe::error_t error = g->execute(cuda_of(dev)->cudnn->handle, pointers, workspace);
  if (error.is_good()) return MOE_OK;
  return moe_fail(MOE_FAILED, "cuDNN: %s: %s: MOE_ATTENTION=own in the environment avoids it", what,
                  error.get_message().c_str());
}

} /* namespace */

bool cuda_cudnn_fits(moe_device *dev, moe_attention_shape shape, moe_dtype dtype) {
  if (dtype == MOE_F32 || cuda_of(dev)->arch < 80) return false;
  if (shape.head_dim % 8 != 0 || shape.head_dim > 128 || shape.seq < 2) return false;
  try {
    return plan_of(dev, shape, dtype) != nullptr;
  } catch (const std::exception &) {
    return false;
  }
}

int64_t cuda_cudnn_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype) {
  const Plan *p = plan_of(dev, shape, dtype);
  return p != nullptr ? p->workspace : 0;
}

moe_status cuda_cudnn_attention(moe_device *dev, moe_attention_shape s, moe_tensor qkv,
                                moe_tensor out, moe_tensor lse) {
  const Plan *p = plan_of(dev, s, qkv.dtype);
  std::unordered_map<int64_t, void *> pointers = {{Q, qkv.data},
                                                  {K, at(qkv, s.heads * s.head_dim)},
                                                  {V, at(qkv, (s.heads + s.kv_heads) * s.head_dim)},
                                                  {O, out.data},
                                                  {STATS, lse.data}};
  return execute(dev, p, p->forward, pointers, "attention");
}

moe_status cuda_cudnn_attention_backward(moe_device *dev, moe_attention_shape s, moe_tensor dout,
                                         moe_tensor qkv, moe_tensor out, moe_tensor lse,
                                         moe_tensor dqkv) {
  const Plan *p = plan_of(dev, s, qkv.dtype);
  int64_t keys = s.heads * s.head_dim, values = (s.heads + s.kv_heads) * s.head_dim;
  std::unordered_map<int64_t, void *> pointers = {
      {Q, qkv.data},   {K, at(qkv, keys)},   {V, at(qkv, values)},
      {O, out.data},   {DO, dout.data},      {STATS, lse.data},
      {DQ, dqkv.data}, {DK, at(dqkv, keys)}, {DV, at(dqkv, values)}};
  return execute(dev, p, p->backward, pointers, "attention_backward");
}

void cuda_cudnn_close(moe_device *dev) {
  cuda_cudnn *c = cuda_of(dev)->cudnn;
  if (c == nullptr) return;
  c->plans.clear();
  cudnnDestroy(c->handle);
  delete c;
  cuda_of(dev)->cudnn = nullptr;
}
