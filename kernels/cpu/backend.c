/* The CPU backend: its table, its memory and its threads.
 *
 * Large blocks come straight from the kernel, aligned for huge pages and already zero, so pages are
 * first touched (and placed, on machines with several memory nodes) by whoever works on them. */
#include <cblas.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/base/arena.h"
#include "core/base/log.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"

/* ---- memory ------------------------------------------------------------------------------ */

enum { LINE = 64, SMALL_ALIGN = MOE_ARENA_ALIGN, HUGE_PAGE = 2 << 20 };

/* Lies in the cache line before each block. */
typedef struct {
  void *base;
  size_t mapped; /* bytes from mmap; 0: from malloc */
} block_head;

_Static_assert(sizeof(block_head) <= LINE, "a block's head fits the line before it");

static void *place(void *base, size_t alignment, size_t mapped) {
  uintptr_t first = (uintptr_t)base + LINE + alignment - 1;
  char *data = (char *)(first - first % alignment);
  *(block_head *)(void *)(data - LINE) = (block_head){base, mapped};
  return data;
}

static void *cpu_alloc(moe_device *dev, int64_t bytes) {
  (void)dev;
  if (bytes < 0 || bytes > (int64_t)1 << 46) return NULL;
  size_t size = (size_t)bytes;
  if (size < HUGE_PAGE) {
    void *base = calloc(1, size + LINE + SMALL_ALIGN);
    return base == NULL ? NULL : place(base, SMALL_ALIGN, 0);
  }
  size_t mapped = size + LINE + HUGE_PAGE;
  void *base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return NULL;
  madvise(base, mapped, MADV_HUGEPAGE); /* a wish: small pages work too */
  return place(base, HUGE_PAGE, mapped);
}

static void cpu_free(moe_device *dev, void *data) {
  (void)dev;
  block_head head = *(block_head *)(void *)((char *)data - LINE);
  if (head.mapped > 0)
    munmap(head.base, head.mapped);
  else
    free(head.base);
}

static int64_t cpu_free_bytes(moe_device *dev) {
  (void)dev;
  return INT64_MAX;
}

static moe_status cpu_move(moe_device *dev, void *to, const void *from, int64_t bytes) {
  (void)dev;
  memmove(to, from, (size_t)bytes);
  return MOE_OK;
}

/* ---- the device -------------------------------------------------------------------------- */

static moe_status cpu_sync(moe_device *dev) {
  (void)dev;
  return MOE_OK;
}

static void cpu_mark(moe_device *dev, moe_mark *out) {
  (void)dev;
  out->seconds = moe_clock_s();
}

static moe_status cpu_wait(moe_device *dev, const moe_mark *mark) {
  (void)dev;
  (void)mark;
  return MOE_OK;
}

static double cpu_between(moe_device *dev, const moe_mark *from, const moe_mark *to) {
  (void)dev;
  return to->seconds - from->seconds;
}

static void cpu_forget(moe_device *dev, moe_mark *mark) {
  (void)dev;
  (void)mark;
}

static double cpu_peak_tflops(moe_device *dev, moe_dtype dtype) {
  (void)dev;
  (void)dtype;
  return 0.0; /* unknown: measured by who needs it */
}

static void cpu_close(moe_device *dev) {
  moe_cpu_state *state = dev->state;
  cpu_free(dev, state->panels);
  free(state);
}

