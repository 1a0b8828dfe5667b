/* Documents out of lines. Plain text gathers lines in `piece` until the document ends or the piece
 * is full; a JSON record keeps its parsed form and hands out its text part by part. */
#include "data/text_input.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "data/line_reader.h"
#include "data/utf8.h"

struct moe_text_input {
  const char *const *paths;
  int files, next_file;
  moe_text_options options;
  moe_text_counts counts;
  int64_t bytes_before; /* of the files that are done */
  bool file_open, jsonl;
  moe_line_reader reader;
  /* plain text: the piece in the making. A line's newline is added only when the next line of the
   * document comes, so documents do not end in one and pieces begin with it. */
  char *piece;
  int64_t piece_length, piece_offset, piece_room;
  bool owes_newline;
  bool inside_document; /* a piece of the document has been handed out */
  /* JSON: the record in the making */
  cJSON *record;
  const char *record_text;
  int64_t record_left, record_offset;
};

/* ---- files ---- */

static int64_t total_size(const char *const *paths, int count) {
  int64_t total = 0;
  for (int i = 0; i < count; i++) {
    struct stat info;
    if (stat(paths[i], &info) != 0 || !S_ISREG(info.st_mode)) return -1;
    total += info.st_size;
  }
  return total;
}

static bool ends_with(const char *text, const char *end) {
  size_t a = strlen(text), b = strlen(end);
  return a >= b && strcmp(text + a - b, end) == 0;
}

static moe_status open_next_file(moe_text_input *in) {
  const char *path = in->paths[in->next_file++];
  MOE_TRY(moe_line_reader_open(&in->reader, path));
  in->file_open = true;
  in->jsonl =
      in->options.format == MOE_TEXT_JSONL ||
      (in->options.format == MOE_TEXT_AUTO &&
       (ends_with(path, ".jsonl") || ends_with(path, ".ndjson") || ends_with(path, ".json")));
  return MOE_OK;
}

static void close_file(moe_text_input *in) {
  in->bytes_before += in->reader.offset;
  in->reader.offset = 0;
  moe_line_reader_close(&in->reader);
  in->file_open = false;
}

moe_status moe_text_open(const char *const *paths, int count, const moe_text_options *options,
                         moe_text_input **out) {
  *out = NULL;
  moe_text_input *in = calloc(1, sizeof *in);
  if (in) {
    in->piece_room = 2 * MOE_TEXT_PIECE + 1; /* a nearly full piece, a newline and a full line */
    in->piece = malloc((size_t)in->piece_room);
  }
  if (!in || !in->piece) {
    free(in);
    return moe_fail(MOE_NO_MEMORY, "out of memory: reading text");
  }
  in->paths = paths;
  in->files = count;
  in->options = *options;
  in->counts.total = total_size(paths, count);
  in->reader.fd = -1;
  in->reader.stop = options->stop;
  *out = in;
  return MOE_OK;
}

void moe_text_close(moe_text_input *in) {
  if (!in) return;
  moe_line_reader_free(&in->reader);
  cJSON_Delete(in->record);
  free(in->piece);
  free(in);
}

moe_text_counts moe_text_progress(const moe_text_input *in) {
  moe_text_counts counts = in->counts;
  counts.bytes = in->bytes_before + in->reader.offset;
  return counts;
}

/* ---- lines ---- */

/* A fault at `offset`: counted when faults are skipped, else an error. */
static moe_status fault(moe_text_input *in, int64_t offset, const char *what, const char *mend) {
  if (in->options.skip_invalid) {
    in->counts.skipped++;
    return MOE_OK;
  }
  return moe_fail(MOE_DAMAGED,
                  "%s: %s, byte %" PRId64 ": %s, or leave such lines out with "
                  "--skip-invalid",
                  what, in->reader.name, offset, mend);
}

static bool is_compressed(const moe_line *line) {
  static const char *const magic[] = {"\x1f\x8b", "\x28\xb5\x2f\xfd", "BZh9", "\3757zXZ"};
  for (size_t i = 0; line->offset == 0 && i < sizeof magic / sizeof magic[0]; i++)
    if (line->length >= (int64_t)strlen(magic[i]) &&
        memcmp(line->text, magic[i], strlen(magic[i])) == 0)
      return true;
  return false;
}

