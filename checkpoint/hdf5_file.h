/* One shard: an HDF5 file whose datasets are contiguous element ranges of tensors.
 *
 * This is the only place that calls HDF5. It writes the plainest files the library can make and,
 * reading, accepts nothing else: hard links, contiguous datasets of the expected type and extent at
 * the expected offset; no filters, no external storage. All functions are local; failures carry
 * HDF5's innermost reason. */
#ifndef MOE_CHECKPOINT_HDF5_FILE_H
#define MOE_CHECKPOINT_HDF5_FILE_H

#include "checkpoint/manifest.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t id;  /* HDF5's; -1 when closed */
  int fd;      /* the same file, for data, to allocate, hash metadata and fsync */
  bool broken; /* HDF5 could not close it; it must not be touched through HDF5 again */
  char path[MOE_PATH];
} moe_hdf5;

/* One open dataset. */
typedef struct {
  int64_t id, type, space;
  int rank;
  int fd;
  int64_t offset, size; /* of its first byte in the file; of one element */
  const char *path;     /* of the file */
} moe_dataset;

/* Make a new file with `room` bytes set aside on the disk. MOE_IO: the disk is full, ... */
moe_status moe_hdf5_create(const char *path, int64_t room, moe_hdf5 *out);
/* Open to read a file whose path and fd the caller has set and checked. MOE_DAMAGED. */
moe_status moe_hdf5_open(moe_hdf5 *f);
/* Close in HDF5, which writes its metadata; fd stays open. */
moe_status moe_hdf5_close(moe_hdf5 *f);
/* Close everything; after a failure, gives up what was written. Safe on {.id = -1, .fd = -1}. */
void moe_hdf5_release(moe_hdf5 *f);

/* Make the dataset of slice s and set s->offset. */
moe_status moe_dataset_create(moe_hdf5 *f, moe_slice *s, moe_dataset *out);
/* Open it and check that it is what s says. MOE_DAMAGED names the dataset and the difference. */
moe_status moe_dataset_open(const moe_hdf5 *f, const moe_slice *s, moe_dataset *out);
/* MOE_IO when what was written could not be kept. */
moe_status moe_dataset_close(moe_dataset *d);
/* Elements [begin, begin + count) of the dataset, in the file's type. MOE_IO, MOE_DAMAGED: the file
 * ends before. */
moe_status moe_dataset_write(const moe_dataset *d, int64_t begin, int64_t count, const void *data);
moe_status moe_dataset_read(const moe_dataset *d, int64_t begin, int64_t count, void *data);
/* Attributes shape, slice, role and xxh3_128: the file tells its story without the manifest. */
moe_status moe_dataset_describe(const moe_dataset *d, const moe_slice *s);

#ifdef __cplusplus
}
#endif
#endif
