/* Micro-batches, prepared ahead by one thread.
 *
 * A ring of slots between the thread and moe_loader_next. `filled` and `taken` only grow; slot
 * number k is slot[k % slots], and there is one slot more than `prefetch`, for the batch the caller
 * still holds. A seek bumps `generation`: what the thread was making for the old one is thrown
 * away. Messages of moe_fail belong to a thread, so a failed slot carries its text across. */
#include "data/loader.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/place.h"
#include "data/samples.h"

typedef struct {
  moe_batch batch;
  int32_t *memory; /* tokens, targets, positions, doc_start: [T] each */
  int64_t *sample_index;
  moe_status status;
  char *message; /* of a failure */
} slot;

struct moe_loader {
  moe_samples *samples;
  int rank, world;
  int64_t micro_batch, global_batch, seq;
  bool document_mask;
  int slots;
  slot *slot;
  int32_t *window; /* the thread's room for one sample */

  pthread_t thread;
  bool started;
  pthread_mutex_t lock; /* over all below */
  pthread_cond_t changed;
  bool quit, failed; /* failed: the thread rests until a seek */
  int64_t generation, filled, taken;
  int64_t next_call; /* micro-batch number, over all steps, that the thread makes next */
};

/* ---- filling a slot: the thread, outside the lock ---- */

static moe_sample_row row_of(const moe_loader *l, const slot *to, int64_t b) {
  int64_t array = l->micro_batch * l->seq;
  int32_t *at = to->memory + b * l->seq;
  return (moe_sample_row){at, at + array, at + 2 * array, l->document_mask ? at + 3 * array : NULL};
}

/* As global_batch = accumulation * micro_batch * world, the formula in loader.h is linear in the
 * number of micro-batches so far. */
static void fill(moe_loader *l, slot *to, int64_t call) {
  to->status = MOE_OK;
  for (int64_t b = 0; b < l->micro_batch && to->status == MOE_OK; b++) {
    int64_t g = (call * l->world + l->rank) * l->micro_batch + b;
    to->sample_index[b] = g;
    to->status = moe_samples_read(l->samples, g, l->window, row_of(l, to, b));
  }
  if (to->status == MOE_OK) return;
  free(to->message);
  to->message = strdup(moe_error_message());
}

static bool may_fill(const moe_loader *l) {
  return !l->failed && l->filled - l->taken < l->slots - 1;
}

static void *prefetch(void *context) {
  moe_loader *l = context;
  pthread_mutex_lock(&l->lock);
  while (!l->quit) {
    if (!may_fill(l)) {
      pthread_cond_wait(&l->changed, &l->lock);
      continue;
    }
    slot *to = &l->slot[l->filled % l->slots];
    int64_t call = l->next_call, generation = l->generation;
    pthread_mutex_unlock(&l->lock);
    fill(l, to, call);
    pthread_mutex_lock(&l->lock);
    if (generation != l->generation) continue;
    l->filled++;
    l->next_call++;
    l->failed = to->status != MOE_OK;
    pthread_cond_broadcast(&l->changed);
  }
  pthread_mutex_unlock(&l->lock);
  return NULL;
}

/* ---- create, destroy ---- */

static moe_status allocate(moe_loader *l) {
  int64_t array, all, bytes;
  if (__builtin_mul_overflow(l->micro_batch, l->seq, &array) ||
      __builtin_mul_overflow(array, 4, &all) ||
      __builtin_mul_overflow(all, (int64_t)sizeof(int32_t), &bytes))
    return moe_fail(MOE_USAGE, "micro-batch of %" PRId64 " x %" PRId64 " tokens is too large",
                    l->micro_batch, l->seq);
  l->slot = calloc((size_t)l->slots, sizeof *l->slot);
  l->window = malloc(((size_t)l->seq + 1) * sizeof *l->window);
  bool enough = l->slot && l->window;
  for (int i = 0; enough && i < l->slots; i++) {
    slot *s = &l->slot[i];
    s->memory = malloc((size_t)bytes);
    s->sample_index = malloc((size_t)l->micro_batch * sizeof *s->sample_index);
    enough = s->memory && s->sample_index;
    s->batch = (moe_batch){.batch = l->micro_batch,
                           .seq = l->seq,
                           .tokens = s->memory,
                           .targets = s->memory + array,
                           .positions = s->memory + 2 * array,
                           .doc_start = l->document_mask ? s->memory + 3 * array : NULL,
                           .sample_index = s->sample_index};
  }
  if (enough) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY,
                  "out of memory: %d prefetched micro-batches of %" PRId64
                  " tokens: lower data.prefetch or train.micro_batch",
                  l->slots, array);
}

