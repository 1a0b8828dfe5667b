/* Worker processes. A request is {pieces, bytes}, the pieces' lengths, the text; an answer is
 * {status, pieces or bytes of a message, tokens}, the pieces' token counts, the ids. */
#include "data/encode_pool.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct {
  pid_t pid;
  int to, from; /* pipes: to the worker and from it */
} worker;

struct moe_encode_pool {
  int workers;
  worker worker[];
};

typedef struct {
  int64_t pieces, bytes;
} request;

typedef struct {
  int64_t status, message_bytes, tokens;
} answer;

/* ---- batches ---- */

moe_status moe_text_batch_add(moe_text_batch *b, const char *text, int64_t length,
                              bool ends_document) {
  if (b->bytes + length > b->text_room) {
    int64_t room = 2 * (b->bytes + length);
    char *bigger = realloc(b->text, (size_t)room);
    if (!bigger) return moe_fail(MOE_NO_MEMORY, "out of memory: batch of %" PRId64 " bytes", room);
    b->text = bigger;
    b->text_room = room;
  }
  if (b->pieces == b->pieces_room) {
    int64_t room = 2 * b->pieces + 64;
    int64_t *lengths = realloc(b->length, (size_t)room * sizeof *lengths);
    if (lengths) b->length = lengths;
    bool *ends = realloc(b->ends_document, (size_t)room * sizeof *ends);
    if (ends) b->ends_document = ends;
    if (!lengths || !ends)
      return moe_fail(MOE_NO_MEMORY, "out of memory: batch of %" PRId64 " pieces", room);
    b->pieces_room = room;
  }
  if (length > 0) memcpy(b->text + b->bytes, text, (size_t)length);
  b->bytes += length;
  b->length[b->pieces] = length;
  b->ends_document[b->pieces++] = ends_document;
  return MOE_OK;
}

void moe_text_batch_reset(moe_text_batch *b) {
  b->bytes = b->pieces = b->ids.count = 0;
}

void moe_text_batch_free(moe_text_batch *b) {
  free(b->text);
  free(b->length);
  free(b->ends_document);
  free(b->ids.ids);
  *b = (moe_text_batch){0};
}

/* ---- pipes ---- */

