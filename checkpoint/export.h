/* What exports of every format settle in the same way before anything is written. */
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

/* Make the folder beside its place; MOE_USAGE when the place is taken and is not to be, or cannot
 * be, replaced. temporary[]: where to write; "" on an error. */
moe_status moe_export_folder_begin(const moe_export_options *options, char temporary[MOE_PATH]);
/* Everything in it is on disk: give it its name. */
moe_status moe_export_folder_commit(const moe_export_options *options, const char *temporary);

#ifdef __cplusplus
}
#endif
#endif
