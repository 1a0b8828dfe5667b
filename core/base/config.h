/* Configuration: an INI file (read with libinih), overrides from --set, defaults from the table.
 *
 * Each key's provenance (file and line, or --set) is kept, so that contradictions found later can
 * still name the place. All functions are local. */
#ifndef MOE_CORE_BASE_CONFIG_H
#define MOE_CORE_BASE_CONFIG_H

#include <stdio.h>

#include "core/base/status.h"
#include "core/base/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_CONFIG_TEXT = 1024, MOE_CONFIG_MAX_KEYS = 128 };

typedef struct {
#define SECTION(name, help) struct {
#define END_SECTION(name) \
  }                       \
  name;
#define INT(section, key, def, min, max, help) int64_t key;
#define REAL(section, key, def, min, max, help) double key;
#define BOOL(section, key, def, help) bool key;
#define TEXT(section, key, def, help) char key[MOE_CONFIG_TEXT];
#define ENUM(section, key, def, choices, help) int key;
#include "core/base/config_table.h"
#undef INT
#undef REAL
#undef BOOL
#undef TEXT
#undef ENUM
  /* where row i of the table was set: "cfg.ini:12", "--set"; empty for a default */
  char origin[MOE_CONFIG_MAX_KEYS][MOE_CONFIG_TEXT];
  bool unknown_key; /* the last text read had a section or key that this version does not know */
} moe_config;

/* Enumerators in the order of the table's choices. */
enum { /* each computes more again than the one before */
       MOE_RECOMPUTE_NONE,
       MOE_RECOMPUTE_SWIGLU,
       MOE_RECOMPUTE_EXPERTS,
       MOE_RECOMPUTE_BLOCK,
       MOE_RECOMPUTE_AUTO
};
enum { MOE_AUX_BATCH, MOE_AUX_SEQUENCE };
enum { MOE_SCHEDULE_COSINE, MOE_SCHEDULE_LINEAR, MOE_SCHEDULE_CONSTANT, MOE_SCHEDULE_WSD };
enum { MOE_EXCHANGE_AUTO, MOE_EXCHANGE_ALLTOALL, MOE_EXCHANGE_ALLGATHER };
enum { MOE_PRECISION_FP32, MOE_PRECISION_BF16, MOE_PRECISION_FP16 };
enum { MOE_STATE_FP32, MOE_STATE_BF16, MOE_STATE_AUTO }; /* grad_dtype, moment_dtype */
enum { MOE_BACKEND_AUTO, MOE_BACKEND_CPU, MOE_BACKEND_CUDA };

void moe_config_defaults(moe_config *c);
/* Read `path` over what `c` holds. MOE_USAGE names file and line: unknown section or key,
 * duplicate, wrong type, out of range, line too long, unreadable file. */
moe_status moe_config_read(moe_config *c, const char *path);
/* The same from memory; `name` stands for the file in messages. (Fuzzed; used by checkpoints.) */
moe_status moe_config_parse(moe_config *c, const char *text, int64_t length, const char *name);
/* One "section.key=value". */
moe_status moe_config_set(moe_config *c, const char *assignment);
/* The value of "section.key" as it is written in an INI file. MOE_USAGE: there is no such key. */
moe_status moe_config_get(const moe_config *c, const char *name, char text[MOE_CONFIG_TEXT]);
/* Fill sizes from the preset and check what depends on several keys (H % G, K <= E, even d,
 * sequence_length, min_lr, warm-up against steps, ...). `world` ranks; world < 1 skips the checks
 * that need it (ep divides world, ep <= E, global_batch a multiple of micro_batch * world).
 * Idempotent. MOE_USAGE names the keys, where they were set, and how to mend it. */
moe_status moe_config_resolve(moe_config *c, int world);
/* Write every key as INI that reads back to the same configuration (doubles in full). */
void moe_config_print(const moe_config *c, FILE *out);
/* The same into malloc'd text (caller frees). */
char *moe_config_text(const moe_config *c);
/* docs/config.md. */
void moe_config_print_markdown(FILE *out);
/* Where "section.key" was set, for error messages: "cfg.ini:12", "--set" or "default". */
const char *moe_config_origin(const moe_config *c, const char *section, const char *key);
/* Keys that must agree to resume a checkpoint (the model's mathematics, data and seed) and differ;
 * writes one "section.key: saved A, now B" line each to `out` and returns how many. */
int moe_config_diff_for_resume(const moe_config *saved, const moe_config *now, FILE *out);

moe_dtype moe_config_compute_dtype(const moe_config *c);
/* Types of the experts' gradients and moments. `auto` that is not settled yet counts as fp32. */
moe_dtype moe_config_grad_dtype(const moe_config *c);
moe_dtype moe_config_moment_dtype(const moe_config *c);
/* May the experts' gradients be bf16 on `world` ranks (resolved)? */
bool moe_config_allows_bf16_grads(const moe_config *c, int world);

#ifdef __cplusplus
}
#endif
#endif
