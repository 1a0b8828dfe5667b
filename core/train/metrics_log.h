/* metrics.jsonl: one JSON object per line, and what becomes of it when a run resumes. */
#ifndef MOE_CORE_TRAIN_METRICS_LOG_H
#define MOE_CORE_TRAIN_METRICS_LOG_H

#include "core/train/append_file.h"

/* Removes from the file at `path` the records of steps after `last_step`, and lines that are not
 * records (a crash tears the last one), which it warns about. The file is replaced atomically; a
 * missing file is fine. MOE_IO names it. Local. */
moe_status moe_metrics_log_cut(const char *path, int64_t last_step);

/* A JSON object written straight to a line. Keys are plain names; inside a list they are NULL. */
typedef struct {
  moe_append_file *file;
  bool comma; /* something precedes at this level */
} moe_json;

moe_json moe_json_line(moe_append_file *file);
void moe_json_begin(moe_json *j, const char *key, char bracket);
void moe_json_end(moe_json *j, char bracket);
void moe_json_int(moe_json *j, const char *key, int64_t value);
/* With as few digits as give the same double again; null when not finite. */
void moe_json_real(moe_json *j, const char *key, double value);
void moe_json_bool(moe_json *j, const char *key, bool value);
void moe_json_null(moe_json *j, const char *key);
/* Ends the line and sends it to the file. */
void moe_json_line_end(moe_json *j);

#endif
