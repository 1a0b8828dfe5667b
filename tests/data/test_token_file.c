#include <fcntl.h>
#include <sys/stat.h>

#include "core/base/rng.h"
#include "fixture.h"

TestSuite(token_file, .init = make_folder, .fini = remove_folder);

static void round_trip(int64_t vocab_size, moe_token_type type) {
  const int64_t lengths[] = {3, 1, 10000, 7};
  make_token_file(in_folder("a"), vocab_size, 5, lengths, 4);
  moe_token_file *f;
  ok(moe_token_file_open(in_folder("a"), &f));
  cr_assert_eq(moe_token_file_type(f), type);
  cr_assert_eq(moe_token_file_tokens(f), 10011);
  cr_assert_eq(moe_token_file_documents(f), 4);
  int32_t *ids = malloc(10011 * sizeof *ids);
  ok(moe_token_file_read(f, 0, 10011, vocab_size, ids));
  for (int64_t p = 0; p < 10011; p++) cr_assert_eq(ids[p], (5 + p) % vocab_size);
  int64_t begin = 0;
  for (int64_t d = 0; d < 4; d++) {
    cr_assert_eq(moe_token_file_document_begin(f, d), begin);
    cr_assert_eq(moe_token_file_document_of(f, begin), d);
    begin += lengths[d];
    cr_assert_eq(moe_token_file_document_of(f, begin - 1), d);
  }
  cr_assert_eq(moe_token_file_document_begin(f, 4), begin);
  free(ids);
  moe_token_file_close(f);
}

Test(token_file, gives_back_what_was_written) {
  round_trip(1000, MOE_TOKENS_U16);
  round_trip(65536, MOE_TOKENS_U16);
  round_trip(65537, MOE_TOKENS_I32);
}

Test(token_file, is_opened_by_either_name_or_the_prefix) {
  const int64_t lengths[] = {4};
  make_token_file(in_folder("a"), 10, 0, lengths, 1);
  const char *names[] = {"a", "a.bin", "a.idx"};
  for (int i = 0; i < 3; i++) {
    moe_token_file *f;
    ok(moe_token_file_open(in_folder(names[i]), &f));
    cr_assert_str_eq(moe_token_file_prefix(f), in_folder("a"));
    moe_token_file_close(f);
  }
}

/* Two documents, {1, 2, 3} and {258}, as Megatron-Core's IndexedDatasetBuilder writes them with
 * numpy.uint16: by hand from megatron/core/datasets/indexed_dataset.py. */
static const uint8_t golden_index[] = {
    'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0, /* magic */
    1,   0,   0,   0,   0,   0,   0,   0,    /* version */
    8,                                       /* uint16 */
    2,   0,   0,   0,   0,   0,   0,   0,    /* sequences */
    3,   0,   0,   0,   0,   0,   0,   0,    /* document indices, one more than documents */
    3,   0,   0,   0,   1,   0,   0,   0,    /* lengths */
    0,   0,   0,   0,   0,   0,   0,   0,    /* pointers */
    6,   0,   0,   0,   0,   0,   0,   0,    /* */
    0,   0,   0,   0,   0,   0,   0,   0,    /* document indices */
    1,   0,   0,   0,   0,   0,   0,   0,    /* */
    2,   0,   0,   0,   0,   0,   0,   0,
};
static const uint8_t golden_bin[] = {1, 0, 2, 0, 3, 0, 2, 1};

Test(token_file, is_megatrons_layout_to_the_byte) {
  moe_token_writer *w;
  ok(moe_token_writer_create(in_folder("g"), 300, &w));
  ok(moe_token_writer_append(w, (const int32_t[]){1, 2}, 2));
  ok(moe_token_writer_append(w, (const int32_t[]){3}, 1));
  ok(moe_token_writer_end_document(w));
  ok(moe_token_writer_append(w, (const int32_t[]){258}, 1));
  ok(moe_token_writer_end_document(w));
  ok(moe_token_writer_finish(w));
  moe_token_writer_destroy(w);
  size_t size;
  char *index = read_whole_file(in_folder("g.idx"), &size);
  cr_assert_eq(size, sizeof golden_index);
  cr_assert_arr_eq(index, golden_index, sizeof golden_index);
  char *bin = read_whole_file(in_folder("g.bin"), &size);
  cr_assert_eq(size, sizeof golden_bin);
  cr_assert_arr_eq(bin, golden_bin, sizeof golden_bin);
  free(index);
  free(bin);
}

