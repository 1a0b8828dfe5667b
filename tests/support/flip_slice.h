/* Damage to a tensor of a checkpoint. */
#ifndef MOE_TESTS_SUPPORT_FLIP_SLICE_H
#define MOE_TESTS_SUPPORT_FLIP_SLICE_H

#include <criterion/criterion.h>
#include <fcntl.h>
#include <unistd.h>

#include "checkpoint/manifest.h"

/* Flip a bit in the middle of the first slice of this role; again: it is as it was. */
static inline void flip_slice(const char *step_folder, moe_role role) {
  moe_manifest m;
  char path[MOE_PATH];
  unsigned char byte;
  int64_t i = 0;
  cr_assert(moe_manifest_read(step_folder, &m) == MOE_OK, "%s", moe_error_message());
  while (i < m.slices && m.slice[i].role != role) i++;
  cr_assert(i < m.slices);
  int64_t at = m.slice[i].offset + moe_slice_bytes(&m.slice[i]) / 2;
  snprintf(path, sizeof path, "%.3000s/%s", step_folder, m.file[m.slice[i].file].name);
  int fd = open(path, O_RDWR);
  cr_assert(fd >= 0 && pread(fd, &byte, 1, at) == 1);
  byte ^= 1;
  cr_assert(pwrite(fd, &byte, 1, at) == 1);
  close(fd);
  moe_manifest_clear(&m);
}

#endif
