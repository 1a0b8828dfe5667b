/* Files and folders the careful way: what was reported done is on the disk. All functions are local
 * and say in their message which path failed and why. */
#ifndef MOE_CHECKPOINT_FILES_H
#define MOE_CHECKPOINT_FILES_H

#include "core/base/status.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Make a folder and its parents, each fsynced into its parent; existing ones are fine. */
moe_status moe_files_make_folders(const char *path);
moe_status moe_files_sync_folder(const char *path);
/* Write a new file and fsync it. On an error nothing is left. */
moe_status moe_files_write_new(const char *path, const void *data, int64_t length);
/* The same with what `print` writes to a stream. */
moe_status moe_files_print_new(const char *path, void (*print)(FILE *out, const void *context),
                               const void *context);
/* Replace a file at once: PATH.tmp, fsync, rename, fsync of the folder. */
moe_status moe_files_replace(const char *path, const void *data, int64_t length);
/* Read a regular file (no link) of at most `limit` bytes; malloc'd, ended by an extra 0.
 * MOE_DAMAGED when it is missing, of another kind or larger. */
moe_status moe_files_read(const char *path, int64_t limit, char **out, int64_t *length);
/* Open a regular file (no link) to read. MOE_DAMAGED as above. */
moe_status moe_files_open(const char *path, int *fd, int64_t *size);
/* Bytes [at, at + bytes) of an open file; `path` is for messages. MOE_DAMAGED when it ends before,
 * MOE_IO. */
moe_status moe_files_read_at(int fd, const char *path, int64_t at, int64_t bytes, void *out);
moe_status moe_files_write_at(int fd, const char *path, int64_t at, int64_t bytes,
                              const void *data);
/* The same for a part of a file that threads write together and one fsyncs at its end: what is
 * worth it begins its way to the disk at once. */
moe_status moe_files_write_part(int fd, const char *path, int64_t at, int64_t bytes,
                                const void *data);
/* For a file that is written from its beginning and fsynced at its end: have the kernel bring to
 * the disk what was written up to byte `end`, as soon as that is worth it, without waiting. *begun,
 * from 0: how far that has come. */
void moe_files_sync_soon(int fd, int64_t end, int64_t *begun);
/* Remove a folder of files. False (errno) when something stayed; leaves the error message alone. */
bool moe_files_remove_folder(const char *path);
bool moe_files_is_folder(const char *path);
/* Bytes that may still be written where `path` is; INT64_MAX when nobody can tell. */
int64_t moe_files_free_bytes(const char *path);

#ifdef __cplusplus
}
#endif
#endif