static bool write_all(int fd, const void *data, int64_t size) {
  for (const char *at = data; size > 0;) {
    ssize_t n = write(fd, at, (size_t)size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    at += n;
    size -= n;
  }
  return true;
}

static bool read_all(int fd, void *data, int64_t size) {
  for (char *at = data; size > 0;) {
    ssize_t n = read(fd, at, (size_t)size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
    size -= n;
  }
  return true;
}

/* ---- the worker's side ---- */

static bool read_request(int from, moe_text_batch *b) {
  request r;
  if (!read_all(from, &r, sizeof r)) return false;
  b->length = realloc(b->length, (size_t)r.pieces * sizeof *b->length + 1);
  b->text = realloc(b->text, (size_t)r.bytes + 1);
  b->pieces = r.pieces;
  return b->length && b->text && read_all(from, b->length, r.pieces * (int64_t)sizeof *b->length) &&
         read_all(from, b->text, r.bytes);
}

/* Encode every piece; length[] turns from bytes to tokens. */
static moe_status encode(const moe_tokenizer *t, moe_text_batch *b) {
  const char *text = b->text;
  b->ids.count = 0;
  for (int64_t i = 0; i < b->pieces; i++) {
    int64_t before = b->ids.count;
    MOE_TRY(moe_tokenizer_encode(t, text, b->length[i], &b->ids));
    text += b->length[i];
    b->length[i] = b->ids.count - before;
  }
  return MOE_OK;
}

static bool write_answer(int to, moe_status status, const moe_text_batch *b) {
  const char *message = moe_error_message();
  answer a = {status, status == MOE_OK ? 0 : (int64_t)strlen(message), b->ids.count};
  if (!write_all(to, &a, sizeof a)) return false;
  if (status != MOE_OK) return write_all(to, message, a.message_bytes);
  return write_all(to, b->length, b->pieces * (int64_t)sizeof *b->length) &&
         write_all(to, b->ids.ids, b->ids.count * (int64_t)sizeof *b->ids.ids);
}

static void work(const moe_tokenizer *t, int from, int to) {
  moe_text_batch batch = {0};
  while (read_request(from, &batch) && write_answer(to, encode(t, &batch), &batch)) continue;
  _exit(0);
}

/* ---- the pool's side ---- */

/* Fork worker w. The child closes its elder siblings' pipes: a worker must see the end of its
 * requests when this process is gone, whoever else is alive. */
static moe_status start_worker(moe_encode_pool *p, int w, const moe_tokenizer *t) {
  int down[2] = {-1, -1}, up[2] = {-1, -1};
  pid_t pid = -1;
  if (pipe(down) == 0 && pipe(up) == 0) pid = fork();
  if (pid == 0) {
    signal(SIGINT, SIG_IGN); /* of the terminal: the parent decides */
    for (int i = 0; i < w; i++) {
      close(p->worker[i].to);
      close(p->worker[i].from);
    }
    close(down[1]);
    close(up[0]);
    work(t, down[0], up[1]);
  }
  int error = errno;
  if (down[0] >= 0) close(down[0]);
  if (up[1] >= 0) close(up[1]);
  p->worker[w] = (worker){pid, down[1], up[0]};
  p->workers = w + 1;
  if (pid > 0) return MOE_OK;
  return moe_fail(MOE_FAILED, "cannot start worker %d: %s: lower --workers", w, strerror(error));
}

moe_status moe_encode_pool_create(const moe_tokenizer *tokenizer, int workers,
                                  moe_encode_pool **out) {
  *out = NULL;
  if (workers < 1 || workers > MOE_ENCODE_WORKERS)
    return moe_fail(MOE_INVALID, "%d workers, the most is %d", workers, MOE_ENCODE_WORKERS);
  moe_encode_pool *p = calloc(1, sizeof *p + (size_t)workers * sizeof p->worker[0]);
  if (!p) return moe_fail(MOE_NO_MEMORY, "out of memory: %d workers", workers);
  signal(SIGPIPE, SIG_IGN); /* a dead worker shows as a failed write */
  for (int w = 0; w < workers; w++) {
    moe_status status = start_worker(p, w, tokenizer);
    if (status == MOE_OK) continue;
    moe_encode_pool_destroy(p);
    return status;
  }
  *out = p;
  return MOE_OK;
}

void moe_encode_pool_destroy(moe_encode_pool *p) {
  if (!p) return;
  for (int w = 0; w < p->workers; w++) {
    if (p->worker[w].to >= 0) close(p->worker[w].to);
    if (p->worker[w].from >= 0) close(p->worker[w].from);
  }
  for (int w = 0; w < p->workers; w++)
    while (p->worker[w].pid > 0 && waitpid(p->worker[w].pid, NULL, 0) < 0 && errno == EINTR)
      continue;
  free(p);
}

int moe_encode_pool_workers(const moe_encode_pool *p) {
  return p->workers;
}

/* The worker closed its pipe: find out how it ended. */
static moe_status worker_died(moe_encode_pool *p, int w, const moe_text_batch *b) {
  int how = 0;
  if (waitpid(p->worker[w].pid, &how, 0) == p->worker[w].pid) p->worker[w].pid = -1;
  return moe_fail(MOE_FAILED,
                  "a worker ended (%s %d) while encoding %" PRId64
                  " bytes of text: %s, from byte %" PRId64
                  ": out of memory, or a text the tokenizer cannot take",
                  WIFSIGNALED(how) ? "signal" : "exit", WIFSIGNALED(how) ? WTERMSIG(how) : how >> 8,
                  b->bytes, b->file, b->offset);
}

moe_status moe_encode_pool_send(moe_encode_pool *p, int w, const moe_text_batch *b) {
  request r = {b->pieces, b->bytes};
  int to = p->worker[w].to;
  if (write_all(to, &r, sizeof r) &&
      write_all(to, b->length, b->pieces * (int64_t)sizeof *b->length) &&
      write_all(to, b->text, b->bytes))
    return MOE_OK;
  return worker_died(p, w, b);
}

static moe_status receive_error(moe_encode_pool *p, int w, const answer *a,
                                const moe_text_batch *b) {
  char message[512] = "";
  int64_t n =
      a->message_bytes < (int64_t)sizeof message ? a->message_bytes : (int64_t)sizeof message - 1;
  if (!read_all(p->worker[w].from, message, n)) return worker_died(p, w, b);
  return moe_fail((moe_status)a->status, "%s: in the text of %s from byte %" PRId64, message,
                  b->file, b->offset);
}

moe_status moe_encode_pool_receive(moe_encode_pool *p, int w, moe_text_batch *b) {
  answer a;
  int from = p->worker[w].from;
  if (!read_all(from, &a, sizeof a)) return worker_died(p, w, b);
  if (a.status != MOE_OK) return receive_error(p, w, &a, b);
  if (a.tokens > b->ids.room) {
    int32_t *bigger = realloc(b->ids.ids, (size_t)a.tokens * sizeof *bigger);
    if (!bigger) return moe_fail(MOE_NO_MEMORY, "out of memory: %" PRId64 " token ids", a.tokens);
    b->ids.ids = bigger;
    b->ids.room = a.tokens;
  }
  b->ids.count = a.tokens;
  if (read_all(from, b->length, b->pieces * (int64_t)sizeof *b->length) &&
      read_all(from, b->ids.ids, a.tokens * (int64_t)sizeof *b->ids.ids))
    return MOE_OK;
  return worker_died(p, w, b);
}
