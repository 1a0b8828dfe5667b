/* What exports of every format do in the same way: settle what is to be written, write it, and give
 * it its name. */
#ifndef MOE_CHECKPOINT_EXPORT_H
#define MOE_CHECKPOINT_EXPORT_H

#include "checkpoint/hf.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bring the source to what the options ask for: its rope_alpha becomes theirs, and a router bias is
 * dropped. *context: positions the export is for, longer by as much as alpha is higher. MOE_USAGE:
 * a bias that was not to be dropped, heads that have no NTK scaling. Local. */
moe_status moe_export_settle(const moe_export_options *options, moe_weights *w, int64_t *context);
/* The type of matrices: the option's, else the run's compute type. */
moe_dtype moe_export_dtype(const moe_export_options *options, const moe_weights *w);

/* A tensor on its way into a file. */
typedef struct {
  const moe_param *param;
  int64_t rows;      /* at a time */
  int64_t row_bytes; /* of one in the file, at most 4 an element */
  void *file;        /* for `write` */
  int64_t offset;    /* of its first byte */
} moe_export_tensor;

typedef struct {
  moe_weights *from;
  const moe_export_tensor *tensor; /* [tensors], in the order in which they are begun */
  int64_t tensors;
  /* Rows of p as the file has them; an error where one has a value that is not finite. Any thread.
   */
  moe_status (*encode)(const void *context, const moe_param *p, const float *values, int64_t rows,
                       void *out);
  /* Bytes [at, at + bytes) of a file. Any thread. */
  moe_status (*write)(void *file, int64_t at, int64_t bytes, const void *data);
  moe_status (*finish)(void *context); /* all was written: bring it to the disk */
  void *context;
  const volatile sig_atomic_t *stop;
} moe_export_work;

/* Write all tensors by all processors, with progress; how many bytes of data in how many seconds.
 * The first failure; MOE_STOPPED. */
moe_status moe_export_write(const moe_export_work *work, int64_t *bytes, double *seconds);
/* For `encode`: p of `from` cannot be kept as `type`. */
moe_status moe_export_not_finite(const moe_weights *from, const moe_param *p, const char *type);
/* Rows of a tensor to write at a time, unless there is a reason for others. */
int64_t moe_export_rows(const moe_param *p);

/* Make the folder beside its place; MOE_USAGE when the place is taken and is not to be, or cannot
 * be, replaced. temporary[]: where to write; "" on an error. */
moe_status moe_export_folder_begin(const moe_export_options *options, char temporary[MOE_PATH]);
/* Everything in it is on disk: give it its name. */
moe_status moe_export_folder_commit(const moe_export_options *options, const char *temporary);

#ifdef __cplusplus
}
#endif
#endif