/* Check the text of a line; *usable false: to be left out. A byte order mark is stepped over. */
static moe_status check_line(moe_text_input *in, moe_line *line, bool *usable) {
  *usable = true;
  if (is_compressed(line))
    return moe_fail(MOE_DAMAGED,
                    "the file is compressed: %s: decompress it into standard input: "
                    "zcat FILE | moe-data ... --input -",
                    in->reader.name);
  if (line->offset == 0 && line->length >= 3 && memcmp(line->text, "\xEF\xBB\xBF", 3) == 0) {
    line->text += 3;
    line->length -= 3;
    line->offset += 3;
  }
  int64_t valid = moe_utf8_valid(line->text, line->length);
  if (valid == line->length) return MOE_OK;
  *usable = false;
  if (line->text[valid] == 0)
    return fault(in, line->offset + valid, "NUL byte in text",
                 "is it UTF-16 or binary? convert it");
  return fault(in, line->offset + valid, "not UTF-8", "convert it with iconv");
}

/* ---- plain text ---- */

static void add_text(moe_text_input *in, const char *text, int64_t length, int64_t offset) {
  if (in->piece_length == 0) in->piece_offset = offset;
  memcpy(in->piece + in->piece_length, text, (size_t)length);
  in->piece_length += length;
}

static moe_text_piece hand_out(moe_text_input *in, bool ends_document) {
  moe_text_piece piece = {in->piece, in->piece_length, ends_document, in->reader.name,
                          in->piece_offset};
  in->piece_length = 0;
  in->inside_document = !ends_document;
  if (ends_document) in->owes_newline = false;
  return piece;
}

/* End the document, if there is one: true when a piece is handed out. */
static bool end_document(moe_text_input *in, moe_text_piece *piece) {
  if (in->piece_length == 0 && !in->inside_document) {
    in->owes_newline = false;
    return false;
  }
  *piece = hand_out(in, true);
  return true;
}

/* Does this line only part documents? */
static bool is_border(const moe_text_input *in, const moe_line *line) {
  if (!line->begins || !line->ends) return false;
  int64_t length = line->length;
  switch (in->options.documents) {
  case MOE_DOCUMENT_LINE:
  case MOE_DOCUMENT_BLANK_LINE:
    for (int64_t i = 0; i < length; i++)
      if (!strchr(" \t\r\f\v", line->text[i])) return false;
    return true;
  case MOE_DOCUMENT_SEPARATOR:
    if (length > 0 && line->text[length - 1] == '\r') length--;
    return length == (int64_t)strlen(in->options.separator) &&
           memcmp(line->text, in->options.separator, (size_t)length) == 0;
  default:
    return false;
  }
}

/* Add one line; true when it completed a piece. */
static bool add_line(moe_text_input *in, moe_line *line, moe_text_piece *piece) {
  if (is_border(in, line)) return end_document(in, piece);
  bool alone = in->options.documents == MOE_DOCUMENT_LINE;
  if (alone && line->newline && line->length > 0 && line->text[line->length - 1] == '\r')
    line->length--;
  if (line->begins && in->owes_newline) add_text(in, "\n", 1, line->offset);
  add_text(in, line->text, line->length, line->offset);
  in->owes_newline = line->newline && !alone;
  if (alone && line->ends) return end_document(in, piece);
  if (in->piece_length < MOE_TEXT_PIECE) return false;
  *piece = hand_out(in, false);
  return true;
}

/* At the end of a file its document ends; the file as a document keeps its last newline. */
static bool end_file(moe_text_input *in, moe_text_piece *piece) {
  if (in->options.documents == MOE_DOCUMENT_FILE && in->owes_newline)
    add_text(in, "\n", 1, in->reader.offset);
  return end_document(in, piece);
}

static moe_status next_plain(moe_text_input *in, moe_text_piece *piece, bool *got) {
  for (*got = false; !*got;) {
    moe_line line;
    bool end, usable;
    MOE_TRY(moe_line_next(&in->reader, MOE_TEXT_PIECE, &line, &end));
    if (end) {
      *got = end_file(in, piece);
      close_file(in);
      return MOE_OK;
    }
    MOE_TRY(check_line(in, &line, &usable));
    if (usable)
      *got = add_line(in, &line, piece);
    else if (in->options.documents == MOE_DOCUMENT_LINE && line.ends)
      *got = end_document(in, piece);
  }
  return MOE_OK;
}

