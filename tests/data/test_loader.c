#include <fcntl.h>

#include "data/loader.h"
#include "fixture.h"

enum { VOCAB = 5000, SEQ = 16 };

static moe_config config;

/* 2000 tokens in 40 documents of 50: token p of the file is p. */
static void set_up(void) {
  make_folder();
  int64_t lengths[40];
  for (int i = 0; i < 40; i++) lengths[i] = 50;
  make_token_file(in_folder("a"), VOCAB, 0, lengths, 40);
  make_token_file(in_folder("b"), VOCAB, 2500, lengths, 40);
  moe_config_defaults(&config);
  config.model.vocab_size = VOCAB;
  config.data.sequence_length = SEQ;
  config.data.valid_fraction = 0;
  config.train.micro_batch = 2;
  strcpy(config.data.train, in_folder("a"));
}

TestSuite(loader, .init = set_up, .fini = remove_folder);

static moe_loader *open_loader(moe_split split, int rank, int world) {
  moe_loader *l;
  ok(moe_loader_create(&config, split, rank, world, &l));
  return l;
}

Test(loader, gives_windows_with_the_next_token_as_target) {
  moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  cr_assert_eq(moe_loader_tokens(l), 2000);
  cr_assert_eq(moe_loader_epoch_samples(l), 1999 / SEQ);
  for (int n = 0; n < 10; n++) {
    moe_batch batch;
    ok(moe_loader_next(l, &batch));
    cr_assert_eq(batch.batch, 2);
    cr_assert_eq(batch.seq, SEQ);
    cr_assert_null(batch.doc_start);
    for (int b = 0; b < 2; b++) {
      cr_assert_eq(batch.sample_index[b], 2 * n + b);
      for (int i = 0; i < SEQ; i++) {
        int at = b * SEQ + i;
        cr_assert_eq(batch.tokens[at], batch.tokens[b * SEQ] + i);
        cr_assert_eq(batch.targets[at], batch.tokens[at] + 1);
        cr_assert_eq(batch.positions[at], i);
      }
    }
  }
  moe_loader_destroy(l);
}

/* First tokens of samples [0, samples), as `world` ranks with this accumulation read them. */
static void read_samples(int world, int64_t micro_batch, int64_t accumulation, int32_t *first,
                         int64_t samples) {
  config.train.micro_batch = micro_batch;
  config.train.global_batch = micro_batch * world * accumulation;
  for (int rank = 0; rank < world; rank++) {
    moe_loader *l = open_loader(MOE_SPLIT_TRAIN, rank, world);
    for (int64_t call = 0; call * micro_batch * world < samples; call++) {
      moe_batch batch;
      ok(moe_loader_next(l, &batch));
      int64_t step = call / accumulation, i = call % accumulation;
      for (int64_t b = 0; b < micro_batch; b++) {
        int64_t g =
            step * config.train.global_batch + i * (micro_batch * world) + rank * micro_batch + b;
        cr_assert_eq(batch.sample_index[b], g);
        if (g < samples) first[g] = batch.tokens[b * SEQ];
      }
    }
    moe_loader_destroy(l);
  }
}

Test(loader, reads_the_same_samples_on_any_number_of_ranks) {
  enum { SAMPLES = 420 };
  static int32_t one[SAMPLES], many[SAMPLES];
  strcpy(config.data.train, "3:");
  strcat(config.data.train, in_folder("a"));
  strcat(config.data.train, ",1:");
  strcat(config.data.train, in_folder("b"));
  read_samples(1, 1, 1, one, SAMPLES);
  for (int world = 1; world <= 7; world++) {
    memset(many, 0, sizeof many);
    read_samples(world, 1 + world % 3, 1 + world % 2, many, SAMPLES);
    cr_assert_arr_eq(one, many, sizeof one, "%d ranks", world);
  }
}

Test(loader, reads_every_sample_once_an_epoch_in_a_new_order) {
  enum { N = 1999 / SEQ };
  static int32_t first[3 * N];
  read_samples(1, 1, 1, first, 3 * N);
  for (int epoch = 0; epoch < 3; epoch++) {
    int seen[N] = {0};
    for (int i = 0; i < N; i++) {
      cr_assert_eq(first[epoch * N + i] % SEQ, 0);
      seen[first[epoch * N + i] / SEQ]++;
    }
    for (int i = 0; i < N; i++) cr_assert_eq(seen[i], 1, "sample %d of epoch %d", i, epoch);
  }
  cr_assert_neq(memcmp(first, first + N, sizeof *first * N), 0, "the second epoch is the first");
}

Test(loader, orders_samples_by_seed) {
  static int32_t a[50], b[50], again[50];
  read_samples(1, 1, 1, a, 50);
  read_samples(1, 1, 1, again, 50);
  config.train.seed = 99;
  read_samples(1, 1, 1, b, 50);
  cr_assert_arr_eq(a, again, sizeof a);
  cr_assert_neq(memcmp(a, b, sizeof a), 0);
}

