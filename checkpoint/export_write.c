/* Writing an export's tensors by all processors.
 *
 * Where each tensor goes is known before the first is written, so whoever is free takes the next
 * one, and reads, converts and writes it part by part: reading one, converting another and the disk
 * go on at the same time, without anything that hands parts from one to the other. */
#include <stdlib.h>

#include "checkpoint/crew.h"
#include "checkpoint/export.h"
#include "core/base/log.h"
#include "data/progress.h"

typedef struct {
  float *values;
  void *raw;
} room;

typedef struct {
  const moe_export_work *work;
  room room[MOE_CREW_MOST];
  int64_t elements; /* of a room, each as large as an f32 at most */
  moe_progress progress;
  int64_t total; /* bytes */
} writing;

static int64_t columns_of(const moe_export_tensor *t) {
  return t->param->shape[t->param->dims - 1];
}

static moe_status take_room(writing *w, room *r) {
  if (!r->values) r->values = malloc((size_t)w->elements * sizeof *r->values);
  if (!r->raw) r->raw = malloc((size_t)w->elements * sizeof(float));
  if (r->values && r->raw) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "%s: no memory to export it", w->work->from->name);
}

static moe_status write_tensor(void *context, int worker, int64_t i) {
  writing *w = context;
  room *r = &w->room[worker];
  const moe_export_work *work = w->work;
  const moe_export_tensor *t = &work->tensor[i];
  int64_t columns = columns_of(t), rows = t->param->count / columns;
  MOE_TRY(take_room(w, r));
  for (int64_t row = 0, n; row < rows; row += n) {
    n = rows - row < t->rows ? rows - row : t->rows;
    int64_t bytes = n * t->row_bytes;
    if (work->stop && *work->stop)
      return moe_fail(MOE_STOPPED, "stopped on request: nothing was kept");
    MOE_TRY(moe_weights_read(work->from, t->param, row * columns, n * columns, r->values));
    MOE_TRY(work->encode(work->context, t->param, r->values, n, r->raw));
    MOE_TRY(work->write(t->file, t->offset + row * t->row_bytes, bytes, r->raw));
    moe_progress_add(&w->progress, bytes, w->total);
  }
  return MOE_OK;
}

moe_status moe_export_write(const moe_export_work *work, int64_t *bytes, double *seconds) {
  writing w = {.work = work};
  for (int64_t i = 0; i < work->tensors; i++) {
    const moe_export_tensor *t = &work->tensor[i];
    int64_t columns = columns_of(t), n = t->rows * columns;
    if (n > t->param->count) n = t->param->count;
    if (n > w.elements) w.elements = n;
    w.total += t->param->count / columns * t->row_bytes;
  }
  moe_progress_start(&w.progress, "writing");
  moe_status status = moe_crew_work(moe_crew_cores(), work->tensors, write_tensor, &w);
  if (status == MOE_OK) status = work->finish(work->context);
  *seconds = moe_progress_end(&w.progress);
  *bytes = w.total;
  for (int i = 0; i < MOE_CREW_MOST; i++) {
    free(w.room[i].values);
    free(w.room[i].raw);
  }
  return status;
}

moe_status moe_export_not_finite(const moe_weights *from, const moe_param *p, const char *type) {
  return moe_fail(MOE_FAILED,
                  "%s: %s has a value that is not finite in %s: the run diverged, or needs a type "
                  "of wider range",
                  from->name, p->name, type);
}

int64_t moe_export_rows(const moe_param *p) {
  enum { PART = 512 << 10 };
  int64_t columns = p->shape[p->dims - 1];
  return columns < PART ? PART / columns : 1;
}
