/* safetensors: what is written is what the format says, and what is hostile is refused. */
#include <unistd.h>

#include "checkpoint/json.h"
#include "checkpoint/safetensors.h"
#include "tests/checkpoint/fixture.h"

TestSuite(safetensors, .timeout = 60);

static char path[64];

static void make_path(void) {
  strcpy(path, "/tmp/moe-safetensors-XXXXXX");
  int fd = mkstemp(path);
  cr_assert(fd >= 0);
  close(fd);
  unlink(path);
}

static const moe_safetensors_entry entries[] = {
    {"a.weight", MOE_F32, 2, {2, 3}}, {"b", MOE_BF16, 1, {5}}, {"c", MOE_F16, 2, {1, 4}}};
static const char data[24 + 10 + 8] = "f32 f32 f32 f32 f32 f32 bfbfbfbfbfhfhfhfhf";

static void write_sample(void) {
  moe_safetensors_writer w;
  make_path();
  EXPECT_OK(moe_safetensors_create(path, entries, 3, &w));
  EXPECT_OK(moe_safetensors_write(&w, 30, sizeof data - 30, data + 30));
  EXPECT_OK(moe_safetensors_write(&w, 0, 30, data));
  EXPECT_OK(moe_safetensors_finish(&w));
}

Test(safetensors, are_read_as_they_were_written) {
  write_sample();
  moe_safetensors f;
  char got[sizeof data];
  EXPECT_OK(moe_safetensors_open(path, &f));
  cr_assert_eq(f.count, 3);
  int64_t at = 0;
  for (int i = 0; i < 3; i++) {
    const moe_safetensor *t = moe_safetensors_find(&f, entries[i].name);
    cr_assert(t && t->readable);
    cr_assert_eq(t->dtype, entries[i].dtype);
    cr_assert_eq(t->dims, entries[i].dims);
    cr_assert_eq(t->shape[0], entries[i].shape[0]);
    EXPECT_OK(moe_safetensors_read(&f, t, 0, t->count, got + at));
    at += t->count * moe_dtype_size(t->dtype);
  }
  cr_assert_arr_eq(got, data, sizeof data);
  cr_assert_null(moe_safetensors_find(&f, "d"));
  const moe_safetensor *a = moe_safetensors_find(&f, "a.weight");
  EXPECT_OK(moe_safetensors_read(&f, a, 4, 2, got));
  cr_assert_arr_eq(got, data + 16, 8);
  cr_assert_eq(moe_safetensors_read(&f, a, 5, 2, got), MOE_INVALID);
  cr_assert_eq(moe_safetensors_read(&f, a, -1, 1, got), MOE_INVALID);
  moe_safetensors_close(&f);
  unlink(path);
}

Test(safetensors, are_what_the_format_says_to_a_reader_that_is_not_ours) {
  write_sample();
  SHELL("python3 -c \"\n"
        "import json, struct\n"
        "raw = open('%s', 'rb').read()\n"
        "n, = struct.unpack('<Q', raw[:8])\n"
        "assert (8 + n) %% 8 == 0\n"
        "h = json.loads(raw[8:8 + n])\n"
        "assert h.pop('__metadata__') == {'format': 'pt'}\n"
        "assert h == {'a.weight': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]},\n"
        "  'b': {'dtype': 'BF16', 'shape': [5], 'data_offsets': [24, 34]},\n"
        "  'c': {'dtype': 'F16', 'shape': [1, 4], 'data_offsets': [34, 42]}}, h\n"
        "assert raw[8 + n:] == b'f32 f32 f32 f32 f32 f32 bfbfbfbfbfhfhfhfhf'\n\"",
        path);
  unlink(path);
}

Test(safetensors, are_not_finished_until_all_of_their_data_came) {
  moe_safetensors_writer w;
  make_path();
  EXPECT_OK(moe_safetensors_create(path, entries, 3, &w));
  EXPECT_OK(moe_safetensors_write(&w, 0, 24, data));
  cr_assert_eq(moe_safetensors_write(&w, 24, sizeof data - 23, data), MOE_INVALID);
  cr_assert_eq(moe_safetensors_write(&w, -1, 1, data), MOE_INVALID);
  cr_assert_eq(moe_safetensors_finish(&w), MOE_INVALID);
  cr_assert_eq(moe_safetensors_create(path, entries, 3, &w), MOE_IO); /* it exists */
  unlink(path);
}

/* ---- hostile headers ---- */

#define T(dtype, shape, from, to) \
  "{\"dtype\": \"" dtype "\", \"shape\": " shape ", \"data_offsets\": [" #from ", " #to "]}"

static moe_status parse(const char *header, int64_t bytes) {
  moe_safetensors f;
  moe_status status = moe_safetensors_parse(header, (int64_t)strlen(header), bytes, "it", &f);
  moe_safetensors_close(&f);
  return status;
}

Test(safetensors, with_types_we_do_not_compute_with_are_still_checked) {
  EXPECT_OK(
      parse("{\"a\": " T("I64", "[2]", 0, 16) ", \"b\": " T("F8_E4M3", "[3]", 16, 19) "}", 19));
  EXPECT_OK(parse("{\"a\": " T("F32", "[]", 0, 4) ", \"e\": " T("F32", "[0, 3]", 4, 4) "}", 4));
  EXPECT_OK(parse("{}", 0));
}