Test(loader, seeks_to_where_an_uninterrupted_run_would_be) {
  static int32_t all[400];
  config.train.micro_batch = 2;
  config.train.global_batch = 4; /* two micro-batches a step */
  moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  moe_batch batch;
  for (int call = 0; call < 200; call++) {
    ok(moe_loader_next(l, &batch));
    for (int b = 0; b < 2; b++) all[2 * call + b] = batch.tokens[b * SEQ];
  }
  const int64_t steps[] = {0, 57, 3, 99, 98, 0};
  for (int i = 0; i < 6; i++) {
    ok(moe_loader_seek(l, steps[i]));
    for (int call = 0; call < 2; call++) {
      ok(moe_loader_next(l, &batch));
      cr_assert_eq(batch.sample_index[0], 4 * steps[i] + 2 * call);
      for (int b = 0; b < 2; b++)
        cr_assert_eq(batch.tokens[b * SEQ], all[4 * steps[i] + 2 * call + b]);
    }
  }
  fails(MOE_INVALID, "seek", moe_loader_seek(l, -1));
  fails(MOE_INVALID, "seek", moe_loader_seek(l, INT64_MAX / 2));
  moe_loader_destroy(l);
}

Test(loader, survives_many_seeks_and_sudden_ends) {
  config.data.prefetch = 3;
  for (int round = 0; round < 30; round++) {
    moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
    moe_batch batch;
    for (int i = 0; i < round; i++) {
      ok(moe_loader_seek(l, 7 * i));
      if (i % 2) {
        ok(moe_loader_next(l, &batch));
        cr_assert_eq(batch.sample_index[0], 14 * i);
      }
    }
    moe_loader_destroy(l);
  }
}

Test(loader, keeps_a_batch_until_the_next_is_asked_for) {
  config.data.prefetch = 1;
  moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  for (int n = 0; n < 50; n++) {
    moe_batch batch;
    ok(moe_loader_next(l, &batch));
    int32_t before[2 * SEQ];
    memcpy(before, batch.tokens, sizeof before);
    usleep(500); /* time for the thread to overwrite it, if it did */
    cr_assert_arr_eq(before, batch.tokens, sizeof before);
    cr_assert_eq(batch.sample_index[0], 2 * n);
  }
  moe_loader_destroy(l);
}

Test(loader, mixes_files_in_proportion) {
  snprintf(config.data.train, sizeof config.data.train, "3:%s,1:%s", in_folder("a"),
           in_folder("b"));
  static int32_t first[100];
  read_samples(1, 1, 1, first, 100);
  int from_b = 0;
  for (int g = 0; g < 100; g++) from_b += first[g] >= 2500;
  cr_assert_eq(from_b, 25);
  moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  /* file a has 124 samples and takes 3 of 4: it begins again after 165 */
  cr_assert_eq(moe_loader_epoch_samples(l), 165);
  cr_assert_eq(moe_loader_tokens(l), 4000);
  moe_loader_destroy(l);
}

Test(loader, marks_documents_when_asked) {
  config.data.document_mask = true;
  config.data.sequence_length = 120; /* longer than two documents */
  config.train.micro_batch = 1;
  moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  for (int n = 0; n < 16; n++) {
    moe_batch batch;
    ok(moe_loader_next(l, &batch));
    int64_t begin = batch.tokens[0]; /* the place in the file */
    for (int64_t i = 0; i < 120; i++) {
      int64_t document = (begin + i) / 50 * 50; /* where its document begins */
      int64_t start = document > begin ? document - begin : 0;
      cr_assert_eq(batch.doc_start[i], start);
      cr_assert_eq(batch.positions[i], i - start);
    }
  }
  moe_loader_destroy(l);
}

Test(loader, holds_out_the_last_documents) {
  config.data.valid_fraction = 0.1;
  moe_loader *train = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  moe_loader *valid = open_loader(MOE_SPLIT_VALID, 0, 1);
  cr_assert_eq(moe_loader_tokens(train), 36 * 50);
  cr_assert_eq(moe_loader_tokens(valid), 4 * 50);
  moe_batch batch;
  for (int n = 0; n < 112 / 2; n++) { /* an epoch of 112 samples */
    ok(moe_loader_next(train, &batch));
    for (int i = 0; i < 2 * SEQ; i++) cr_assert_lt(batch.targets[i], 1800);
  }
  for (int n = 0; n < 6; n++) {
    ok(moe_loader_next(valid, &batch));
    for (int i = 0; i < 2 * SEQ; i++) cr_assert_geq(batch.tokens[i], 1800);
  }
  moe_loader_destroy(train);
  moe_loader_destroy(valid);
}

