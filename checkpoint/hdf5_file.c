/* HDF5, used narrowly.
 *
 * The library lays a file out and looks after everything but the data, which is read and written
 * straight at the offset that the library gave the contiguous dataset: by any number of threads at
 * once, where the library has one lock, and without its copies. V110 bounds put a checksum on every
 * metadata block. bf16 and f16 are custom float types, and the memory type is always the file's:
 * HDF5 converts nothing. HDF5's own exit handler and error printing are off: it crashes at exit
 * after a close that failed, and our message says it better.
 */
#include "checkpoint/hdf5_file.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "checkpoint/files.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian, as memory is");
_Static_assert(sizeof(hid_t) == sizeof(int64_t), "moe_hdf5 keeps HDF5's ids as int64_t");

/* ---- the library
 * --------------------------------------------------------------------------------- */

static void start_library(void) {
  H5dont_atexit();
  H5PLset_loading_state(0);
  /* A file size limit must be an error (EFBIG), not the end of the process. */
  struct sigaction now;
  if (sigaction(SIGXFSZ, NULL, &now) == 0 && now.sa_handler == SIG_DFL) signal(SIGXFSZ, SIG_IGN);
}

/* At every way in: HDF5 keeps its error printing setting per thread. */
static void enter(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, start_library);
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

typedef struct {
  char text[160];
} reason;

static herr_t keep_innermost(unsigned n, const H5E_error2_t *e, void *to) {
  reason *r = to;
  if (n > 0 || !e->desc) return 0;
  /* "... errno = 28, error message = 'No space left on device', ..." */
  static const char mark[] = "error message = '";
  const char *from = strstr(e->desc, mark);
  from = from ? from + sizeof mark - 1 : e->desc;
  snprintf(r->text, sizeof r->text, "%.*s", (int)strcspn(from, "'\n"), from);
  return 0;
}

/* Why the last HDF5 call of this thread failed. */
static reason why(void) {
  reason r = {"no reason given"};
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_innermost, &r);
  return r;
}

/* ---- types
 * --------------------------------------------------------------------------------------- */

/* A 16-bit float: sign, then `exponent` bits, then the rest mantissa. */
static hid_t small_float(size_t exponent, size_t bias) {
  hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  size_t mantissa = 15 - exponent;
  if (H5Tset_fields(type, 15, mantissa, exponent, 0, mantissa) < 0 ||
      H5Tset_precision(type, 16) < 0 || H5Tset_size(type, 2) < 0 || H5Tset_ebias(type, bias) < 0) {
    H5Tclose(type);
    return -1;
  }
  return type;
}

static hid_t file_type(moe_dtype dtype) {
  switch (dtype) {
  case MOE_F32:
    return H5Tcopy(H5T_IEEE_F32LE);
  case MOE_BF16:
    return small_float(8, 127);
  case MOE_F16:
    return small_float(5, 15);
  case MOE_I32:
    return H5Tcopy(H5T_STD_I32LE);
  case MOE_F64:
    return H5Tcopy(H5T_IEEE_F64LE);
  case MOE_LOW16: /* files have the whole float */
    break;
  }
  return -1;
}

/* ---- files
 * --------------------------------------------------------------------------------------- */

static hid_t access_list(void) {
  hid_t list = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(list, H5F_LIBVER_V110, H5F_LIBVER_V110);
  H5Pset_fclose_degree(list, H5F_CLOSE_STRONG);
  H5Pset_file_locking(list, 0, 1); /* the run's lock is ours; some file systems have none */
  H5Pset_meta_block_size(list, 64 << 10);
  return list;
}

/* Fail now when the disk cannot hold `room` bytes. The file's size stays 0: it is HDF5's to set. */
static moe_status set_room_aside(const char *path, int fd, int64_t room) {
  if (room == 0 || fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, room) == 0) return MOE_OK;
  struct statvfs fs;
  if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINTR) {
    if (fstatvfs(fd, &fs) != 0 || fs.f_bavail * fs.f_frsize >= (uint64_t)room) return MOE_OK;
    errno = ENOSPC;
  }
  return moe_fail(MOE_IO, "%s: cannot set aside %" PRId64 " bytes: %s", path, room,
                  strerror(errno));
}

