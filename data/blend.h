/* Blends: several token files mixed by weight.
 *
 * Which file global sample g belongs to, and its how-manieth sample it is, is a pure function of g:
 * a pattern of `period` samples repeats for ever. Within a period file i has count[i] samples, its
 * weight's share by largest remainders, spread evenly. Weights that are fractions of a number up to
 * MOE_BLEND_PERIOD (0.7, 0.25, 1/3 written as 1:2, ...) are met exactly, others to 1/65536. */
#ifndef MOE_DATA_BLEND_H
#define MOE_DATA_BLEND_H

#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_BLEND_PERIOD = 1 << 16, MOE_BLEND_FILES = 256 };

/* A blend as written in the configuration. */
typedef struct {
  int files;
  double weight[MOE_BLEND_FILES];
  char *prefix[MOE_BLEND_FILES];
} moe_blend_spec;

/* "PREFIX" or "WEIGHT:PREFIX[,WEIGHT:PREFIX...]". `where` names the text in messages: MOE_USAGE
 * when it is malformed. Clear the result in any case. */
moe_status moe_blend_spec_parse(const char *text, const char *where, moe_blend_spec *out);
void moe_blend_spec_clear(moe_blend_spec *spec);

typedef struct {
  int files;
  int64_t period;
  int64_t *count; /* [files] samples of each file in a period */
  int32_t *file;  /* [period] whose sample this is */
  int32_t *place; /* [period] its number among that file's in the period */
} moe_blend;

/* weight [files] > 0, of any sum. */
moe_status moe_blend_create(const double *weight, int files, moe_blend **out);
void moe_blend_destroy(moe_blend *b);
/* Sample g is number *index of file *file. O(1). */
void moe_blend_place(const moe_blend *b, int64_t g, int *file, int64_t *index);
/* The inverse: g of a file's sample `index`. O(period). */
int64_t moe_blend_sample(const moe_blend *b, int file, int64_t index);

#ifdef __cplusplus
}
#endif
#endif
