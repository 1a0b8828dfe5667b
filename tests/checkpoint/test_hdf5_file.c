/* What our HDF5 files are, and that no other structure is accepted. */
#include <fcntl.h>
#include <hdf5.h>
#include <unistd.h>

#include "checkpoint/hdf5_file.h"
#include "tests/checkpoint/fixture.h"

TestSuite(hdf5_file, .init = open_world, .fini = close_world);

enum { ROWS = 5, COLUMNS = 7, N = ROWS * COLUMNS };
static char path[MOE_PATH];

static void name_file(const char *name) {
  snprintf(path, sizeof path, "%s/%s", run, name);
}

static moe_slice slice_of(const char *name, int64_t begin, int64_t count) {
  moe_slice s = {.dims = 2, .shape = {ROWS, COLUMNS}, .begin = begin, .count = count, .file = 0};
  snprintf(s.name, sizeof s.name, "%s", name);
  return s;
}

static float value(int64_t i) {
  return (float)i + 0.5f;
}

/* ---- what we write ------------------------------------------------------------------------- */

Test(hdf5_file, writes_and_reads_any_range_of_a_matrix) {
  moe_hdf5 f;
  moe_dataset d;
  moe_slice s = slice_of("t", 0, N);
  float data[N], got[N];
  for (int i = 0; i < N; i++) data[i] = value(i);
  for (int cut = 0; cut <= N; cut++) {
    char name[16];
    snprintf(name, sizeof name, "%d.h5", cut);
    name_file(name);
    EXPECT_OK(moe_hdf5_create(path, sizeof data, &f));
    EXPECT_OK(moe_dataset_create(&f, &s, &d));
    EXPECT_OK(moe_dataset_write(&d, cut, N - cut, data + cut));
    EXPECT_OK(moe_dataset_write(&d, 0, cut, data));
    moe_dataset_close(&d);
    EXPECT_OK(moe_hdf5_close(&f));
    EXPECT_OK(moe_hdf5_open(&f));
    EXPECT_OK(moe_dataset_open(&f, &s, &d));
    for (int begin = cut; begin < N; begin += 4)
      for (int count = 0; count <= N - begin; count += 3) {
        memset(got, 0, sizeof got);
        EXPECT_OK(moe_dataset_read(&d, begin, count, got));
        cr_assert(memcmp(got, data + begin, (size_t)count * sizeof *got) == 0);
        cr_assert(count == N || got[count] == 0.0f);
      }
    moe_dataset_close(&d);
    moe_hdf5_release(&f);
  }
}

/* bf16 and f16 as other programs see them: 1 + i/4, exact in both. */
static void write_small_floats(void) {
  moe_run_state state = sample_state(1);
  moe_piece p[2] = {sample_piece(MOE_ROLE_PARAM, 0, 0, sample_total(0)),
                    sample_piece(MOE_ROLE_PARAM, 2, 0, sample_total(2))};
  for (int k = 0; k < 2; k++)
    for (int64_t i = 0; i < p[k].count; i++) {
      float x = 1.0f + 0.25f * (float)(i % 8);
      ((uint16_t *)p[k].data)[i] = k == 0 ? moe_f32_to_bf16(x) : moe_f32_to_f16(x);
    }
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, p, 2, 2, NULL, NULL));
  sample_free(p, 2);
  snprintf(path, sizeof path, "%s", in_step(1, "shard-00000-of-00001.h5"));
}

static bool works(const char *command) {
  moe_command c = moe_command_run(20, "%s", command);
  bool done = c.exit_code == 0;
  moe_command_free(&c);
  return done;
}

Test(hdf5_file, h5dump_reads_bf16_and_f16) {
  if (!works("h5dump --version")) cr_skip_test("h5dump is not installed");
  write_small_floats();
  for (int k = 0; k < 2; k++) {
    moe_command c = moe_command_run(20, "h5dump -d /param/%s -s 0,0 -c 1,8 %s",
                                    sample_tensors[k == 0 ? 0 : 2].name, path);
    cr_expect(moe_command_says(&c, "1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75"), "%s", c.output);
    moe_command_free(&c);
  }
}

