/* Loading: any rank fetches any ranges, whoever wrote them.
 *
 * First a plan, from the manifest alone: which part of which slice goes where. Then the slices are
 * read once each, in the order in which they lie in the files, through a bounded buffer. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/shard.h"

/* Elements [begin, end) of a tensor that `slice` has and `piece` wants. */
typedef struct {
  const moe_piece *piece;
  const moe_slice *slice;
  int64_t begin, end;
} overlap;

typedef struct {
  overlap *list;
  int64_t n, room;
} load_plan;

/* ---- plan
 * ---------------------------------------------------------------------------------------- */

/* The tensor to read for a piece: first slice's index, or -1. */
static int64_t choose_tensor(const moe_manifest *m, const moe_piece *p) {
  bool prefer_master = p->role == MOE_ROLE_PARAM && p->dtype == MOE_F32;
  int64_t master = moe_manifest_find(m, MOE_ROLE_MASTER, p->name);
  if (prefer_master && master >= 0) return master;
  int64_t own = moe_manifest_find(m, p->role, p->name);
  if (own < 0 && p->role == MOE_ROLE_MASTER) return moe_manifest_find(m, MOE_ROLE_PARAM, p->name);
  return own;
}

static bool is_float(moe_dtype t) {
  return t == MOE_F32 || t == MOE_BF16 || t == MOE_F16;
}

static moe_status check_fits(const moe_slice *s, const moe_piece *p, const char *dir) {
  const char *role = moe_role_name(s->role);
  int64_t width = p->dims == 2 ? p->shape[1] : 1;
  if (s->dims != p->dims || s->shape[0] != p->shape[0] || s->shape[1] != width)
    return moe_fail(MOE_DAMAGED,
                    "%s: %s %s has shape [%" PRId64 ", %" PRId64 "], wanted [%" PRId64 ", %" PRId64
                    "]: it is another model's",
                    dir, role, p->name, s->shape[0], s->shape[1], p->shape[0], width);
  if (s->dtype != p->dtype && !(is_float(s->dtype) && is_float(p->dtype)))
    return moe_fail(MOE_DAMAGED, "%s: %s %s is %s, which does not convert to %s", dir, role,
                    p->name, moe_dtype_name(s->dtype), moe_dtype_name(p->dtype));
  if (p->begin < 0 || p->count > moe_slice_total(s) - p->begin)
    return moe_fail(MOE_INVALID, "piece %s: its range is outside the tensor", p->name);
  return MOE_OK;
}

static moe_status add_overlap(load_plan *plan, overlap o) {
  if (plan->n == plan->room) {
    int64_t room = plan->room ? 2 * plan->room : 256;
    overlap *list = realloc(plan->list, (size_t)room * sizeof *list);
    if (!list) return moe_fail(MOE_NO_MEMORY, "no memory to plan a load");
    plan->list = list;
    plan->room = room;
  }
  plan->list[plan->n++] = o;
  return MOE_OK;
}

/* The slices of a tensor continue each other, so those that a range overlaps follow each other. */
static moe_status plan_piece(load_plan *plan, const moe_manifest *m, const moe_piece *p,
                             const char *dir) {
  int64_t first = choose_tensor(m, p), end = p->begin + p->count;
  if (first < 0)
    return moe_fail(MOE_DAMAGED, "%s: %s %s is missing", dir, moe_role_name(p->role), p->name);
  MOE_TRY(check_fits(&m->slice[first], p, dir));
  const moe_slice *s = &m->slice[first];
  while (s->begin + s->count <= p->begin) s++;
  for (int64_t at = p->begin; at < end; s++) {
    int64_t stop = s->begin + s->count < end ? s->begin + s->count : end;
    MOE_TRY(add_overlap(plan, (overlap){p, s, at, stop}));
    at = stop;
  }
  return MOE_OK;
}

static int by_place(const void *pa, const void *pb) {
  const overlap *a = pa, *b = pb;
  if (a->slice->file != b->slice->file) return a->slice->file - b->slice->file;
  int64_t x = a->slice->offset, y = b->slice->offset;
  return (x > y) - (x < y);
}

/* ---- read
 * ---------------------------------------------------------------------------------------- */

enum { CHUNK = 16 << 20, STEP = CHUNK / 8 }; /* bytes, elements at a time: of 8 bytes at most */

typedef struct {
  moe_device *dev;
  bool verify;
  XXH3_state_t *hash;
  char *raw, *converted; /* CHUNK bytes each */
  moe_hdf5 file;
} reader;

/* raw holds elements [begin, end) of the tensor: bring what o wants of them to its piece. */
static moe_status deliver(reader *r, const overlap *o, int64_t begin, int64_t end) {
  moe_dtype from = o->slice->dtype, to = o->piece->dtype;
  int64_t first = o->begin > begin ? o->begin : begin, last = o->end < end ? o->end : end;
  if (first >= last) return MOE_OK;
  const char *data = r->raw + (first - begin) * moe_dtype_size(from);
  if (from != to) {
    moe_convert(data, from, r->converted, to, last - first);
    data = r->converted;
  }
  char *target = (char *)o->piece->data + (first - o->piece->begin) * moe_dtype_size(to);
  MOE_TRY(moe_device_upload(r->dev, target, data, (last - first) * moe_dtype_size(to)));
  return moe_device_sync(r->dev); /* the buffers are used again */
}

