/* The GGUF format: what is written reads back, and no file however made does more than be refused.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/gguf.h"
#include "core/base/rng.h"

#define EXPECT_OK(call) cr_assert((call) == MOE_OK, "%s", moe_error_message())

static char path[64];

static void make_place(void) {
  strcpy(path, "/tmp/moe-gguf-XXXXXX");
  cr_assert(mkdtemp(path));
  strcat(path, "/file");
}

static void remove_place(void) {
  unlink(path);
  *strrchr(path, '/') = 0;
  rmdir(path);
}

TestSuite(gguf, .init = make_place, .fini = remove_place, .timeout = 60);

/* ---- element types ---- */

static float value(int64_t i) {
  float x;
  moe_rng_normal_fill(7, 1, i, 1, 0.3f, &x);
  return x;
}

Test(gguf, q8_0_is_within_half_a_step_of_each_value) {
  enum { N = 32 * 50 };
  float x[N], y[N];
  char raw[N / 32 * 34];
  for (int i = 0; i < N; i++) x[i] = value(i) * (float)(1 << (i / 32 % 20));
  moe_ggml_encode(MOE_GGML_Q8_0, x, N, raw);
  moe_ggml_decode(MOE_GGML_Q8_0, raw, N, y);
  for (int b = 0; b < N / 32; b++) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[32 * b + i]));
    for (int i = 0; i < 32; i++) { /* half a step, and the scale's rounding times 127 steps */
      float gap = fabsf(x[32 * b + i] - y[32 * b + i]);
      cr_assert_leq(gap, largest * (0.5f / 127 + 1.0f / 2048), "block %d: %g", b, (double)gap);
    }
  }
}

Test(gguf, q8_0_has_the_bytes_that_ggml_writes) {
  float x[32] = {0};
  unsigned char raw[34];
  x[0] = -127.0f; /* scale 1: f16 0x3c00 */
  x[1] = 2.5f;    /* halves away from zero */
  x[2] = -2.5f;
  x[31] = 126.4f;
  moe_ggml_encode(MOE_GGML_Q8_0, x, 32, raw);
  cr_assert(raw[0] == 0x00 && raw[1] == 0x3c);
  cr_assert(raw[2] == 0x81 && raw[3] == 3 && raw[4] == 0xfd && raw[5] == 0 && raw[33] == 126);
}

Test(gguf, a_block_of_zeros_or_of_no_numbers_is_defined) {
  float x[64] = {0}, y[64];
  char raw[68];
  for (int i = 32; i < 64; i++) x[i] = i % 2 ? NAN : INFINITY;
  moe_ggml_encode(MOE_GGML_Q8_0, x, 64, raw);
  moe_ggml_decode(MOE_GGML_Q8_0, raw, 64, y);
  for (int i = 0; i < 32; i++) cr_assert_eq(y[i], 0.0f);
  cr_assert(!isfinite(y[32] + y[33]));
}

/* ---- what is written reads back ---- */

static const int64_t shapes[][3] = {{7, 3, 1}, {64, 5, 1}, {33, 1, 1}, {32, 2, 3}};
static const moe_ggml_type types[] = {MOE_GGML_F32, MOE_GGML_Q8_0, MOE_GGML_BF16, MOE_GGML_F16};
enum { TENSORS = 4 };

static void write_sample(void) {
  static const char *const words[] = {"a", "", "\xe2\x96\x81the"};
  static const float scores[] = {-1.5f, 0.0f, 3.25f};
  static const int32_t kinds[] = {1, -2, 6};
  moe_gguf_writer *w;
  int64_t at[TENSORS];
  EXPECT_OK(moe_gguf_writer_create(&w));
  moe_gguf_put_string(w, "general.architecture", "sample");
  moe_gguf_put_u32(w, "a.number", 4000000000u);
  moe_gguf_put_f32(w, "a.real", 0.1f);
  moe_gguf_put_bool(w, "a.truth", true);
  moe_gguf_put_strings(w, "words", words, 3);
  moe_gguf_put_f32s(w, "scores", scores, 3);
  moe_gguf_put_i32s(w, "kinds", kinds, 3);
  for (int t = 0; t < TENSORS; t++) {
    char name[16];
    snprintf(name, sizeof name, "tensor.%d", t);
    at[t] = moe_gguf_put_tensor(w, name, types[t], t == 2 ? 1 : t == 3 ? 3 : 2, shapes[t]);
  }
  EXPECT_OK(moe_gguf_writer_open(w, path));
  for (int t = 0; t < TENSORS; t++) {
    int64_t n = shapes[t][0] * shapes[t][1] * shapes[t][2];
    float x[512];
    char raw[2048];
    for (int64_t i = 0; i < n; i++) x[i] = value(1000 * t + i);
    moe_ggml_encode(types[t], x, n, raw);
    int64_t bytes = moe_ggml_bytes(types[t], n), half = bytes / 2;
    EXPECT_OK(moe_gguf_writer_write(w, at[t] + half, bytes - half, raw + half));
    EXPECT_OK(moe_gguf_writer_write(w, at[t], half, raw));
  }
  int64_t size = moe_gguf_writer_size(w);
  EXPECT_OK(moe_gguf_writer_finish(w));
  moe_gguf_writer_destroy(w);
  int fd = open(path, O_RDONLY);
  cr_assert_eq(lseek(fd, 0, SEEK_END), size);
  close(fd);
}