Test(hdf5_file, h5py_reads_bf16_and_f16_in_their_shapes) {
  if (!works("python3 -c 'import h5py'")) cr_skip_test("h5py is not installed");
  write_small_floats();
  SHELL("python3 -c \"import h5py; f = h5py.File('%s')['param']\n"
        "for n, s in (('%s', (37, 16)), ('%s', (70, 301))):\n"
        " d = f[n]; assert d.shape == s == tuple(d.attrs['shape']), d.shape\n"
        " assert all(x == 1 + i %% 8 / 4 for i, x in enumerate(d[:].ravel()))\n"
        " assert list(d.attrs['slice']) == [0, d.size] and len(d.attrs['xxh3_128']) == 32\"",
        path, sample_tensors[0].name, sample_tensors[2].name);
}

/* ---- what we refuse ------------------------------------------------------------------------ */

static hid_t file, space;
static float data[N];

/* A file with /param and a good dataset /param/good. */
static void begin_file(const char *name) {
  name_file(name);
  for (int i = 0; i < N; i++) data[i] = value(i);
  file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  space = H5Screate_simple(2, (hsize_t[]){ROWS, COLUMNS}, NULL);
  H5Gclose(H5Gcreate2(file, "param", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
}

static void add(const char *name, hid_t type, hid_t in_space, hid_t properties) {
  hid_t d = H5Dcreate2(file, name, type, in_space, H5P_DEFAULT, properties, H5P_DEFAULT);
  cr_assert(d >= 0, "cannot make %s", name);
  H5Dwrite(d, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
  H5Dclose(d);
}

/* Open dataset `name` as moe_slice says; "" when it is accepted. */
static const char *refusal(const char *name) {
  moe_hdf5 f = {.id = -1, .fd = open(path, O_RDONLY)};
  moe_dataset d;
  moe_slice s = slice_of(name, 0, N);
  snprintf(f.path, sizeof f.path, "%s", path);
  moe_error_clear();
  if (moe_hdf5_open(&f) != MOE_OK) {
    moe_hdf5_release(&f);
    return moe_error_message();
  }
  hid_t good = H5Dopen2(f.id, "/param/good", H5P_DEFAULT); /* its offset is what we expect */
  s.offset = good < 0 ? 0 : (int64_t)H5Dget_offset(good);
  if (good >= 0) H5Dclose(good);
  if (moe_dataset_open(&f, &s, &d) == MOE_OK) moe_dataset_close(&d);
  moe_hdf5_release(&f);
  return moe_error_message();
}

#define EXPECT_REFUSED(name, says)                                                           \
  do {                                                                                       \
    const char *message_ = refusal(name);                                                    \
    cr_expect(strstr(message_, says) && strstr(message_, path), "%s: '%s'", name, message_); \
  } while (0)

Test(hdf5_file, only_plain_contiguous_datasets_are_accepted) {
  begin_file("other.h5");
  add("/param/victim", H5T_IEEE_F32LE, space, H5P_DEFAULT);
  H5Fclose(file);
  begin_file("crafted.h5");
  hid_t external = H5Pcreate(H5P_DATASET_CREATE), chunked = H5Pcreate(H5P_DATASET_CREATE);
  hid_t compact = H5Pcreate(H5P_DATASET_CREATE), virtual = H5Pcreate(H5P_DATASET_CREATE);
  hid_t filtered = H5Pcreate(H5P_DATASET_CREATE);
  hid_t line = H5Screate_simple(1, (hsize_t[]){N}, NULL);
  hid_t wide = H5Screate_simple(2, (hsize_t[]){COLUMNS, ROWS}, NULL);
  hid_t deep = H5Screate_simple(5, (hsize_t[]){ROWS, COLUMNS, 1, 1, 1}, NULL);
  char secret[160];
  snprintf(secret, sizeof secret, "%s/secret", run);
  H5Pset_external(external, secret, 0, N * sizeof(float));
  H5Pset_chunk(chunked, 2, (hsize_t[]){2, 2});
  H5Pset_chunk(filtered, 2, (hsize_t[]){2, 2});
  H5Pset_shuffle(filtered);
  H5Pset_layout(compact, H5D_COMPACT);
  H5Pset_virtual(virtual, space, "other.h5", "/param/victim", space);
  add("/param/good", H5T_IEEE_F32LE, space, H5P_DEFAULT);
  add("/param/elsewhere", H5T_IEEE_F32LE, space, H5P_DEFAULT);
  add("/param/external", H5T_IEEE_F32LE, space, external);
  add("/param/chunked", H5T_IEEE_F32LE, space, chunked);
  add("/param/filtered", H5T_IEEE_F32LE, space, filtered);
  add("/param/compact", H5T_IEEE_F32LE, space, compact);
  add("/param/virtual", H5T_IEEE_F32LE, space, virtual);
  add("/param/int", H5T_STD_I32LE, space, H5P_DEFAULT);
  add("/param/double", H5T_IEEE_F64LE, space, H5P_DEFAULT);
  add("/param/big_endian", H5T_IEEE_F32BE, space, H5P_DEFAULT);
  add("/param/line", H5T_IEEE_F32LE, line, H5P_DEFAULT);
  add("/param/wide", H5T_IEEE_F32LE, wide, H5P_DEFAULT);
  add("/param/deep", H5T_IEEE_F32LE, deep, H5P_DEFAULT);
  H5Gclose(H5Gcreate2(file, "/param/group", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  H5Lcreate_soft("/param/good", file, "/param/soft", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_external("other.h5", "/param/victim", file, "/param/away", H5P_DEFAULT, H5P_DEFAULT);
  H5Fclose(file);

  cr_expect_str_empty(refusal("good"));
  EXPECT_REFUSED("elsewhere", "another offset");
  EXPECT_REFUSED("external", "in another file");
  EXPECT_REFUSED("chunked", "not contiguous");
  EXPECT_REFUSED("filtered", "not contiguous");
  EXPECT_REFUSED("compact", "not contiguous");
  EXPECT_REFUSED("virtual", "not contiguous");
  EXPECT_REFUSED("int", "another type");
  EXPECT_REFUSED("double", "another type");
  EXPECT_REFUSED("big_endian", "another type");
  EXPECT_REFUSED("line", "another extent");
  EXPECT_REFUSED("wide", "another extent");
  EXPECT_REFUSED("deep", "another extent");
  EXPECT_REFUSED("group", "not a plain dataset");
  EXPECT_REFUSED("soft", "not a plain dataset");
  EXPECT_REFUSED("away", "not a plain dataset");
  EXPECT_REFUSED("absent", "is missing");
}

Test(hdf5_file, a_link_in_place_of_a_group_is_refused) {
  begin_file("linked.h5");
  H5Ldelete(file, "param", H5P_DEFAULT);
  H5Gclose(H5Gcreate2(file, "real", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  add("/real/good", H5T_IEEE_F32LE, space, H5P_DEFAULT);
  H5Lcreate_soft("/real", file, "/param", H5P_DEFAULT, H5P_DEFAULT);
  H5Fclose(file);
  EXPECT_REFUSED("good", "not a plain dataset");
}

Test(hdf5_file, a_huge_declared_extent_allocates_nothing) {
  begin_file("huge.h5");
  hid_t huge = H5Screate_simple(1, (hsize_t[]){1ULL << 48}, NULL);
  hid_t late = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_alloc_time(late, H5D_ALLOC_TIME_LATE);
  H5Dclose(H5Dcreate2(file, "/param/huge", H5T_IEEE_F32LE, huge, H5P_DEFAULT, late, H5P_DEFAULT));
  H5Dclose(H5Dcreate2(file, "/param/empty", H5T_IEEE_F32LE, space, H5P_DEFAULT, late, H5P_DEFAULT));
  H5Fclose(file);
  EXPECT_REFUSED("huge", "another extent");
  EXPECT_REFUSED("empty", "another offset"); /* it has no bytes at all */
}

Test(hdf5_file, what_is_not_hdf5_is_refused) {
  name_file("noise.h5");
  SHELL("head -c 100000 /dev/urandom > %s", path);
  EXPECT_REFUSED("good", "not readable HDF5");
  SHELL(": > %s", path);
  EXPECT_REFUSED("good", "not readable HDF5");
}

Test(hdf5_file, an_existing_file_is_not_written_over) {
  moe_hdf5 f;
  name_file("taken.h5");
  SHELL("echo precious > %s", path);
  cr_expect(moe_hdf5_create(path, 100, &f) == MOE_IO);
  EXPECT_SAYS("cannot create");
  SHELL("grep -q precious %s", path);
}

Test(hdf5_file, a_disk_too_small_shows_before_anything_is_written) {
  moe_hdf5 f;
  name_file("big.h5");
  cr_expect(moe_hdf5_create(path, 1LL << 60, &f) == MOE_IO);
  EXPECT_SAYS("cannot set aside");
}