/* ---- JSON lines ---- */

/* A C string cannot hold U+0000: cJSON would cut the text there without a word. */
static bool escapes_nul(const moe_line *line) {
  const char *end = line->text + line->length;
  for (const char *at = line->text; (at = memchr(at, '\\', (size_t)(end - at))); at += 2) {
    if (end - at >= 6 && memcmp(at, "\\u0000", 6) == 0) return true;
    if (end - at < 2) return false;
  }
  return false;
}

static void drop_record(moe_text_input *in) {
  cJSON_Delete(in->record);
  in->record = NULL;
}

static bool is_blank(const char *text, int64_t length) {
  for (int64_t i = 0; i < length; i++)
    if (!strchr(" \t\r", text[i])) return false;
  return true;
}

/* The line's text under the key, as in->record; a line left out gives none. */
static moe_status parse_record(moe_text_input *in, const moe_line *line) {
  const char *parse_end = line->text, *line_end = line->text + line->length;
  if (escapes_nul(line)) return fault(in, line->offset, "\\u0000 in a JSON text", "remove it");
  in->record = cJSON_ParseWithLengthOpts(line->text, (size_t)line->length, &parse_end, false);
  if (!in->record || !is_blank(parse_end, line_end - parse_end)) {
    drop_record(in);
    return fault(in, line->offset + (parse_end - line->text), "not JSON",
                 "write one JSON object per line");
  }
  const cJSON *value = cJSON_GetObjectItemCaseSensitive(in->record, in->options.json_key);
  if (!cJSON_IsString(value)) {
    drop_record(in);
    char what[128];
    snprintf(what, sizeof what, "no text under the key \"%.64s\"", in->options.json_key);
    return fault(in, line->offset, what, "name the key with --json-key");
  }
  in->record_text = value->valuestring;
  in->record_left = (int64_t)strlen(value->valuestring);
  in->record_offset = line->offset;
  if (in->record_left == 0) {
    in->counts.empty++;
    drop_record(in);
  }
  return MOE_OK;
}

static moe_status read_record(moe_text_input *in) {
  while (!in->record) {
    moe_line line;
    bool end, usable;
    MOE_TRY(moe_line_next(&in->reader, MOE_TEXT_RECORD, &line, &end));
    if (end) {
      close_file(in);
      return MOE_OK;
    }
    if (!line.ends)
      return moe_fail(MOE_DAMAGED, "JSON record above %d MiB: %s, byte %" PRId64 ": split it",
                      MOE_TEXT_RECORD >> 20, in->reader.name, line.offset);
    MOE_TRY(check_line(in, &line, &usable));
    if (usable && !is_blank(line.text, line.length)) MOE_TRY(parse_record(in, &line));
  }
  return MOE_OK;
}

static moe_status next_json(moe_text_input *in, moe_text_piece *piece, bool *got) {
  if (in->record && in->record_left == 0) drop_record(in); /* its last piece has been used */
  MOE_TRY(read_record(in));
  *got = in->record != NULL;
  if (!*got) return MOE_OK;
  int64_t length = moe_utf8_cut(in->record_text, in->record_left, MOE_TEXT_PIECE);
  *piece = (moe_text_piece){in->record_text, length, length == in->record_left, in->reader.name,
                            in->record_offset};
  in->record_text += length;
  in->record_left -= length;
  return MOE_OK;
}

/* ---- both ---- */

moe_status moe_text_next(moe_text_input *in, moe_text_piece *piece, bool *end) {
  *end = false;
  for (bool got = false; !got;) {
    if (!in->file_open && in->next_file == in->files) {
      *end = true;
      return MOE_OK;
    }
    if (!in->file_open) MOE_TRY(open_next_file(in));
    MOE_TRY(in->jsonl ? next_json(in, piece, &got) : next_plain(in, piece, &got));
  }
  return MOE_OK;
}
