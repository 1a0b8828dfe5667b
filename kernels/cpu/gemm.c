/* Matrix products by OpenBLAS.
 *
 * The product is cut into a grid of tiles of c that depends on the sizes alone; threads take tiles,
 * and each tile is summed over k in order. So the bits do not depend on the number of threads. For
 * f32 a tile is one sgemm on the operands where they lie. Half-precision operands are converted, a
 * block at a time, to the thread's f32 panels; sums stay in f32 and are rounded once at the end. */
#include "kernels/cpu/gemm.h"

#include <omp.h>

#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_math.h"

enum {
  BLOCK_M = 512, /* most rows of a tile */
  BLOCK_N = 512, /* most columns */
  BLOCK_K = 512, /* most terms in one go, when operands are converted */
  LEAST = 64,    /* tiles are not cut below this */
  ENOUGH = 16    /* tiles that keep the threads busy */
};

int64_t moe_cpu_panel_floats(void) {
  return BLOCK_M * BLOCK_K + BLOCK_K * BLOCK_N + BLOCK_M * BLOCK_N;
}

typedef struct {
  moe_gemm_form form;
  moe_tensor a, b, c;
  float beta;
  int64_t m, n, k;
  int64_t tile_m, tile_n, tile_k;
} product;

static int64_t tiles_along(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

/* Cut the longer side until there are enough tiles, unless the product is small anyway. */
static void choose_tiles(product *p) {
  p->tile_m = moe_min64(p->m, BLOCK_M);
  p->tile_n = moe_min64(p->n, BLOCK_N);
  p->tile_k = p->a.dtype == MOE_F32 ? p->k : moe_min64(p->k, BLOCK_K);
  if ((double)p->m * (double)p->n * (double)p->k < 1e6) return;
  while (tiles_along(p->m, p->tile_m) * tiles_along(p->n, p->tile_n) < ENOUGH) {
    int64_t *longer = p->tile_m >= p->tile_n ? &p->tile_m : &p->tile_n;
    if (*longer < 2 * LEAST) break;
    *longer = (*longer / 2 + 15) / 16 * 16; /* whole vectors */
  }
}

/* c[row.., column..] += or = the product's terms [at, at + k). */
static void multiply(const product *p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     int64_t at, int64_t k, float beta, float *c, int64_t c_stride, float *panels) {
  float *panel_b = panels + BLOCK_M * BLOCK_K;
  moe_cpu_matrix a = p->form == MOE_TN ? moe_cpu_block(p->a, at, k, row, rows, panels)
                                       : moe_cpu_block(p->a, row, rows, at, k, panels);
  moe_cpu_matrix b = p->form == MOE_NT ? moe_cpu_block(p->b, column, columns, at, k, panel_b)
                                       : moe_cpu_block(p->b, at, k, column, columns, panel_b);
  moe_cpu_product(p->form, rows, columns, k, a.data, a.stride, b.data, b.stride, beta, c, c_stride);
}

static void tile(const product *p, int64_t row, int64_t column, float *panels) {
  int64_t rows = moe_min64(p->tile_m, p->m - row), columns = moe_min64(p->tile_n, p->n - column);
  bool in_place = p->c.dtype == MOE_F32;
  float *c = in_place ? (float *)p->c.data + row * p->n + column
                      : panels + BLOCK_M * BLOCK_K + BLOCK_K * BLOCK_N;
  int64_t stride = in_place ? p->n : columns;
  if (!in_place && p->beta > 0.0f)
    for (int64_t i = 0; i < rows; i++)
      moe_cpu_load(p->c, (row + i) * p->n + column, columns, c + i * stride);
  for (int64_t at = 0; at < p->k; at += p->tile_k)
    multiply(p, row, rows, column, columns, at, moe_min64(p->tile_k, p->k - at),
             at > 0 ? 1.0f : p->beta, c, stride, panels);
  if (!in_place)
    for (int64_t i = 0; i < rows; i++)
      moe_cpu_store(p->c, (row + i) * p->n + column, columns, c + i * stride);
}

moe_status moe_cpu_gemm(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b, float beta,
                        moe_tensor c) {
  product p = {.form = form, .a = a, .b = b, .c = c, .beta = beta};
  p.m = c.shape[0];
  p.n = c.shape[1];
  p.k = form == MOE_TN ? a.shape[0] : a.shape[1];
  if (p.m == 0 || p.n == 0) return MOE_OK;
  if (p.k == 0) return beta > 0.0f ? MOE_OK : moe_cpu_zero(dev, c);
  choose_tiles(&p);
  const moe_cpu_state *state = dev->state;
  int64_t across = tiles_along(p.n, p.tile_n), tiles = tiles_along(p.m, p.tile_m) * across;
#pragma omp parallel for schedule(dynamic, 1) num_threads(state->threads) if (tiles > 1)
  for (int64_t i = 0; i < tiles; i++)
    tile(&p, i / across * p.tile_m, i % across * p.tile_n,
         state->panels + omp_get_thread_num() * moe_cpu_panel_floats());
  return MOE_OK;
}