Test(gguf, keys_and_tensors_come_back) {
  write_sample();
  moe_gguf *g;
  EXPECT_OK(moe_gguf_open(path, &g));
  int64_t number;
  double real;
  char *text;
  moe_gguf_entry e;
  EXPECT_OK(moe_gguf_int(g, "a.number", &number));
  EXPECT_OK(moe_gguf_number(g, "a.real", &real));
  EXPECT_OK(moe_gguf_text(g, "general.architecture", &text));
  cr_assert(number == 4000000000 && real == (double)0.1f && strcmp(text, "sample") == 0);
  cr_assert(moe_gguf_find(g, "words", &e) && e.element == MOE_GGUF_STRING && e.count == 3);
  cr_assert(moe_gguf_find(g, "kinds", &e) && e.element == MOE_GGUF_I32 && e.count == 3);
  cr_assert(!moe_gguf_find(g, "nothing", &e));
  cr_assert_eq(moe_gguf_int(g, "a.truth", &number), MOE_DAMAGED);
  cr_assert_eq(moe_gguf_tensors(g), TENSORS);
  for (int t = 0; t < TENSORS; t++) {
    char name[16], raw[2048];
    float x[512], y[512];
    snprintf(name, sizeof name, "tensor.%d", t);
    const moe_gguf_tensor *tensor = moe_gguf_tensor_find(g, name);
    cr_assert(tensor && tensor->type == types[t] && tensor->offset % 32 == 0);
    for (int64_t i = 0; i < tensor->elements; i++) x[i] = value(1000 * t + i);
    EXPECT_OK(moe_gguf_read(g, tensor, 0, tensor->elements, raw));
    moe_ggml_decode(tensor->type, raw, tensor->elements, y);
    float bound = types[t] == MOE_GGML_F32 ? 0.0f : types[t] == MOE_GGML_Q8_0 ? 6e-3f : 5e-3f;
    for (int64_t i = 0; i < tensor->elements; i++) cr_assert_float_eq(x[i], y[i], bound);
    cr_assert_eq(moe_gguf_read(g, tensor, 0, tensor->elements + 1, raw), MOE_INVALID);
  }
  free(text);
  moe_gguf_close(g);
}

Test(gguf, a_file_that_exists_is_not_written_over) {
  write_sample();
  moe_gguf_writer *w;
  EXPECT_OK(moe_gguf_writer_create(&w));
  cr_assert_eq(moe_gguf_writer_open(w, path), MOE_IO);
  cr_assert(strstr(moe_error_message(), path));
  moe_gguf_writer_destroy(w);
}

Test(gguf, a_tensor_with_too_much_or_too_little_data_is_an_error) {
  moe_gguf_writer *w;
  EXPECT_OK(moe_gguf_writer_create(&w));
  moe_gguf_put_tensor(w, "t", MOE_GGML_F32, 1, (int64_t[]){2});
  EXPECT_OK(moe_gguf_writer_open(w, path));
  cr_assert_eq(moe_gguf_writer_write(w, MOE_GGUF_ALIGNMENT - 8, 9, "123456789"), MOE_INVALID);
  cr_assert_eq(moe_gguf_writer_write(w, -1, 9, "123456789"), MOE_INVALID);
  EXPECT_OK(moe_gguf_writer_write(w, 0, 4, "1234"));
  cr_assert_eq(moe_gguf_writer_finish(w), MOE_INVALID);
  moe_gguf_writer_destroy(w);
}