static moe_status parse(const uint8_t *index, int64_t index_size, const uint8_t *bin,
                        int64_t bin_size) {
  moe_token_file *f = NULL;
  moe_error_clear();
  moe_status status = moe_token_file_parse(index, index_size, bin, bin_size, "g", &f);
  cr_assert_eq(status == MOE_OK, f != NULL);
  moe_token_file_close(f);
  return status;
}

Test(token_file, refuses_an_index_cut_short_anywhere) {
  for (int64_t size = 0; size < (int64_t)sizeof golden_index; size++) {
    fails(MOE_DAMAGED, "g.idx, byte", parse(golden_index, size, golden_bin, sizeof golden_bin));
  }
  ok(parse(golden_index, sizeof golden_index, golden_bin, sizeof golden_bin));
}

Test(token_file, refuses_a_bin_of_any_other_size) {
  uint8_t longer[sizeof golden_bin + 4] = {0};
  for (int64_t size = 0; size <= (int64_t)sizeof longer; size++) {
    if (size == sizeof golden_bin) continue;
    fails(MOE_DAMAGED, "g.idx, byte", parse(golden_index, sizeof golden_index, longer, size));
  }
}

/* Every single bit: the fields of the index overlap so tightly that none may change unseen. */
Test(token_file, refuses_every_flipped_bit_of_the_index) {
  for (size_t bit = 0; bit < 8 * sizeof golden_index; bit++) {
    uint8_t index[sizeof golden_index];
    memcpy(index, golden_index, sizeof index);
    index[bit / 8] ^= (uint8_t)(1u << bit % 8);
    /* only a border between documents can move and still make sense: 1 -> 0 */
    bool valid = bit == 8 * (34 + 8 + 16 + 8);
    moe_status status = parse(index, sizeof index, golden_bin, sizeof golden_bin);
    cr_assert_eq(status, valid ? MOE_OK : MOE_DAMAGED, "bit %zu: %s", bit, moe_error_message());
  }
}

/* What survives the checks must be safe to read. */
Test(token_file, random_damage_is_refused_or_harmless) {
  for (uint64_t trial = 0; trial < 20000; trial++) {
    uint8_t index[sizeof golden_index];
    memcpy(index, golden_index, sizeof index);
    uint32_t draw[4];
    for (int i = 0; i < 3; i++) {
      moe_philox(7, trial, (uint64_t)i, draw);
      index[9 + draw[0] % (sizeof index - 9)] = (uint8_t)draw[1];
    }
    moe_token_file *f = NULL;
    moe_status status =
        moe_token_file_parse(index, sizeof index, golden_bin, sizeof golden_bin, "g", &f);
    cr_assert(status == MOE_OK || status == MOE_DAMAGED);
    if (status != MOE_OK) continue;
    int32_t ids[sizeof golden_bin];
    ok(moe_token_file_read(f, 0, moe_token_file_tokens(f), INT32_MAX, ids));
    for (int64_t d = 0; d < moe_token_file_documents(f); d++)
      cr_assert_leq(moe_token_file_document_begin(f, d), moe_token_file_document_begin(f, d + 1));
    moe_token_file_close(f);
  }
}

Test(token_file, says_which_foreign_type_it_refuses) {
  static const char *const names[] = {NULL,    "uint8",   "int8",    "int16", NULL,
                                      "int64", "float64", "float32", NULL,    "unknown"};
  for (int code = 0; code <= 9; code++) {
    if (!names[code]) continue;
    uint8_t index[sizeof golden_index];
    memcpy(index, golden_index, sizeof index);
    index[17] = (uint8_t)code;
    fails(MOE_DAMAGED, names[code], parse(index, sizeof index, golden_bin, sizeof golden_bin));
    cr_assert(strstr(moe_error_message(), "byte 17"));
  }
}

Test(token_file, says_that_multimodal_datasets_are_not_read) {
  uint8_t index[sizeof golden_index + 2] = {0};
  memcpy(index, golden_index, sizeof golden_index);
  fails(MOE_DAMAGED, "multimodal", parse(index, sizeof index, golden_bin, sizeof golden_bin));
}

