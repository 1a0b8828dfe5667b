#include "data/text_input.h"
#include "fixture.h"

static moe_text_options options;
static moe_text_counts counts;

static void set_up(void) {
  make_folder();
  options = (moe_text_options){.json_key = "text"};
}

TestSuite(text_input, .init = set_up, .fini = remove_folder);

/* All documents of a file as one text, each ended by '|'; the caller frees it. */
static moe_status documents_of(const char *path, char **out) {
  moe_text_input *in;
  size_t length = 0;
  *out = calloc(1, 1);
  ok(moe_text_open(&path, 1, &options, &in));
  moe_status status = MOE_OK;
  for (;;) {
    moe_text_piece piece;
    bool end;
    status = moe_text_next(in, &piece, &end);
    if (status != MOE_OK || end) break;
    cr_assert_leq(piece.length, 2 * MOE_TEXT_PIECE);
    *out = realloc(*out, length + (size_t)piece.length + 2);
    memcpy(*out + length, piece.text, (size_t)piece.length);
    length += (size_t)piece.length;
    if (piece.ends_document) (*out)[length++] = '|';
    (*out)[length] = 0;
  }
  counts = moe_text_progress(in);
  moe_text_close(in);
  return status;
}

static void reads(const char *name, const char *text, const char *expected) {
  write_file(in_folder(name), text, strlen(text));
  char *got;
  ok(documents_of(in_folder(name), &got));
  cr_assert_str_eq(got, expected);
  cr_assert_eq(counts.bytes, strlen(text));
  free(got);
}

static void refuses(const char *name, const char *text, size_t size, const char *where) {
  write_file(in_folder(name), text, size);
  char *got;
  fails(MOE_DAMAGED, where, documents_of(in_folder(name), &got));
  cr_assert(strstr(moe_error_message(), in_folder(name)), "%s", moe_error_message());
  free(got);
}

Test(text_input, takes_a_file_as_a_document_to_the_byte) {
  reads("a.txt", "one\n\ntwo \r\n\n", "one\n\ntwo \r\n\n|");
  reads("a.txt", "no newline", "no newline|");
  reads("a.txt", "\n", "\n|");
  reads("a.txt", "", "");
  reads("a.txt", "\xEF\xBB\xBFmarked\n", "marked\n|");
}

Test(text_input, parts_documents_at_blank_lines) {
  options.documents = MOE_DOCUMENT_BLANK_LINE;
  reads("a.txt", "\n\na\nb\n\n \t\r\nc\n", "a\nb|c|");
  reads("a.txt", "a\n\nb", "a|b|");
  reads("a.txt", "\n\n", "");
}

Test(text_input, takes_each_line_as_a_document) {
  options.documents = MOE_DOCUMENT_LINE;
  reads("a.txt", "a b\r\n\nc\nd", "a b|c|d|");
}

Test(text_input, parts_documents_at_a_separator_line) {
  options.documents = MOE_DOCUMENT_SEPARATOR;
  options.separator = "<|endoftext|>";
  reads("a.txt", "a\n\nb\n<|endoftext|>\r\nc <|endoftext|>\n<|endoftext|>\n<|endoftext|>\n",
        "a\n\nb|c <|endoftext|>|");
}

Test(text_input, reads_json_lines) {
  reads("a.jsonl",
        "{\"text\": \"a\\nb \\u20AC\", \"id\": 1}\n\n{\"id\":2,\"text\":\"c\"}\r\n"
        "{\"text\":\"\"}\n {\"text\":\"d\"}",
        "a\nb \xE2\x82\xAC|c|d|");
  cr_assert_eq(counts.empty, 1);
  options.json_key = "content";
  reads("b.jsonl", "{\"text\":1,\"content\":\"x\"}\n", "x|");
  options.format = MOE_TEXT_PLAIN;
  reads("b.jsonl", "{}\n", "{}\n|");
}

Test(text_input, names_file_and_byte_of_bad_text) {
  refuses("a.txt", "good\nba\xFF\xFE", 9, "not UTF-8: ");
  cr_assert(strstr(moe_error_message(), "byte 7"));
  refuses("a.txt", "good\nb\0d", 8, "NUL byte");
  cr_assert(strstr(moe_error_message(), "byte 6"));
  refuses("a.txt", "\x1F\x8B\x08gzip", 7, "compressed");
}

Test(text_input, names_file_and_byte_of_bad_records) {
  const char *first = "{\"text\":\"a\"}\n"; /* 13 bytes */
  static const char *const bad[][2] = {
      {"{\"text\":\"b", "not JSON"},          {"no json\n", "not JSON"},
      {"{\"text\":\"b\"} x\n", "not JSON"},   {"{\"text\":5}\n", "no text under the key"},
      {"{\"txt\":\"b\"}\n", "no text under"}, {"[\"text\"]\n", "no text under"},
      {"{\"text\":\"\\u0000b\"}\n", "u0000"}, {"{\"text\":\"\\uD800\"}\n", "not JSON"},
      {"\"text\"\n", "no text under"},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    char text[128];
    snprintf(text, sizeof text, "%s%s", first, bad[i][0]);
    refuses("a.jsonl", text, strlen(text), bad[i][1]);
    int64_t offset = atoll(strstr(moe_error_message(), "byte ") + 5);
    cr_assert(offset >= 13 && offset <= (int64_t)strlen(text), "%s", moe_error_message());
  }
}