moe_status moe_hdf5_create(const char *path, int64_t room, moe_hdf5 *out) {
  enter();
  *out = (moe_hdf5){.id = -1, .fd = -1};
  snprintf(out->path, sizeof out->path, "%s", path);
  hid_t list = access_list();
  out->id = H5Fcreate(path, H5F_ACC_EXCL, H5P_DEFAULT, list);
  reason r = out->id < 0 ? why() : (reason){""};
  H5Pclose(list);
  moe_status status = MOE_OK;
  if (out->id < 0)
    status = moe_fail(MOE_IO, "%s: cannot create: %s", path, r.text);
  else if ((out->fd = open(path, O_RDWR | O_CLOEXEC)) < 0)
    status = moe_fail(MOE_IO, "%s: cannot open: %s", path, strerror(errno));
  else
    status = set_room_aside(path, out->fd, room);
  if (status != MOE_OK) moe_hdf5_release(out);
  return status;
}

moe_status moe_hdf5_open(moe_hdf5 *f) {
  enter();
  hid_t list = access_list();
  f->id = H5Fopen(f->path, H5F_ACC_RDONLY, list);
  reason r = f->id < 0 ? why() : (reason){""};
  H5Pclose(list);
  if (f->id < 0) return moe_fail(MOE_DAMAGED, "%s: not readable HDF5: %s", f->path, r.text);
  return MOE_OK;
}

moe_status moe_hdf5_close(moe_hdf5 *f) {
  enter();
  f->broken = H5Fclose(f->id) < 0;
  f->id = -1;
  return f->broken ? moe_fail(MOE_IO, "%s: cannot close: %s", f->path, why().text) : MOE_OK;
}

void moe_hdf5_release(moe_hdf5 *f) {
  enter();
  if (f->id >= 0) f->broken = H5Fclose(f->id) < 0;
  f->id = -1;
  /* A file that HDF5 cannot close stays in its list of open files, known by its inode. Keeping it
   * open, emptied, keeps the inode from going to a later shard, which HDF5 would take for it. */
  if (f->fd >= 0 && !(f->broken && ftruncate(f->fd, 0) == 0)) close(f->fd);
  f->fd = -1;
}

/* ---- datasets
 * ------------------------------------------------------------------------------------ */

/* A dataset of a slice, not open yet, and its extent. */
static moe_dataset dataset_of(const moe_hdf5 *f, const moe_slice *s, hsize_t dims[2]) {
  bool whole = s->count == moe_slice_total(s);
  int rank = whole ? s->dims : 1;
  dims[0] = (hsize_t)(whole ? s->shape[0] : s->count);
  dims[1] = (hsize_t)(rank == 2 ? s->shape[1] : 1);
  return (moe_dataset){.id = -1,
                       .type = -1,
                       .space = -1,
                       .rank = rank,
                       .fd = f->fd,
                       .offset = s->offset,
                       .size = moe_dtype_size(s->dtype),
                       .path = f->path};
}

