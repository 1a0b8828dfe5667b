#include <signal.h>
#include <sys/wait.h>

#include "data/encode_pool.h"
#include "fixture.h"

static moe_tokenizer *tokenizer;

static void set_up(void) {
  ok(moe_tokenizer_open("bytes", &tokenizer));
}

static void tear_down(void) {
  moe_tokenizer_close(tokenizer);
}

TestSuite(encode_pool, .init = set_up, .fini = tear_down);

static moe_text_batch batch_of(int first, int pieces, int size) {
  moe_text_batch b = {.file = "a.txt", .offset = 77};
  char *text = malloc((size_t)size + 1);
  for (int i = 0; i < pieces; i++) {
    memset(text, 'a' + (first + i) % 26, (size_t)size);
    ok(moe_text_batch_add(&b, text, size, i % 2 == 0));
  }
  free(text);
  return b;
}

/* Far more text than a pipe holds, both ways. */
Test(encode_pool, answers_each_batch_with_its_own_tokens) {
  enum { WORKERS = 3, PIECES = 40, SIZE = 20000 };
  moe_encode_pool *p;
  ok(moe_encode_pool_create(tokenizer, WORKERS, &p));
  for (int round = 0; round < 4; round++) {
    moe_text_batch b[WORKERS];
    for (int w = 0; w < WORKERS; w++) {
      b[w] = batch_of(round + w, PIECES, SIZE);
      ok(moe_encode_pool_send(p, w, &b[w]));
    }
    for (int w = 0; w < WORKERS; w++) {
      ok(moe_encode_pool_receive(p, w, &b[w]));
      cr_assert_eq(b[w].ids.count, PIECES * SIZE);
      for (int i = 0; i < PIECES; i++) {
        cr_assert_eq(b[w].length[i], SIZE);
        int32_t id = MOE_BYTES_FIRST + 'a' + (round + w + i) % 26;
        cr_assert_eq(b[w].ids.ids[i * SIZE], id);
        cr_assert_eq(b[w].ids.ids[i * SIZE + SIZE - 1], id);
      }
      moe_text_batch_free(&b[w]);
    }
  }
  moe_encode_pool_destroy(p);
}

Test(encode_pool, encodes_pieces_without_text) {
  moe_encode_pool *p;
  ok(moe_encode_pool_create(tokenizer, 1, &p));
  moe_text_batch b = batch_of(0, 3, 0);
  ok(moe_encode_pool_send(p, 0, &b));
  ok(moe_encode_pool_receive(p, 0, &b));
  cr_assert_eq(b.ids.count, 0);
  cr_assert_eq(b.length[2], 0);
  moe_text_batch_free(&b);
  moe_encode_pool_destroy(p);
}

/* The only child of this process. */
static pid_t only_child(void) {
  char path[64];
  int child = 0;
  snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)getpid(), (int)getpid());
  FILE *file = fopen(path, "r");
  if (!file || fscanf(file, "%d", &child) != 1) child = 0;
  if (file) fclose(file);
  return child;
}

/* A killed worker stands for a fault of the tokenizer library. */
Test(encode_pool, says_where_the_text_is_that_ended_a_worker) {
  moe_encode_pool *p;
  ok(moe_encode_pool_create(tokenizer, 1, &p));
  pid_t child = only_child();
  if (child == 0) cr_skip_test("/proc does not tell this process's children");
  cr_assert_eq(kill(child, SIGKILL), 0);
  siginfo_t info;
  cr_assert_eq(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), 0); /* it is dead by now */
  moe_text_batch b = batch_of(0, 10, 20000);
  moe_status status = moe_encode_pool_send(p, 0, &b);
  if (status == MOE_OK) status = moe_encode_pool_receive(p, 0, &b);
  cr_assert_eq(status, MOE_FAILED);
  cr_assert(strstr(moe_error_message(), "signal 9"), "%s", moe_error_message());
  cr_assert(strstr(moe_error_message(), "a.txt, from byte 77"), "%s", moe_error_message());
  moe_text_batch_free(&b);
  moe_encode_pool_destroy(p);
}