Test(token_file, makes_no_allocation_from_hostile_counts) {
  uint8_t index[sizeof golden_index];
  for (int field = 18; field <= 26; field += 8) {
    memcpy(index, golden_index, sizeof index);
    memset(index + field, 0xFF, 8);
    fails(MOE_DAMAGED, "do not fit", parse(index, sizeof index, golden_bin, sizeof golden_bin));
    memset(index + field, 0, 8);
    index[field + 7] = 0x15; /* times 12 it would wrap round */
    fails(MOE_DAMAGED, "do not fit", parse(index, sizeof index, golden_bin, sizeof golden_bin));
  }
}

Test(token_file, names_file_and_byte_of_an_id_outside_the_vocabulary) {
  const int64_t lengths[] = {50};
  make_token_file(in_folder("a"), 100, 0, lengths, 1);
  moe_token_file *f;
  ok(moe_token_file_open(in_folder("a"), &f));
  int32_t ids[50];
  ok(moe_token_file_read(f, 0, 50, 50, ids));
  fails(MOE_DAMAGED, "a.bin, byte 80", moe_token_file_read(f, 10, 40, 40, ids));
  fails(MOE_INVALID, "of 50", moe_token_file_read(f, 49, 2, 50, ids));
  fails(MOE_INVALID, "of 50", moe_token_file_read(f, -1, 2, 50, ids));
  moe_token_file_close(f);
  fails(MOE_IO, "missing.idx", moe_token_file_open(in_folder("missing"), &f));
}

Test(token_file, writes_no_id_outside_the_vocabulary) {
  moe_token_writer *w;
  ok(moe_token_writer_create(in_folder("b"), 100, &w));
  fails(MOE_INVALID, "token id -3", moe_token_writer_append(w, (const int32_t[]){-3}, 1));
  fails(MOE_INVALID, "token id 100", moe_token_writer_append(w, (const int32_t[]){100}, 1));
  moe_token_writer_destroy(w);
}

Test(token_file, notices_a_negative_id_in_an_int32_file) {
  const int64_t lengths[] = {8};
  make_token_file(in_folder("a"), 70000, 0, lengths, 1);
  int fd = open(in_folder("a.bin"), O_WRONLY);
  const int32_t id = -1;
  cr_assert_eq(pwrite(fd, &id, sizeof id, 12), sizeof id);
  close(fd);
  moe_token_file *f;
  int32_t ids[8];
  ok(moe_token_file_open(in_folder("a"), &f));
  fails(MOE_DAMAGED, "token id -1 is outside the vocabulary of 70000",
        moe_token_file_read(f, 0, 8, 70000, ids));
  cr_assert(strstr(moe_error_message(), "a.bin, byte 12"));
  moe_token_file_close(f);
}

Test(token_file, says_so_when_the_file_shrinks_under_it) {
  const int64_t lengths[] = {5000};
  make_token_file(in_folder("a"), 100, 0, lengths, 1);
  moe_token_file *f;
  int32_t ids[5000];
  ok(moe_token_file_open(in_folder("a"), &f));
  cr_assert_eq(truncate(in_folder("a.bin"), 1000), 0);
  fails(MOE_DAMAGED, "became shorter", moe_token_file_read(f, 0, 5000, 100, ids));
  moe_token_file_close(f);
}

Test(token_file, has_another_fingerprint_when_anything_differs) {
  const int64_t a[] = {5, 6}, b[] = {6, 5};
  make_token_file(in_folder("a"), 100, 0, a, 2);
  make_token_file(in_folder("b"), 100, 0, b, 2);
  make_token_file(in_folder("c"), 100, 0, a, 2);
  uint64_t print[3];
  for (int i = 0; i < 3; i++) {
    moe_token_file *f;
    ok(moe_token_file_open(in_folder((const char *[]){"a", "b", "c"}[i]), &f));
    print[i] = moe_token_file_fingerprint(f);
    moe_token_file_close(f);
  }
  cr_assert_neq(print[0], print[1]);
  cr_assert_eq(print[0], print[2]);
}

