/* Worker: whoever reads experts' weights after an update waits for all he reads.
 *
 *     mpi_arrival      all ranks are replicas, with sharded optimizer state
 *
 * On a CPU weights are there at once, but what is waited for is counted as on a GPU: nothing by the
 * update, everything by each pass that uses the weights. */
#include "core/train/step.h"
#include "tests/mpi/worker.h"

enum { SEQ = 16 };

static void make_config(moe_config *c, int ranks) {
  static const char *const settings[] = {"model.preset=tiny",       "model.num_layers=3",
                                         "data.sequence_length=16", "train.micro_batch=1",
                                         "parallel.ep=1",           "parallel.zero1=true"};
  moe_config_defaults(c);
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
    OK(moe_config_set(c, settings[i]));
  OK(moe_config_resolve(c, ranks));
}

static moe_batch make_batch(int rank) {
  static int32_t tokens[SEQ], targets[SEQ], positions[SEQ];
  for (int i = 0; i < SEQ; i++)
    tokens[i] = (7 * i + rank) % 50, targets[i] = (7 * i + 7 + rank) % 50, positions[i] = i;
  return (moe_batch){
      .batch = 1, .seq = SEQ, .tokens = tokens, .targets = targets, .positions = positions};
}

static void train_step(moe_engine *e, const moe_batch *batch, int64_t step) {
  moe_step_result result;
  OK(moe_step_begin(e, 1e-3, step));
  OK(moe_step_micro_batch(e, batch));
  OK(moe_step_end(e, &result));
  REQUIRE(result.finite);
}

/* Every reader in turn is the first one after an update; the last update has none. */
static void check_readers(moe_engine *e, const moe_batch *batch) {
  const moe_pool_gather *gather = moe_model_gather(e->model, MOE_POOL_EXPERT);
  double loss[2] = {0.0, 0.0};
  float *logits = calloc((size_t)(SEQ * e->config.model.vocab_size), sizeof *logits);
  REQUIRE(gather && logits);
  REQUIRE(gather->awaited == MOE_GATHER_MARKS); /* nothing has travelled yet */
  train_step(e, batch, 1);
  REQUIRE(gather->awaited == 0);
  OK(moe_model_evaluate(e->model, batch, loss));
  REQUIRE(gather->awaited == MOE_GATHER_MARKS);
  train_step(e, batch, 2);
  OK(moe_model_logits(e->model, batch, logits));
  REQUIRE(gather->awaited == MOE_GATHER_MARKS);
  train_step(e, batch, 3);
  OK(moe_model_load(e->model, batch));
  OK(moe_model_forward(e->model, 0, 1.0));
  REQUIRE(gather->awaited == MOE_GATHER_MARKS);
  train_step(e, batch, 4);
  REQUIRE(gather->awaited == 0);
  free(logits);
}

/* All replicas have the same weights, bit by bit, and they are not those of the beginning. */
static void check_same(const moe_engine *e, const float *before) {
  moe_tensor weights = moe_model_weights(e->model, MOE_POOL_EXPERT);
  moe_tensor first = worker_tensor(MOE_F32, 1, weights.shape[0]);
  size_t bytes = (size_t)moe_tensor_bytes(weights);
  memcpy(first.data, weights.data, bytes);
  OK(moe_comm_broadcast(e->world, first, 0));
  REQUIRE(memcmp(first.data, weights.data, bytes) == 0);
  REQUIRE(memcmp(before, weights.data, bytes) != 0);
  free(first.data);
}

int main(int argc, char **argv) {
  static moe_config config;
  moe_engine e;
  worker w = worker_open(&argc, &argv);
  make_config(&config, w.size);
  moe_batch batch = make_batch(w.rank);
  OK(moe_engine_create(&config, w.dev, true, false, &e));
  OK(moe_optimizer_init_weights(e.optimizer, 1));
  moe_tensor weights = moe_model_weights(e.model, MOE_POOL_EXPERT);
  moe_tensor before = worker_tensor(MOE_F32, 1, weights.shape[0]);
  memcpy(before.data, weights.data, (size_t)moe_tensor_bytes(weights));
  check_readers(&e, &batch);
  check_same(&e, before.data);
  moe_engine_destroy(&e);
  free(before.data);
  worker_close(&w);
  return 0;
}
