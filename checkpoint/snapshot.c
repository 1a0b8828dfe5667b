/* The ring between the training thread and the writing one.
 *
 * Three counters of bytes since the beginning: `queued` copies were asked for, `ready` have
 * arrived, `taken` are with the writer. Copies are queued on the device and waited for a group at a
 * time, so that a GPU copies without pause while the writer begins with what is there. */
#include "checkpoint/snapshot.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/shard.h"
#include "core/base/log.h"
#include "kernels/ops.h"

enum { LEAST = 1 << 20, GROUP = 256 << 20 };

struct moe_snapshot {
  moe_device *dev;
  char *ring;
  int64_t size;
  const moe_piece *pieces;
  int n;
  int64_t queued; /* of the filling thread alone */
  pthread_mutex_t lock;
  pthread_cond_t moved;
  /* under the lock */
  int64_t ready, taken;
  bool broken; /* filling failed */
  bool left;   /* the writer takes no more */
};

moe_status moe_snapshot_create(moe_device *dev, int64_t bytes, moe_snapshot **out) {
  char have[MOE_TEXT], want[MOE_TEXT];
  moe_snapshot *s = calloc(1, sizeof *s);
  *out = NULL;
  if (!s) return moe_fail(MOE_NO_MEMORY, "no memory for a snapshot");
  s->dev = dev;
  s->size = bytes > 0 ? (bytes + LEAST - 1) / LEAST * LEAST : LEAST;
  while (s->size >= LEAST && !(s->ring = moe_device_alloc_host(dev, s->size))) s->size /= 2;
  if (!s->ring) {
    free(s);
    return moe_fail(MOE_NO_MEMORY, "not even %d bytes of host memory for snapshots", LEAST);
  }
  if (s->size < bytes)
    moe_warn("only %s of %s of host memory for snapshots could be had: training waits for the disk "
             "during a part of each save",
             moe_text_bytes(have, (double)s->size), moe_text_bytes(want, (double)bytes));
  /* Memory is only promised until it is written: have it now. */
  if (moe_device_is_host(dev)) (void)moe_zero(dev, moe_tensor_1d(s->ring, MOE_F32, s->size / 4));
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->moved, NULL);
  *out = s;
  return MOE_OK;
}

void moe_snapshot_destroy(moe_snapshot *s) {
  if (!s) return;
  pthread_cond_destroy(&s->moved);
  pthread_mutex_destroy(&s->lock);
  moe_device_free_host(s->dev, s->ring);
  free(s);
}

int64_t moe_snapshot_bytes(const moe_snapshot *s) {
  return s->size;
}

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Bytes from stream position `at` up to the ring's end. */
static int64_t until_wrap(const moe_snapshot *s, int64_t at) {
  return s->size - at % s->size;
}

/* ---- the writing thread */

/* Wait until bytes are ready; how many, or 0 when there will be no more. */
static int64_t wait_ready(moe_snapshot *s) {
  pthread_mutex_lock(&s->lock);
  while (s->ready == s->taken && !s->broken) pthread_cond_wait(&s->moved, &s->lock);
  int64_t bytes = s->ready - s->taken;
  pthread_mutex_unlock(&s->lock);
  return bytes;
}

static void took(moe_snapshot *s, int64_t bytes) {
  pthread_mutex_lock(&s->lock);
  s->taken += bytes;
  pthread_cond_signal(&s->moved);
  pthread_mutex_unlock(&s->lock);
}

/* A piece's `fetch`. Pieces and their elements are asked for in the order they were filled in. */
static moe_status take(void *context, const moe_piece *p, int64_t at, int64_t n, void *out) {
  moe_snapshot *s = context;
  int64_t bytes = n * moe_dtype_size(p->dtype);
  char *to = out;
  (void)at;
  while (bytes > 0) {
    int64_t some = least(least(bytes, wait_ready(s)), until_wrap(s, s->taken));
    if (some == 0) return moe_fail(MOE_FAILED, "%s: copying it to host memory failed", p->name);
    memcpy(to, s->ring + s->taken % s->size, (size_t)some);
    took(s, some);
    to += some;
    bytes -= some;
  }
  return MOE_OK;
}

void moe_snapshot_leave(moe_snapshot *s) {
  pthread_mutex_lock(&s->lock);
  s->left = true;
  pthread_cond_signal(&s->moved);
  pthread_mutex_unlock(&s->lock);
}

/* ---- the filling thread */

void moe_snapshot_begin(moe_snapshot *s, const moe_piece *pieces, int n, moe_piece *out) {
  s->pieces = pieces;
  s->n = n;
  s->queued = s->ready = s->taken = 0;
  s->broken = s->left = false;
  for (int i = 0; i < n; i++) {
    out[i] = pieces[i];
    out[i].data = NULL;
    out[i].fetch = take;
    out[i].context = s;
  }
}

/* All that was queued arrives. */
static moe_status arrive(moe_snapshot *s) {
  moe_status status = moe_device_sync(s->dev);
  pthread_mutex_lock(&s->lock);
  if (status == MOE_OK)
    s->ready = s->queued;
  else
    s->broken = true;
  pthread_cond_signal(&s->moved);
  pthread_mutex_unlock(&s->lock);
  return status;
}

/* Free bytes of the ring; waits for the first. 0: the writer has left. */
static int64_t wait_free(moe_snapshot *s) {
  pthread_mutex_lock(&s->lock);
  while (s->queued - s->taken == s->size && !s->left) pthread_cond_wait(&s->moved, &s->lock);
  int64_t bytes = s->left ? 0 : s->size - (s->queued - s->taken);
  pthread_mutex_unlock(&s->lock);
  return bytes;
}

static moe_status put(moe_snapshot *s, const char *data, int64_t bytes, bool *left) {
  while (bytes > 0 && !*left) {
    if (s->queued - s->ready >= least(GROUP, s->size / 4 + 1)) MOE_TRY(arrive(s));
    int64_t some = least(least(bytes, wait_free(s)), until_wrap(s, s->queued));
    *left = some == 0;
    if (*left) break;
    some = least(some, GROUP);
    MOE_TRY(moe_device_download(s->dev, s->ring + s->queued % s->size, data, some));
    s->queued += some;
    data += some;
    bytes -= some;
  }
  return MOE_OK;
}

/* Halves go in the turns in which the writer asks for them. */
static moe_status put_piece(moe_snapshot *s, const moe_piece *p, bool *left) {
  int64_t size = moe_dtype_size(p->low ? MOE_BF16 : p->dtype), step = moe_shard_step(p);
  const char *data = p->data, *low = p->low;
  if (!low) return put(s, data, p->count * size, left);
  for (int64_t at = 0; at < p->count; at += step) {
    int64_t bytes = least(step, p->count - at) * size;
    MOE_TRY(put(s, data + at * size, bytes, left));
    MOE_TRY(put(s, low + at * size, bytes, left));
  }
  return MOE_OK;
}

moe_status moe_snapshot_fill(moe_snapshot *s) {
  moe_status status = MOE_OK;
  bool left = false;
  for (int i = 0; i < s->n && status == MOE_OK && !left; i++)
    status = put_piece(s, &s->pieces[i], &left);
  if (status == MOE_OK) return arrive(s);
  pthread_mutex_lock(&s->lock);
  s->broken = true;
  pthread_cond_signal(&s->moved);
  pthread_mutex_unlock(&s->lock);
  return status;
}