static int files_in_folder(void) {
  char command[128];
  int count = -1;
  snprintf(command, sizeof command, "ls '%s' | wc -l", folder);
  FILE *pipe = popen(command, "r");
  cr_assert_eq(fscanf(pipe, "%d", &count), 1);
  pclose(pipe);
  return count;
}

Test(token_file, appears_only_when_finished) {
  moe_token_writer *w;
  ok(moe_token_writer_create(in_folder("a"), 100, &w));
  ok(moe_token_writer_append(w, (const int32_t[]){1, 2}, 2));
  cr_assert_neq(access(in_folder("a.bin"), F_OK), 0);
  cr_assert_neq(access(in_folder("a.idx"), F_OK), 0);
  moe_token_writer_destroy(w);
  cr_assert_eq(files_in_folder(), 0, "temporary files stay behind");
  fails(MOE_IO, "cannot create", moe_token_writer_create(in_folder("no/a"), 100, &w));
}

Test(token_file, leaves_out_documents_without_tokens) {
  const int64_t lengths[] = {0, 2, 0, 0, 3, 0};
  make_token_file(in_folder("a"), 100, 0, lengths, 6);
  moe_token_file *f;
  ok(moe_token_file_open(in_folder("a"), &f));
  cr_assert_eq(moe_token_file_documents(f), 2);
  moe_token_file_close(f);
  make_token_file(in_folder("a"), 100, 0, lengths, 1);
  ok(moe_token_file_open(in_folder("a"), &f));
  cr_assert_eq(moe_token_file_documents(f), 0);
  cr_assert_eq(moe_token_file_tokens(f), 0);
  moe_token_file_close(f);
}

/* Megatron lets a document have several sequences, or none. */
Test(token_file, reads_documents_of_several_sequences_and_of_none) {
  uint8_t index[34 + 3 * 12 + 4 * 8];
  const int32_t lengths[] = {1, 2, 1};
  const int64_t head[] = {3, 4}, pointers[] = {0, 2, 6}, documents[] = {0, 2, 2, 3};
  memcpy(index, golden_index, 18);
  memcpy(index + 18, head, 16);
  memcpy(index + 34, lengths, 12);
  memcpy(index + 46, pointers, 24);
  memcpy(index + 70, documents, 32);
  moe_token_file *f;
  ok(moe_token_file_parse(index, sizeof index, golden_bin, sizeof golden_bin, "g", &f));
  cr_assert_eq(moe_token_file_documents(f), 3);
  const int64_t begins[] = {0, 3, 3, 4};
  for (int d = 0; d < 4; d++) cr_assert_eq(moe_token_file_document_begin(f, d), begins[d]);
  const int64_t document_of[] = {0, 0, 0, 2};
  for (int t = 0; t < 4; t++) cr_assert_eq(moe_token_file_document_of(f, t), document_of[t]);
  moe_token_file_close(f);
}

/* The same bytes through numpy, as Megatron reads them. */
Test(token_file, is_read_by_numpy_as_megatron_does) {
  if (system("python3 -c 'import numpy' 2>/dev/null") != 0) {
    cr_skip_test("python3 with numpy is not here");
  }
  const int64_t lengths[] = {3, 70000, 11};
  make_token_file(in_folder("a"), 100000, 9, lengths, 3);
  char command[1024];
  snprintf(command, sizeof command,
           "python3 -c '\n"
           "import numpy, sys\n"
           "b = open(\"%s.idx\", \"rb\").read()\n"
           "n, d = numpy.frombuffer(b, numpy.uint64, 2, 18)\n"
           "n, d = int(n), int(d)\n"
           "assert b[17] == 4 and n == 3 and d == 4\n"
           "lengths = numpy.frombuffer(b, numpy.int32, n, 34)\n"
           "pointers = numpy.frombuffer(b, numpy.int64, n, 34 + 4 * n)\n"
           "documents = numpy.frombuffer(b, numpy.int64, d, 34 + 12 * n)\n"
           "assert list(documents) == [0, 1, 2, 3]\n"
           "tokens = open(\"%s.bin\", \"rb\").read()\n"
           "x = numpy.frombuffer(tokens, numpy.int32, lengths[1], pointers[1])\n"
           "assert (x == (12 + numpy.arange(70000)) %% 100000).all()\n"
           "'",
           in_folder("a"), in_folder("a"));
  cr_assert_eq(system(command), 0);
}