/* ---- what anyone may have made ---- */

static unsigned char *bytes;
static int64_t size;

static void load_sample(void) {
  write_sample();
  int fd = open(path, O_RDONLY);
  size = lseek(fd, 0, SEEK_END);
  bytes = malloc((size_t)size);
  cr_assert_eq(pread(fd, bytes, (size_t)size, 0), size);
  close(fd);
}

/* A copy in memory of exactly that size, so that a sanitizer sees a byte read too many. */
static moe_status parse(const unsigned char *data, int64_t n) {
  unsigned char *copy = malloc((size_t)n + (n == 0));
  memcpy(copy, data, (size_t)n);
  moe_gguf *g = NULL;
  moe_error_clear();
  moe_status status = moe_gguf_parse(copy, n, "hostile", &g);
  cr_assert(status == MOE_OK || (g == NULL && status == MOE_DAMAGED), "%s", moe_error_message());
  cr_assert(status == MOE_OK || strstr(moe_error_message(), "hostile"));
  moe_gguf_close(g);
  free(copy);
  return status;
}

Test(gguf, every_truncation_is_refused) {
  load_sample();
  cr_assert_eq(parse(bytes, size), MOE_OK);
  int64_t padding = 32; /* what follows the last tensor carries nothing */
  for (int64_t n = 0; n < size - padding; n++)
    cr_assert_eq(parse(bytes, n), MOE_DAMAGED, "at %lld", (long long)n);
}

Test(gguf, every_changed_byte_of_the_front_is_survived) {
  load_sample();
  static const unsigned char changes[] = {0x01, 0x80, 0xff};
  for (int64_t i = 0; i < 700 && i < size; i++)
    for (int c = 0; c < 3; c++) {
      bytes[i] ^= changes[c];
      parse(bytes, size);
      bytes[i] ^= changes[c];
    }
}

/* Where the bytes after `text` are. */
static int64_t after(const char *text) {
  const unsigned char *at = memmem(bytes, (size_t)size, text, strlen(text));
  cr_assert(at, "%s is not in the file", text);
  return at - bytes + (int64_t)strlen(text);
}

/* With `n` bytes changed the file is refused, and the message says why. */
static void refused(int64_t at, const void *with, size_t n, const char *says) {
  unsigned char before[16];
  memcpy(before, bytes + at, n);
  memcpy(bytes + at, with, n);
  cr_assert_eq(parse(bytes, size), MOE_DAMAGED, "not refused: %s", says);
  cr_assert(strstr(moe_error_message(), says), "\"%s\" is not in \"%s\"", says,
            moe_error_message());
  memcpy(bytes + at, before, n);
}

Test(gguf, impossible_numbers_are_named) {
  static const uint64_t huge = UINT64_MAX, large = 1ull << 40, zero = 0, four = 4;
  static const uint32_t array = MOE_GGUF_ARRAY, many = 77;
  load_sample();
  refused(0, "GGML", 4, "not a GGUF file");
  refused(4, &many, 4, "version 77");
  refused(8, &huge, 8, "the number of tensors");
  refused(16, &large, 8, "the number of keys");
  refused(24, &huge, 8, "a key's length");
  refused(after("a.number"), &many, 4, "no value type 77");
  refused(after("words"), &many, 4, "no value type 77");
  refused(after("words") + 4, &array, 4, "not one that arrays have"); /* arrays of arrays ... */
  refused(after("words") + 8, &large, 8, "an array's length");
  refused(after("words") + 16, &large, 8, "a string's length");
  refused(after("tensor.0"), &many, 4, "77 dimensions");
  refused(after("tensor.0") + 4, &huge, 8, "impossible extent");
  refused(after("tensor.0") + 4, &zero, 8, "impossible extent");
  refused(after("tensor.0") + 4, &large, 8, "beyond the end");
  refused(after("tensor.0") + 20, &many, 4, "type 77");
  refused(after("tensor.1") + 4, &four, 8, "whole blocks");
  refused(after("tensor.1") + 24, &four, 8, "multiple of the alignment");
  refused(after("tensor.1") + 24, &zero, 8, "over another tensor");
  refused(after("tensor.1") + 24, &large, 8, "beyond the end");
  refused(after("tensor.1") - 1, "0", 1, "tensor.0 is there twice");
  refused(after("tensor.1") - 1, "\n", 1, "not plain text");
  refused(after("scores") - 6, "a.real", 6, "this key is there twice");
}
