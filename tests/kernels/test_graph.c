/* Device graphs: recorded work runs when launched, reads memory anew each time, and what cannot be
 * recorded is refused in words. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "kernels/backend.h"
#include "tests/support/op_check.h"

static void without(moe_device *dev) {
  moe_graph *graph = NULL;
  bool debug = dev->options.debug;
  dev->options.debug = true; /* whose checks wait */
  op_require(!moe_device_has_graphs(dev), "debug mode");
  op_refuses(MOE_INVALID, "records none: ask moe_device_has_graphs", moe_device_graph_begin(dev));
  dev->options.debug = debug;
  op_refuses(MOE_INVALID, "graph: none is being recorded", moe_device_graph_end(dev, &graph));
  op_refuses(MOE_INVALID, "graph: none was recorded", moe_device_graph_launch(dev, NULL));
  moe_graph_destroy(dev, NULL);
  if (dev->backend->is_host) op_require(!moe_device_has_graphs(dev), "the CPU's work is immediate");
}
Test(graph, is_refused_where_there_are_none) {
  op_each_device(without);
}

static void repeats(moe_device *dev, moe_dtype act) {
  if (!moe_device_has_graphs(dev)) return;
  op_tensor x = op_filled(dev, "x", act, OP_SHAPE(1000), 1.0);
  op_tensor y = op_filled(dev, "y", act, OP_SHAPE(1000), 2.0);
  moe_graph *graph;
  op_ok(moe_add(dev, y.t, x.t));
  op_ok(moe_device_graph_begin(dev));
  op_refuses(MOE_INVALID, "one is being recorded already", moe_device_graph_begin(dev));
  op_ok(moe_add(dev, y.t, x.t));
  op_ok(moe_scale(dev, x.t, 2.0f));
  op_ok(moe_device_graph_end(dev, &graph));
  double *want = op_doubles(1000);
  for (int i = 0; i < 1000; i++) want[i] = 3.0; /* recorded, not run */
  op_equal(y, want);
  for (int n = 0; n < 3; n++) op_ok(moe_device_graph_launch(dev, graph));
  for (int i = 0; i < 1000; i++) want[i] = 3.0 + 1.0 + 2.0 + 4.0;
  op_equal(y, want);
  moe_graph_destroy(dev, graph);
}
Test(graph, runs_when_launched_and_reads_memory_anew) {
  op_each(repeats);
}

/* Products of f32 go by cuBLAS, whose sizes the host must know: a graph would repeat them. */
static void sizes(moe_device *dev) {
  enum { ROWS = 4, D = 8, F = 8 };
  if (!moe_device_has_graphs(dev)) return;
  op_tensor x = op_random(dev, "x", MOE_F32, OP_SHAPE(ROWS, D), 1.0);
  op_tensor offsets = op_ints(dev, "offsets", OP_SHAPE(2), (int32_t[]){0, ROWS});
  op_tensor w13 = op_random(dev, "w13", MOE_F32, OP_SHAPE(1, 2 * F, D), 1.0);
  op_tensor gates = op_filled(dev, "gates", MOE_F32, OP_SHAPE(ROWS), 1.0);
  op_tensor gu = op_output(dev, "gu", MOE_F32, OP_SHAPE(ROWS, 2 * F));
  op_tensor a = op_output(dev, "a", MOE_F32, OP_SHAPE(ROWS, F));
  op_scratch(dev, moe_expert_scratch(dev, ROWS, D, F, MOE_F32));
  moe_graph *graph;
  for (int known = 0; known <= 1; known++) { /* a call that is not recorded makes them known */
    op_ok(moe_device_graph_begin(dev));
    op_refuses(MOE_INVALID, "cannot be recorded",
               moe_expert_up(dev, x.t, offsets.t, w13.t, gates.t, MOE_GU_VALUES, gu.t, a.t));
    op_ok(moe_device_graph_end(dev, &graph));
    moe_graph_destroy(dev, graph);
    op_ok(moe_expert_up(dev, x.t, offsets.t, w13.t, gates.t, MOE_GU_VALUES, gu.t, a.t));
  }
}
Test(graph, refuses_sizes_that_the_host_must_know) {
  op_each_device(sizes);
}

static void faults(moe_device *dev) {
  if (!moe_device_has_graphs(dev)) return;
  op_tensor x = op_filled(dev, "x", MOE_F32, OP_SHAPE(10), 1.0);
  moe_graph *graph;
  op_ok(moe_device_graph_begin(dev));
  op_ok(moe_scale(dev, x.t, 2.0f));
  op_refuses(MOE_INVALID, "cannot be waited for", moe_device_sync(dev));
  op_refuses(MOE_INVALID, "the device was waited for while it was recorded",
             moe_device_graph_end(dev, &graph));
  op_require(graph == NULL, "no graph comes of it");
  op_ok(moe_device_graph_begin(dev));
  op_require(moe_device_alloc(dev, 100) == NULL, "memory while recording");
  op_refuses(MOE_INVALID, "device memory was asked for", moe_device_graph_end(dev, &graph));
  op_ok(moe_scale(dev, x.t, 3.0f)); /* the stream is whole again */
  double want[10] = {3, 3, 3, 3, 3, 3, 3, 3, 3, 3};
  op_equal(x, want);
}
Test(graph, refuses_waiting_and_memory_while_recording) {
  op_each_device(faults);
}
