/* What the data tests share: a folder of their own and token files of known contents. */
#ifndef MOE_TESTS_DATA_FIXTURE_H
#define MOE_TESTS_DATA_FIXTURE_H

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/token_file.h"

#define ok(call) cr_assert_eq((call), MOE_OK, "%s", moe_error_message())
/* The call fails with this status and a message that holds `text`. */
#define fails(code, text, call)                                                   \
  do {                                                                            \
    moe_error_clear();                                                            \
    cr_assert_eq((call), (code), "not %s: \"%s\"", #code, moe_error_message());   \
    cr_assert(strstr(moe_error_message(), (text)) != NULL, "\"%s\" lacks \"%s\"", \
              moe_error_message(), (text));                                       \
  } while (0)

/* A fresh folder, removed with `remove_folder`. */
static char folder[64];

static inline void make_folder(void) {
  strcpy(folder, "/tmp/moe-data-test-XXXXXX");
  cr_assert(mkdtemp(folder) != NULL);
}

static inline void remove_folder(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf '%s'", folder);
  cr_assert_eq(system(command), 0);
}

/* The name of a file in the folder; of the last eight asked for. */
static inline const char *in_folder(const char *name) {
  static char paths[8][128];
  static int next;
  char *path = paths[next++ % 8];
  snprintf(path, sizeof paths[0], "%s/%s", folder, name);
  return path;
}

static inline void write_file(const char *path, const void *data, size_t size) {
  FILE *file = fopen(path, "wb");
  cr_assert(file && fwrite(data, 1, size, file) == size);
  cr_assert_eq(fclose(file), 0);
}

/* The whole file; the caller frees it. */
static inline char *read_whole_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  cr_assert(file != NULL, "%s", path);
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *data = calloc(*size + 1, 1);
  cr_assert_eq(fread(data, 1, *size, file), *size);
  fclose(file);
  return data;
}

/* Documents of these lengths; token number p of the file is first + p, modulo vocab_size. */
static inline void make_token_file(const char *prefix, int64_t vocab_size, int32_t first,
                                   const int64_t *lengths, int64_t documents) {
  moe_token_writer *w;
  ok(moe_token_writer_create(prefix, vocab_size, &w));
  int64_t p = 0;
  for (int64_t d = 0; d < documents; d++) {
    for (int64_t i = 0; i < lengths[d]; i++, p++) {
      int32_t id = (int32_t)((first + p) % vocab_size);
      ok(moe_token_writer_append(w, &id, 1));
    }
    ok(moe_token_writer_end_document(w));
  }
  ok(moe_token_writer_finish(w));
  moe_token_writer_destroy(w);
}

#endif