/* Read one slice for the n overlaps that want some of it: all of it to verify its hash, else only
 * from the first to the last element wanted. */
static moe_status stream(reader *r, const moe_dataset *d, const overlap *o, int64_t n) {
  const moe_slice *s = o->slice;
  int64_t begin = o->begin, end = o->end;
  for (int64_t i = 1; i < n; i++) {
    if (o[i].begin < begin) begin = o[i].begin;
    if (o[i].end > end) end = o[i].end;
  }
  if (r->verify) {
    begin = s->begin;
    end = s->begin + s->count;
    XXH3_128bits_reset(r->hash);
  }
  for (int64_t at = begin, stop; at < end; at = stop) {
    stop = end - at < STEP ? end : at + STEP;
    MOE_TRY(moe_dataset_read(d, at - s->begin, stop - at, r->raw));
    if (r->verify)
      XXH3_128bits_update(r->hash, r->raw, (size_t)((stop - at) * moe_dtype_size(s->dtype)));
    for (int64_t i = 0; i < n; i++) MOE_TRY(deliver(r, &o[i], at, stop));
  }
  return r->verify ? moe_shard_compare_hash(&r->file, s, XXH3_128bits_digest(r->hash)) : MOE_OK;
}

static moe_status read_slice(reader *r, const overlap *o, int64_t n) {
  moe_dataset d;
  MOE_TRY(moe_dataset_open(&r->file, o->slice, &d));
  moe_status status = stream(r, &d, o, n);
  moe_dataset_close(&d);
  return status;
}

static moe_status read_all(reader *r, const moe_manifest *m, const load_plan *plan,
                           const char *dir) {
  int open = -1;
  for (int64_t i = 0, n; i < plan->n; i += n) {
    const overlap *o = &plan->list[i];
    for (n = 1; i + n < plan->n && o[n].slice == o->slice;) n++;
    if (o->slice->file != open) {
      moe_hdf5_release(&r->file);
      open = o->slice->file;
      MOE_TRY(moe_shard_open(dir, m, open, &r->file));
    }
    MOE_TRY(read_slice(r, o, n));
  }
  return MOE_OK;
}

static moe_status read_plan(moe_device *dev, const moe_manifest *m, const load_plan *plan,
                            bool verify, const char *dir) {
  reader r = {.dev = dev, .verify = verify, .file = {.id = -1, .fd = -1}};
  moe_status status;
  r.hash = XXH3_createState();
  r.raw = moe_device_alloc_host(dev, CHUNK);
  r.converted = moe_device_alloc_host(dev, CHUNK);
  if (r.hash && r.raw && r.converted)
    status = read_all(&r, m, plan, dir);
  else
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory to load it", dir);
  moe_hdf5_release(&r.file);
  moe_device_free_host(dev, r.converted);
  moe_device_free_host(dev, r.raw);
  XXH3_freeState(r.hash);
  return status;
}

static moe_status load(moe_device *dev, const char *dir, const moe_piece *pieces, int n,
                       bool verify) {
  moe_manifest m;
  load_plan plan = {0};
  MOE_TRY(moe_manifest_read(dir, &m));
  moe_status status = MOE_OK;
  for (int i = 0; i < n && status == MOE_OK; i++)
    if (pieces[i].count > 0) status = plan_piece(&plan, &m, &pieces[i], dir);
  if (status == MOE_OK && plan.n > 0) {
    qsort(plan.list, (size_t)plan.n, sizeof *plan.list, by_place);
    status = read_plan(dev, &m, &plan, verify, dir);
  }
  free(plan.list);
  moe_manifest_clear(&m);
  return status;
}

moe_status moe_checkpoint_load(moe_comm *world, moe_device *dev, const char *path,
                               const moe_piece *pieces, int n, bool verify) {
  return moe_agree(world, load(dev, path, pieces, n, verify));
}

/* ---- state
 * --------------------------------------------------------------------------------------- */

moe_status moe_checkpoint_read_state(moe_comm *world, const char *path, moe_run_state *out) {
  moe_manifest m;
  moe_status status = moe_agree(world, moe_manifest_read(path, &m));
  *out = (moe_run_state){0};
  if (status == MOE_OK) {
    *out = m.state;
    m.state = (moe_run_state){0};
  }
  moe_manifest_clear(&m);
  return status;
}

moe_status moe_checkpoint_has_role(const char *path, moe_role role, bool *out) {
  moe_manifest m;
  MOE_TRY(moe_manifest_read(path, &m));
  *out = moe_manifest_has_role(&m, role);
  moe_manifest_clear(&m);
  return MOE_OK;
}
