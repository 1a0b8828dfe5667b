/* Settling an export, and the folder it is made in: complete under its name, or absent. */
#include "checkpoint/export.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/files.h"
#include "core/base/log.h"

moe_status moe_export_settle(const moe_export_options *options, moe_weights *w, int64_t *context) {
  double alpha = options->alpha;
  *context = w->context > 0 ? w->context : 2048;
  if (alpha > w->rope_alpha) *context = llround((double)*context * alpha / w->rope_alpha);
  if (alpha > 0.0) w->rope_alpha = alpha;
  if (w->dims.head_dim < 4 && w->rope_alpha != 1.0)
    return moe_fail(MOE_USAGE, "alpha %g: heads of 2 have no NTK scaling", w->rope_alpha);
  if (w->router_bias && !options->drop_router_bias)
    return moe_fail(MOE_USAGE,
                    "%s: its router selects with a bias, for which the export has no place: tokens "
                    "would go to other experts: --drop-router-bias accepts that",
                    w->name);
  free(w->router_bias);
  w->router_bias = NULL;
  w->router_bias_count = 0;
  return MOE_OK;
}

moe_dtype moe_export_dtype(const moe_export_options *options, const moe_weights *w) {
  return options->dtype == MOE_EXPORT_RUN_DTYPE ? w->compute : (moe_dtype)options->dtype;
}

/* What may be replaced is an earlier export or an empty folder, not somebody's home. */
static moe_status check_place(const char *out, bool overwrite) {
  char config[MOE_PATH + 16];
  struct stat st;
  if (lstat(out, &st) != 0) return MOE_OK;
  if (!S_ISDIR(st.st_mode))
    return moe_fail(MOE_USAGE, "%s: is in the way: a folder is to be made there", out);
  if (!overwrite)
    return moe_fail(MOE_USAGE, "output exists: %s: choose another --output, or --overwrite", out);
  snprintf(config, sizeof config, "%s/config.json", out);
  if (access(config, F_OK) == 0) return MOE_OK;
  return moe_fail(MOE_USAGE,
                  "%s: has no config.json, so it is no export to replace: choose "
                  "another --output, or remove it",
                  out);
}

/* Trailing slashes would put the temporary folder inside. */
static moe_status clean_path(const char *out, char path[MOE_PATH]) {
  size_t length = strlen(out);
  while (length > 1 && out[length - 1] == '/') length--;
  if (length == 0 || length + 32 >= MOE_PATH)
    return moe_fail(MOE_USAGE, "--output %.60s: is no usable path", out);
  snprintf(path, MOE_PATH, "%.*s", (int)length, out);
  return MOE_OK;
}

moe_status moe_export_folder_begin(const moe_export_options *options, char temporary[MOE_PATH]) {
  char out[MOE_PATH], path[MOE_PATH + 32];
  temporary[0] = 0;
  MOE_TRY(clean_path(options->out, out));
  MOE_TRY(check_place(out, options->overwrite));
  snprintf(path, sizeof path, "%s.tmp-%ld", out, (long)getpid());
  MOE_TRY(moe_files_make_folders(path));
  snprintf(temporary, MOE_PATH, "%.*s", MOE_PATH - 1, path);
  return MOE_OK;
}

moe_status moe_export_folder_commit(const moe_export_options *options, const char *temporary) {
  char out[MOE_PATH], parent[MOE_PATH];
  MOE_TRY(clean_path(options->out, out));
  MOE_TRY(moe_files_sync_folder(temporary));
  bool there = moe_files_is_folder(out);
  int failed = there ? renameat2(AT_FDCWD, temporary, AT_FDCWD, out, RENAME_EXCHANGE)
                     : rename(temporary, out);
  if (failed != 0)
    return moe_fail(MOE_IO, "%s: cannot rename to it: %s%s", out, strerror(errno),
                    there ? ": remove the folder that is there" : "");
  if (there && !moe_files_remove_folder(temporary))
    moe_warn("%s: is what was replaced, and cannot be removed: %s", temporary, strerror(errno));
  snprintf(parent, sizeof parent, "%s", out);
  return moe_files_sync_folder(dirname(parent));
}