moe_status moe_dataset_create(moe_hdf5 *f, moe_slice *s, moe_dataset *out) {
  enter();
  char name[MOE_DATASET_PATH];
  hsize_t dims[2];
  *out = dataset_of(f, s, dims);
  moe_slice_dataset(s, name);
  hid_t link = H5Pcreate(H5P_LINK_CREATE), layout = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_create_intermediate_group(link, 1);
  H5Pset_layout(layout, H5D_CONTIGUOUS);
  H5Pset_alloc_time(layout, H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(layout, H5D_FILL_TIME_NEVER);
  out->type = file_type(s->dtype);
  out->space = H5Screate_simple(out->rank, dims, NULL);
  out->id = H5Dcreate2(f->id, name, out->type, out->space, link, layout, H5P_DEFAULT);
  haddr_t offset = out->id < 0 ? HADDR_UNDEF : H5Dget_offset(out->id);
  moe_status status = MOE_OK;
  if (offset == HADDR_UNDEF)
    status = moe_fail(MOE_IO, "%s: cannot create %s: %s", f->path, name, why().text);
  s->offset = out->offset = (int64_t)offset;
  H5Pclose(link);
  H5Pclose(layout);
  if (status != MOE_OK) moe_dataset_close(out);
  return status;
}

/* What is wrong with an open dataset, or NULL. Nothing of its data has been touched. */
static const char *difference(const moe_slice *s, const moe_dataset *d, const hsize_t want[2]) {
  hsize_t dims[2] = {1, 1};
  hid_t layout = H5Dget_create_plist(d->id), type = file_type(s->dtype);
  const char *fault = NULL;
  if (H5Pget_layout(layout) != H5D_CONTIGUOUS)
    fault = "is not contiguous";
  else if (H5Pget_external_count(layout) != 0)
    fault = "keeps its data in another file";
  else if (H5Pget_nfilters(layout) != 0)
    fault = "is filtered";
  else if (H5Tequal(d->type, type) <= 0)
    fault = "has another type than the manifest says";
  else if (H5Sget_simple_extent_ndims(d->space) != d->rank ||
           H5Sget_simple_extent_dims(d->space, dims, NULL) != d->rank || dims[0] != want[0] ||
           dims[1] != want[1])
    fault = "has another extent than the manifest says";
  else if (H5Dget_offset(d->id) != (haddr_t)s->offset)
    fault = "lies at another offset than the manifest says";
  else if (H5Dget_storage_size(d->id) != (hsize_t)moe_slice_bytes(s))
    fault = "has another size than the manifest says";
  H5Pclose(layout);
  H5Tclose(type);
  return fault;
}

/* A link along the path to the dataset must be a hard one to an object of the given kind. */
static bool is_hard_link(hid_t file, const char *path, H5O_type_t kind) {
  H5L_info_t link;
  H5O_info_t object;
  return H5Lget_info(file, path, &link, H5P_DEFAULT) >= 0 && link.type == H5L_TYPE_HARD &&
         H5Oget_info_by_name2(file, path, &object, H5O_INFO_BASIC, H5P_DEFAULT) >= 0 &&
         object.type == kind;
}

moe_status moe_dataset_open(const moe_hdf5 *f, const moe_slice *s, moe_dataset *out) {
  enter();
  char name[MOE_DATASET_PATH], group[16];
  hsize_t dims[2];
  *out = dataset_of(f, s, dims);
  moe_slice_dataset(s, name);
  snprintf(group, sizeof group, "/%s", moe_role_name(s->role));
  const char *fault = NULL;
  if (!is_hard_link(f->id, group, H5O_TYPE_GROUP) || !is_hard_link(f->id, name, H5O_TYPE_DATASET))
    fault = "is missing, unreadable or not a plain dataset";
  else if ((out->id = H5Dopen2(f->id, name, H5P_DEFAULT)) < 0 ||
           (out->type = H5Dget_type(out->id)) < 0 || (out->space = H5Dget_space(out->id)) < 0)
    fault = "cannot be opened";
  else
    fault = difference(s, out, dims);
  if (!fault) return MOE_OK;
  moe_dataset_close(out);
  return moe_fail(MOE_DAMAGED, "%s: dataset %s %s", f->path, name, fault);
}

moe_status moe_dataset_close(moe_dataset *d) {
  enter();
  moe_status status = MOE_OK;
  if (d->id >= 0 && H5Dclose(d->id) < 0)
    status = moe_fail(MOE_IO, "%s: cannot close a dataset: %s", d->path, why().text);
  if (d->type >= 0) H5Tclose(d->type);
  if (d->space >= 0) H5Sclose(d->space);
  d->id = d->type = d->space = -1;
  return status;
}

/* Where element `begin` of the dataset lies in the file. */
static int64_t place(const moe_dataset *d, int64_t begin) {
  return d->offset + begin * d->size;
}

moe_status moe_dataset_write(const moe_dataset *d, int64_t begin, int64_t count, const void *data) {
  return moe_files_write_at(d->fd, d->path, place(d, begin), count * d->size, data);
}

moe_status moe_dataset_read(const moe_dataset *d, int64_t begin, int64_t count, void *data) {
  return moe_files_read_at(d->fd, d->path, place(d, begin), count * d->size, data);
}

static bool put_attribute(hid_t object, const char *name, hid_t type, hsize_t n, const void *data) {
  hid_t space = n > 0 ? H5Screate_simple(1, &n, NULL) : H5Screate(H5S_SCALAR);
  hid_t attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  bool done = attribute >= 0 && H5Awrite(attribute, type, data) >= 0;
  if (attribute >= 0) H5Aclose(attribute);
  H5Sclose(space);
  return done;
}

static bool put_text(hid_t object, const char *name, const char *text) {
  hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, strlen(text));
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  bool done = put_attribute(object, name, type, 0, text);
  H5Tclose(type);
  return done;
}

moe_status moe_dataset_describe(const moe_dataset *d, const moe_slice *s) {
  enter();
  char hash[MOE_HASH_TEXT];
  int64_t slice[2] = {s->begin, s->begin + s->count};
  if (!put_attribute(d->id, "shape", H5T_STD_I64LE, (hsize_t)s->dims, s->shape) ||
      !put_attribute(d->id, "slice", H5T_STD_I64LE, 2, slice) ||
      !put_text(d->id, "role", moe_role_name(s->role)) ||
      !put_text(d->id, "xxh3_128", moe_hash_text(s->hash, hash)))
    return moe_fail(MOE_IO, "%s: cannot describe %s: %s", d->path, s->name, why().text);
  return MOE_OK;
}