Test(loader, holds_out_at_least_one_document) {
  config.data.valid_fraction = 1e-6;
  moe_loader *valid = open_loader(MOE_SPLIT_VALID, 0, 1);
  cr_assert_eq(moe_loader_tokens(valid), 50);
  moe_loader_destroy(valid);
}

Test(loader, validates_in_one_order_whatever_the_seed) {
  config.data.valid_fraction = 0.5;
  int32_t order[2][20];
  for (int s = 0; s < 2; s++) {
    config.train.seed = 1 + s;
    moe_loader *l = open_loader(MOE_SPLIT_VALID, 0, 1);
    moe_batch batch;
    for (int n = 0; n < 20; n++) {
      ok(moe_loader_next(l, &batch));
      order[s][n] = batch.tokens[0];
    }
    ok(moe_loader_seek(l, 0));
    ok(moe_loader_next(l, &batch));
    cr_assert_eq(batch.tokens[0], order[s][0]);
    moe_loader_destroy(l);
  }
  cr_assert_arr_eq(order[0], order[1], sizeof order[0]);
}

Test(loader, takes_validation_files_of_their_own) {
  config.data.valid_fraction = 0.1;
  strcpy(config.data.valid, in_folder("b"));
  moe_loader *train = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  moe_loader *valid = open_loader(MOE_SPLIT_VALID, 0, 1);
  cr_assert_eq(moe_loader_tokens(train), 2000);
  cr_assert_eq(moe_loader_tokens(valid), 2000);
  moe_batch batch;
  ok(moe_loader_next(valid, &batch));
  cr_assert_geq(batch.tokens[0], 2500);
  moe_loader_destroy(train);
  moe_loader_destroy(valid);
}

Test(loader, explains_what_it_cannot_do) {
  moe_loader *l;
  config.data.train[0] = 0;
  fails(MOE_USAGE, "data.train is empty", moe_loader_create(&config, MOE_SPLIT_TRAIN, 0, 1, &l));
  strcpy(config.data.train, in_folder("a"));
  fails(MOE_USAGE, "no validation data", moe_loader_create(&config, MOE_SPLIT_VALID, 0, 1, &l));
  config.data.sequence_length = 2000;
  fails(MOE_USAGE, "too few tokens", moe_loader_create(&config, MOE_SPLIT_TRAIN, 0, 1, &l));
  config.data.sequence_length = 1999;
  moe_loader_destroy(open_loader(MOE_SPLIT_TRAIN, 0, 1));
  config.train.global_batch = 7;
  fails(MOE_USAGE, "multiple", moe_loader_create(&config, MOE_SPLIT_TRAIN, 0, 1, &l));
  config.train.global_batch = 0;
  strcpy(config.data.train, in_folder("missing"));
  fails(MOE_USAGE, "missing.idx", moe_loader_create(&config, MOE_SPLIT_TRAIN, 0, 1, &l));
  const int64_t one[] = {500};
  make_token_file(in_folder("one"), VOCAB, 0, one, 1);
  strcpy(config.data.train, in_folder("one"));
  config.data.sequence_length = 16;
  config.data.valid_fraction = 0.01;
  fails(MOE_USAGE, "cannot hold out", moe_loader_create(&config, MOE_SPLIT_TRAIN, 0, 1, &l));
}

/* The thread finds it; the caller must hear it, and go on hearing it. */
Test(loader, names_file_and_byte_of_an_id_outside_the_vocabulary) {
  int fd = open(in_folder("a.bin"), O_WRONLY);
  const uint16_t id = VOCAB;
  cr_assert_eq(pwrite(fd, &id, sizeof id, 2 * 777), sizeof id);
  close(fd);
  moe_loader *l = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  moe_batch batch;
  moe_status status = MOE_OK;
  for (int n = 0; n < 62 && status == MOE_OK; n++) status = moe_loader_next(l, &batch);
  cr_assert_eq(status, MOE_DAMAGED);
  fails(MOE_DAMAGED, "a.bin, byte 1554", moe_loader_next(l, &batch));
  ok(moe_loader_seek(l, 0));
  moe_loader_destroy(l);
}

Test(loader, knows_its_files_by_their_fingerprint) {
  moe_loader *a = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  config.train.seed = 5;
  moe_loader *same = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  const int64_t lengths[] = {1000, 1000};
  make_token_file(in_folder("c"), VOCAB, 0, lengths, 2);
  strcpy(config.data.train, in_folder("c"));
  moe_loader *other = open_loader(MOE_SPLIT_TRAIN, 0, 1);
  cr_assert_eq(moe_loader_fingerprint(a), moe_loader_fingerprint(same));
  cr_assert_neq(moe_loader_fingerprint(a), moe_loader_fingerprint(other));
  moe_loader_destroy(a);
  moe_loader_destroy(same);
  moe_loader_destroy(other);
}
