/* Loading: any rank fetches any ranges, whoever wrote them.
 *
 * First a plan, from the manifest alone: which part of which slice goes where. Then a crew reads
 * the slices, each once and in the order in which they lie in the files, through bounded buffers.
 * The device and HDF5 serve one of the crew at a time. */
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/crew.h"
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

static bool is_float(moe_dtype t) {
  return t == MOE_F32 || t == MOE_BF16 || t == MOE_F16;
}

/* Is the master nearer to what `p` asks for than the weight of type `own`? */
static bool prefers_master(const moe_piece *p, moe_dtype own) {
  return p->role == MOE_ROLE_PARAM && (p->dtype == MOE_F32 || (is_float(own) && own != p->dtype));
}

/* The tensor to read for a piece: first slice's index, or -1. */
static int64_t choose_tensor(const moe_manifest *m, const moe_piece *p) {
  int64_t master = moe_manifest_find(m, MOE_ROLE_MASTER, p->name);
  int64_t own = moe_manifest_find(m, p->role, p->name);
  if (master >= 0 && prefers_master(p, own < 0 ? p->dtype : m->slice[own].dtype)) return master;
  if (own < 0 && p->role == MOE_ROLE_MASTER) return moe_manifest_find(m, MOE_ROLE_PARAM, p->name);
  return own;
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

enum { CHUNK = 8 << 20, STEP = CHUNK / 8 }; /* bytes, elements at a time: of 8 bytes at most */

typedef struct {
  XXH3_state_t *hash;
  char *raw, *converted; /* CHUNK bytes each */
} reader;

typedef struct {
  moe_device *dev;
  bool verify;
  reader crew[MOE_CREW];
  pthread_mutex_t lock; /* of the device and of HDF5 */
  moe_hdf5 file;        /* being read */
  const overlap *first; /* of those in this file */
  int64_t *at;          /* [slices + 1]: where each slice's overlaps begin after `first` */
} loading;

static moe_status upload(loading *l, void *target, const void *data, int64_t bytes) {
  pthread_mutex_lock(&l->lock);
  moe_status status = moe_device_upload(l->dev, target, data, bytes);
  if (status == MOE_OK) status = moe_device_sync(l->dev); /* the buffers are used again */
  pthread_mutex_unlock(&l->lock);
  return status;
}

/* Elements of type `from` to their place, which begins at element `at` of `target`. */
static moe_status place(loading *l, reader *r, const void *data, moe_dtype from, void *target,
                        moe_dtype to, int64_t at, int64_t n) {
  if (from != to) {
    moe_convert(data, from, r->converted, to, n);
    data = r->converted;
  }
  int64_t size = moe_dtype_size(to);
  return upload(l, (char *)target + at * size, data, n * size);
}

/* raw holds elements [begin, end) of the tensor: bring what o wants of them to its piece. */
static moe_status deliver(loading *l, reader *r, const overlap *o, int64_t begin, int64_t end) {
  const moe_piece *p = o->piece;
  moe_dtype from = o->slice->dtype;
  int64_t first = o->begin > begin ? o->begin : begin, last = o->end < end ? o->end : end;
  if (first >= last) return MOE_OK;
  const char *data = r->raw + (first - begin) * moe_dtype_size(from);
  int64_t at = first - p->begin, n = last - first;
  if (!p->low) return place(l, r, data, from, p->data, p->dtype, at, n);
  MOE_TRY(place(l, r, data, from, p->data, MOE_BF16, at, n));
  return place(l, r, data, from, p->low, MOE_LOW16, at, n);
}

/* Read one slice for the n overlaps that want some of it: all of it to verify its hash, else only
 * from the first to the last element wanted. */
static moe_status stream(loading *l, reader *r, const moe_dataset *d, const overlap *o, int64_t n) {
  const moe_slice *s = o->slice;
  int64_t begin = o->begin, end = o->end;
  for (int64_t i = 1; i < n; i++) {
    if (o[i].begin < begin) begin = o[i].begin;
    if (o[i].end > end) end = o[i].end;
  }
  if (l->verify) {
    begin = s->begin;
    end = s->begin + s->count;
    XXH3_128bits_reset(r->hash);
  }
  for (int64_t at = begin, stop; at < end; at = stop) {
    stop = end - at < STEP ? end : at + STEP;
    MOE_TRY(moe_dataset_read(d, at - s->begin, stop - at, r->raw));
    if (l->verify)
      XXH3_128bits_update(r->hash, r->raw, (size_t)((stop - at) * moe_dtype_size(s->dtype)));
    for (int64_t i = 0; i < n; i++) MOE_TRY(deliver(l, r, &o[i], at, stop));
  }
  return l->verify ? moe_shard_compare_hash(&l->file, s, XXH3_128bits_digest(r->hash)) : MOE_OK;
}

static moe_status read_slice(void *context, int worker, int64_t i) {
  loading *l = context;
  const overlap *o = l->first + l->at[i];
  moe_dataset d;
  pthread_mutex_lock(&l->lock);
  moe_status status = moe_dataset_open(&l->file, o->slice, &d);
  pthread_mutex_unlock(&l->lock);
  if (status != MOE_OK) return status;
  status = stream(l, &l->crew[worker], &d, o, l->at[i + 1] - l->at[i]);
  pthread_mutex_lock(&l->lock);
  moe_dataset_close(&d);
  pthread_mutex_unlock(&l->lock);
  return status;
}

/* The n overlaps from `o` on are those of one file. */
static moe_status read_file(loading *l, const moe_manifest *m, const overlap *o, int64_t n,
                            const char *dir) {
  int64_t slices = 0;
  l->first = o;
  for (int64_t i = 0; i < n; i++)
    if (i == 0 || o[i].slice != o[i - 1].slice) l->at[slices++] = i;
  l->at[slices] = n;
  moe_hdf5_release(&l->file);
  MOE_TRY(moe_shard_open(dir, m, o->slice->file, &l->file));
  return moe_crew_work(MOE_CREW, slices, read_slice, l);
}

static moe_status read_all(loading *l, const moe_manifest *m, const load_plan *plan,
                           const char *dir) {
  for (int64_t i = 0, n; i < plan->n; i += n) {
    const overlap *o = &plan->list[i];
    for (n = 1; i + n < plan->n && o[n].slice->file == o->slice->file;) n++;
    MOE_TRY(read_file(l, m, o, n, dir));
  }
  return MOE_OK;
}

static bool take_room(loading *l, int64_t overlaps) {
  bool all = (l->at = calloc((size_t)overlaps + 1, sizeof *l->at)) != NULL;
  for (int w = 0; w < MOE_CREW; w++) {
    reader *r = &l->crew[w];
    r->hash = XXH3_createState();
    r->raw = moe_device_alloc_host(l->dev, CHUNK);
    r->converted = moe_device_alloc_host(l->dev, CHUNK);
    all = all && r->hash && r->raw && r->converted;
  }
  return all;
}

static void release_room(loading *l) {
  for (int w = 0; w < MOE_CREW; w++) {
    moe_device_free_host(l->dev, l->crew[w].converted);
    moe_device_free_host(l->dev, l->crew[w].raw);
    XXH3_freeState(l->crew[w].hash);
  }
  free(l->at);
}

static moe_status read_plan(moe_device *dev, const moe_manifest *m, const load_plan *plan,
                            bool verify, const char *dir) {
  loading l = {.dev = dev, .verify = verify, .file = {.id = -1, .fd = -1}};
  pthread_mutex_init(&l.lock, NULL);
  moe_status status = take_room(&l, plan->n)
                          ? read_all(&l, m, plan, dir)
                          : moe_fail(MOE_NO_MEMORY, "%s: no memory to load it", dir);
  moe_hdf5_release(&l.file);
  release_room(&l);
  pthread_mutex_destroy(&l.lock);
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