Test(text_input, does_not_take_an_escaped_backslash_for_an_escape) {
  reads("a.jsonl", "{\"text\":\"\\\\u0000\"}\n", "\\u0000|");
}

Test(text_input, survives_deeply_nested_json) {
  enum { DEPTH = 200000 };
  char *text = malloc(DEPTH + 1);
  memset(text, '[', DEPTH);
  text[DEPTH] = 0;
  refuses("a.jsonl", text, DEPTH, "not JSON");
  free(text);
}

Test(text_input, leaves_out_and_counts_bad_lines_when_asked) {
  options.skip_invalid = true;
  reads("a.jsonl", "{\"text\":\"a\"}\n{\n\xFF\n{\"text\":\"b\"}\n{\"x\":1}\n", "a|b|");
  cr_assert_eq(counts.skipped, 3);
  options.documents = MOE_DOCUMENT_LINE;
  reads("a.txt", "a\n\xFF\nb\n", "a|b|");
  cr_assert_eq(counts.skipped, 1);
  options.documents = MOE_DOCUMENT_FILE;
  reads("a.txt", "a\n\xFF\nb\n", "a\nb\n|");
}

/* Lines and documents far beyond a piece, with and without places to cut. */
Test(text_input, gives_large_documents_in_pieces) {
  enum { SIZE = 3 * MOE_TEXT_PIECE + 12345 };
  char *text = malloc(SIZE + 1), *expected = malloc(SIZE + 2);
  text[SIZE] = 0;
  for (int kind = 0; kind < 4; kind++) {
    for (int i = 0; i < SIZE; i++)
      text[i] = kind == 0   ? 'x'
                : kind == 1 ? (i % 7 ? 'y' : ' ')
                : kind == 2 ? (i % 1000 ? 'z' : '\n')
                            : "\xE2\x82\xAC"[i % 3];
    if (kind == 3) memset(text + SIZE / 3 * 3, 'e', (size_t)(SIZE % 3));
    snprintf(expected, SIZE + 2, "%s|", text);
    reads("a.txt", text, expected);
  }
  memset(text, 'x', SIZE);
  text[100000] = text[700000] = '\n';
  options.documents = MOE_DOCUMENT_LINE;
  memcpy(expected, text, SIZE);
  expected[100000] = expected[700000] = expected[SIZE] = '|';
  reads("a.txt", text, expected);

  memcpy(text, "{\"text\":\"", 9);
  memset(text + 9, 'j', SIZE - 9);
  memcpy(text + SIZE - 2, "\"}", 2);
  snprintf(expected, SIZE, "%.*s|", SIZE - 11, text + 9);
  options.documents = MOE_DOCUMENT_FILE;
  reads("a.jsonl", text, expected);
  free(text);
  free(expected);
}

Test(text_input, cuts_utf8_only_between_characters) {
  enum { SIZE = 2 * MOE_TEXT_PIECE };
  char *text = malloc(SIZE);
  for (int i = 0; i < SIZE; i++) text[i] = (i < 1 ? 'a' : "\xE2\x82\xAC"[(i - 1) % 3]);
  write_file(in_folder("a.txt"), text, SIZE / 3 * 3 - 2);
  char *got;
  ok(documents_of(in_folder("a.txt"), &got));
  free(got);
  free(text);
}

Test(text_input, keeps_files_apart) {
  write_file(in_folder("a.txt"), "a\n", 2);
  write_file(in_folder("b.jsonl"), "{\"text\":\"b\"}", 12);
  const char *paths[] = {in_folder("a.txt"), in_folder("b.jsonl"), in_folder("a.txt")};
  moe_text_input *in;
  moe_text_piece piece;
  bool end;
  ok(moe_text_open(paths, 3, &options, &in));
  const char *const expected[] = {"a\n", "b", "a\n"};
  for (int i = 0; i < 3; i++) {
    ok(moe_text_next(in, &piece, &end));
    cr_assert(!end && piece.ends_document);
    cr_assert_eq(piece.length, strlen(expected[i]));
    cr_assert_arr_eq(piece.text, expected[i], strlen(expected[i]));
  }
  ok(moe_text_next(in, &piece, &end));
  cr_assert(end);
  cr_assert_eq(moe_text_progress(in).bytes, 16);
  cr_assert_eq(moe_text_progress(in).total, 16);
  moe_text_close(in);
}