static moe_status check_batches(const moe_loader *l) {
  int64_t together = l->micro_batch * l->world;
  if (l->micro_batch < 1 || l->world < 1 || l->rank < 0 || l->rank >= l->world)
    return moe_fail(MOE_INVALID, "micro_batch %" PRId64 ", rank %d of %d", l->micro_batch, l->rank,
                    l->world);
  if (l->global_batch % together != 0)
    return moe_fail(MOE_USAGE,
                    "train.global_batch %" PRId64 " is not a multiple of micro_batch %" PRId64
                    " x %d ranks: choose one that is",
                    l->global_batch, l->micro_batch, l->world);
  return MOE_OK;
}

static moe_status start(moe_loader *l) {
  pthread_mutex_init(&l->lock, NULL);
  pthread_cond_init(&l->changed, NULL);
  int error = pthread_create(&l->thread, NULL, prefetch, l);
  if (error) return moe_fail(MOE_FAILED, "cannot start the loader's thread: %s", strerror(error));
  l->started = true;
  return MOE_OK;
}

moe_status moe_loader_create(const moe_config *config, moe_split split, int rank, int world,
                             moe_loader **out) {
  *out = NULL;
  moe_loader *l = calloc(1, sizeof *l);
  if (!l) return moe_fail(MOE_NO_MEMORY, "out of memory: loader");
  l->rank = rank;
  l->world = world;
  l->micro_batch = config->train.micro_batch;
  l->global_batch = config->train.global_batch;
  if (l->global_batch == 0) l->global_batch = l->micro_batch * world;
  l->document_mask = config->data.document_mask;
  l->slots = (int)(config->data.prefetch < 1 ? 1 : config->data.prefetch) + 1;
  moe_status status;
  MOE_TRY_OR(status, failed, check_batches(l));
  MOE_TRY_OR(status, failed, moe_samples_open(config, split, &l->samples));
  l->seq = moe_samples_sequence_length(l->samples);
  MOE_TRY_OR(status, failed, allocate(l));
  MOE_TRY_OR(status, failed, start(l));
  *out = l;
  return MOE_OK;
failed:
  moe_loader_destroy(l);
  return status;
}

void moe_loader_destroy(moe_loader *l) {
  if (!l) return;
  if (l->started) {
    pthread_mutex_lock(&l->lock);
    l->quit = true;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
  }
  for (int i = 0; l->slot && i < l->slots; i++) {
    free(l->slot[i].memory);
    free(l->slot[i].sample_index);
    free(l->slot[i].message);
  }
  free(l->slot);
  free(l->window);
  moe_samples_close(l->samples);
  free(l);
}

/* ---- use ---- */

moe_status moe_loader_seek(moe_loader *l, int64_t step) {
  int64_t first;
  if (step < 0 || __builtin_mul_overflow(step, l->global_batch, &first))
    return moe_fail(MOE_INVALID, "seek to step %" PRId64, step);
  pthread_mutex_lock(&l->lock);
  l->generation++;
  l->filled = l->taken;
  l->next_call = first / (l->micro_batch * l->world);
  l->failed = false;
  pthread_cond_broadcast(&l->changed);
  pthread_mutex_unlock(&l->lock);
  return MOE_OK;
}

/* A failed slot is not taken: every further call gives the same answer, until a seek. */
moe_status moe_loader_next(moe_loader *l, moe_batch *out) {
  moe_place_wait("reading data");
  pthread_mutex_lock(&l->lock);
  while (l->filled == l->taken) pthread_cond_wait(&l->changed, &l->lock);
  moe_place_return();
  const slot *from = &l->slot[l->taken % l->slots];
  if (from->status == MOE_OK) {
    l->taken++;
    pthread_cond_broadcast(&l->changed);
  }
  pthread_mutex_unlock(&l->lock);
  if (from->status != MOE_OK)
    return moe_fail(from->status, "%s", from->message ? from->message : "reading a sample failed");
  *out = from->batch;
  return MOE_OK;
}

int64_t moe_loader_epoch_samples(const moe_loader *l) {
  return moe_samples_epoch(l->samples);
}

int64_t moe_loader_tokens(const moe_loader *l) {
  return moe_samples_tokens(l->samples);
}

uint64_t moe_loader_fingerprint(const moe_loader *l) {
  return moe_samples_fingerprint(l->samples);
}
