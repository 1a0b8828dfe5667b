/* TensorBoard event files: scalars by step.
 *
 * A file is a sequence of TFRecords, each holding one Event message (tfevents.proto):
 *
 *     u64 length | u32 masked crc of length | Event | u32 masked crc of Event     little-endian
 *     masked crc = rotate_right(crc32c, 15) + 0xa282ead8
 */
#ifndef MOE_CORE_TRAIN_TFEVENTS_H
#define MOE_CORE_TRAIN_TFEVENTS_H

#include "core/base/status.h"

#include <stddef.h>
#include <stdint.h>

typedef struct moe_tfevents moe_tfevents;

/* Starts a new file in `folder`, which is created when missing. It tells TensorBoard to forget
 * steps after `first_step` in older files of the folder. MOE_IO names the file. Local. */
moe_status moe_tfevents_create(const char *folder, int64_t first_step, moe_tfevents **out);
/* Writes what is still in memory. Accepts NULL. */
void moe_tfevents_destroy(moe_tfevents *w);

/* Adds a scalar to the event in the making; the tag is formatted as by printf. */
void moe_tfevents_scalar(moe_tfevents *w, double value, const char *tag_format, ...)
    __attribute__((format(printf, 3, 4)));
/* Ends the event. It reaches the file within a few seconds' worth of steps. */
void moe_tfevents_commit(moe_tfevents *w, int64_t step);

/* CRC-32C (Castagnoli), RFC 3720 appendix B.4. */
uint32_t moe_crc32c(const void *data, size_t bytes);

#endif