static const moe_backend cpu_backend = {
    .name = "cpu",
    .is_host = true,
    .close = cpu_close,
    .free_bytes = cpu_free_bytes,
    .peak_tflops = cpu_peak_tflops,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .alloc_host = cpu_alloc,
    .free_host = cpu_free,
    .upload = cpu_move,
    .download = cpu_move,
    .sync = cpu_sync,
    .mark = cpu_mark,
    .wait = cpu_wait,
    .between = cpu_between,
    .forget = cpu_forget,
    .zero = moe_cpu_zero,
    .fill = moe_cpu_fill,
    .draw_normal = moe_cpu_draw_normal,
    .copy = moe_cpu_copy,
    .add = moe_cpu_add,
    .sum_rows = moe_cpu_sum_rows,
    .scale = moe_cpu_scale,
    .sum_squares = moe_cpu_sum_squares,
    .embed = moe_cpu_embed,
    .embed_backward = moe_cpu_embed_backward,
    .rms_norm = moe_cpu_rms_norm,
    .rms_norm_backward = moe_cpu_rms_norm_backward,
    .gemm = moe_cpu_gemm,
    .rope = moe_cpu_rope,
    .attention = moe_cpu_attention,
    .attention_backward = moe_cpu_attention_backward,
    .attention_scratch = moe_cpu_attention_scratch,
    .attention_cached = moe_cpu_attention_cached,
    .attention_cached_scratch = moe_cpu_attention_cached_scratch,
    .router = moe_cpu_router,
    .router_drop = moe_cpu_router_drop,
    .router_backward = moe_cpu_router_backward,
    .permute_plan = moe_cpu_permute_plan,
    .permute_window = moe_cpu_permute_window,
    .gather_rows = moe_cpu_gather_rows,
    .gather_gates = moe_cpu_gather_gates,
    .combine_rows = moe_cpu_combine_rows,
    .combine_gates = moe_cpu_combine_gates,
    .localize_experts = moe_cpu_localize_experts,
    .expert_up = moe_cpu_expert_up,
    .expert_down = moe_cpu_expert_down,
    .expert_down_backward = moe_cpu_expert_down_backward,
    .gates_backward = moe_cpu_gates_backward,
    .expert_up_backward = moe_cpu_expert_up_backward,
    .expert_weight_grad = moe_cpu_expert_weight_grad,
    .expert_scratch = moe_cpu_expert_scratch,
    .experts_decode = moe_cpu_experts_decode,
    .sum_choices = moe_cpu_sum_choices,
    .cross_entropy = moe_cpu_cross_entropy,
    .clip_scale = moe_cpu_clip_scale,
    .adamw = moe_cpu_adamw,
    .sample = moe_cpu_sample,
    .advance = moe_cpu_advance,
};

/* "AMD EPYC, 2 threads". */
static void name_device(moe_device *dev, int threads) {
  char line[256], model[96] = "CPU";
  FILE *file = fopen("/proc/cpuinfo", "r");
  while (file != NULL && fgets(line, sizeof line, file) != NULL)
    if (sscanf(line, "model name : %95[^\n]", model) == 1) break;
  if (file != NULL) fclose(file);
  snprintf(dev->name, sizeof dev->name, "%s, %d thread%s", model, threads, threads == 1 ? "" : "s");
}

void moe_cpu_enter(const moe_device *dev) {
  omp_set_num_threads(((const moe_cpu_state *)dev->state)->threads);
}

moe_status moe_cpu_open(moe_device *dev) {
  moe_cpu_state *state = calloc(1, sizeof *state);
  if (state == NULL) return moe_fail(MOE_NO_MEMORY, "CPU device: out of memory");
  state->threads = dev->options.threads > 0 ? dev->options.threads : omp_get_num_procs();
  state->panels =
      cpu_alloc(dev, state->threads * moe_cpu_panel_floats() * (int64_t)sizeof *state->panels);
  if (state->panels == NULL) {
    int threads = state->threads;
    free(state);
    return moe_fail(MOE_NO_MEMORY,
                    "CPU device: no memory for the buffers of %d threads: lower "
                    "run.threads",
                    threads);
  }
  openblas_set_num_threads(1);         /* see gemm.h; OpenBLAS's OpenMP build sets OpenMP's too, */
  omp_set_num_threads(state->threads); /* hence this order */
  dev->backend = &cpu_backend;
  dev->state = state;
  name_device(dev, state->threads);
  return MOE_OK;
}