Test(safetensors, that_contradict_themselves_are_refused) {
  static const struct {
    const char *header;
    int64_t bytes;
    const char *says;
  } cases[] = {
      {"", 0, "JSON"},
      {"[1]", 0, "not a JSON object"},
      {"{} x", 0, "after its JSON"},
      {"{\"a\": 3}", 0, "not described"},
      {"{\"a\": {}}", 0, "no dtype"},
      {"{\"a\": " T("F33", "[1]", 0, 4) "}", 4, "unknown dtype"},
      {"{\"a\": {\"dtype\": \"F32\", \"data_offsets\": [0, 4]}}", 4, "no shape"},
      {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}", 4, "no data_offsets"},
      {"{\"a\": " T("F32", "[-1]", 0, 4) "}", 4, "shape"},
      {"{\"a\": " T("F32", "[1.5]", 0, 4) "}", 4, "shape"},
      {"{\"a\": " T("F32", "[\\\"1\\\"]", 0, 4) "}", 4, "JSON"},
      {"{\"a\": " T("F32", "[1,1,1,1,1]", 0, 4) "}", 4, "dimensions"},
      {"{\"a\": " T("F32", "[9007199254740992, 9007199254740992]", 0, 4) "}", 4, "shape"},
      {"{\"a\": " T("F32", "[4611686018427387904]", 0, 4) "}", 4, "shape"},
      {"{\"a\": " T("F32", "[2]", 0, 4) "}", 4, "do not fit"},
      {"{\"a\": " T("F32", "[1]", 4, 0) "}", 4, "do not fit"},
      {"{\"a\": " T("F32", "[1]", -4, 0) "}", 4, "data_offsets"},
      {"{\"a\": " T("F32", "[1]", 0.5, 4.5) "}", 4, "data_offsets"},
      {"{\"a\": " T("F32", "[2]", 0, 8) "}", 4, "beyond the end"},
      {"{\"a\": " T("F32", "[1]", 0, 4) "}", 8, "belong to no tensor"},
      {"{\"a\": " T("F32", "[1]", 4, 8) "}", 8, "unused bytes"},
      {"{\"a\": " T("F32", "[1]", 0, 4) ", \"b\": " T("F32", "[1]", 2, 6) "}", 6, "shares bytes"},
      {"{\"a\": " T("F32", "[1]", 0, 4) ", \"b\": " T("F32", "[1]", 0, 4) "}", 4, "shares bytes"},
      {"{\"a\": " T("F32", "[1]", 0, 4) ", \"a\": " T("F32", "[1]", 4, 8) "}", 8, "twice"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    cr_expect_eq(parse(cases[i].header, cases[i].bytes), MOE_DAMAGED, "%s", cases[i].header);
    cr_expect(strstr(moe_error_message(), cases[i].says), "%s: %s", cases[i].header,
              moe_error_message());
  }
}

/* A file of `bytes` bytes that says its header has `length`. */
static moe_status open_with_length(uint64_t length, int64_t bytes) {
  make_path();
  FILE *f = fopen(path, "wb");
  fwrite(&length, 1, bytes < 8 ? (size_t)bytes : 8, f);
  for (int64_t i = 8; i < bytes; i++) fputc(' ', f);
  fclose(f);
  moe_safetensors opened;
  moe_status status = moe_safetensors_open(path, &opened);
  unlink(path);
  return status;
}

Test(safetensors, with_an_impossible_header_length_are_refused_without_reading_it) {
  static const uint64_t lengths[] = {UINT64_MAX, 1ull << 63, 1ull << 40, (16 << 20) + 1, 100};
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
    cr_assert_eq(open_with_length(lengths[i], 64), MOE_DAMAGED);
    EXPECT_SAYS("header");
  }
  cr_assert_eq(open_with_length(0, 5), MOE_DAMAGED);
  EXPECT_SAYS("too short");
  cr_assert_eq(open_with_length(0, 8), MOE_DAMAGED);
}

/* ---- JSON that is a bomb ---- */

Test(safetensors, json_that_would_need_too_much_memory_is_refused_before_it_is_parsed) {
  int64_t length = 3 << 20;
  char *text = malloc((size_t)length);
  cJSON *root;
  memset(text, ',', (size_t)length);
  text[0] = '[';
  cr_assert_eq(moe_json_parse(text, length, "it", &root), MOE_DAMAGED);
  EXPECT_SAYS("values");
  memset(text, '[', (size_t)length);
  cr_assert_eq(moe_json_parse(text, length, "it", &root), MOE_DAMAGED);
  memset(text, ' ', (size_t)length);
  memcpy(text, "{\"\\\\\\\",,,[[[\": [[1, {\"b\": 2}]]}", 31); /* brackets in a string are none */
  EXPECT_OK(moe_json_parse(text, length, "it", &root));
  cJSON_Delete(root);
  memset(text, '{', 40);
  cr_assert_eq(moe_json_parse(text, 40, "it", &root), MOE_DAMAGED);
  EXPECT_SAYS("deep");
  free(text);
}
