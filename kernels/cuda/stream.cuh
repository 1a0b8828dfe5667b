/* skinny.cuh's products for Hopper, with the weights brought by the copy engine: for matrices so
 * large that only the memory's rate counts.
 *
 *     c [16, 8 TILES] += w [16, k] x [8 TILES, k]^T          by one warp, a segment of k at a time
 *
 * A warp works alone, with its own place in shared memory for 16 rows of a segment: it asks for the
 * rows of its next segment as soon as it has read the last, and needs no barrier with other warps.
 * A block on every multiprocessor, whose warps all wait for a segment, keeps some 13 MB in flight:
 * three times what the memory's latency asks for, and little enough for two kernels to be resident,
 * so that the second already streams while the first ends (launch.cuh).
 *
 * Rows lie 64 bytes apart from multiples of 128, so that a quarter of a warp reads all banks. */
#ifndef MOE_KERNELS_CUDA_STREAM_CUH
#define MOE_KERNELS_CUDA_STREAM_CUH

#include "kernels/cuda/skinny.cuh"
#include "kernels/cuda/sm90_ptx.cuh"

constexpr int stream_warps = 8, stream_threads = 32 * stream_warps;
constexpr int stream_segment = 384, stream_steps = stream_segment / skinny_chunk;
constexpr int stream_row = 2 * stream_segment + 64, stream_stage = skinny_rows * stream_row;
constexpr int stream_shared = stream_warps * stream_stage; /* dynamic shared memory of a block */

/* Where skinny_fits, whether the copy engine is there too. */
static inline bool stream_fits(const moe_device *dev) {
  static const bool plain = cuda_plain("stream");
  return cuda_of(dev)->arch >= 90 && !plain;
}

/* cuda_start, with what a streaming block needs. */
template <typename P>
static moe_status stream_start(moe_device *dev, void (*kernel)(P), dim3 grid, const P &args) {
  return cuda_start(dev, kernel, grid, stream_threads, stream_shared, args);
}

/* This warp's number among all, neighbours on different multiprocessors; and how many there are. */
__device__ __forceinline__ int stream_first() {
  return (int)(threadIdx.x / 32 * gridDim.x + blockIdx.x);
}
__device__ __forceinline__ int stream_all() {
  return (int)gridDim.x * stream_warps;
}

/* A warp's place in shared memory and the barrier at which its segment arrives. */
struct stream_place {
  uint32_t stage, barrier, parity;

  __device__ __forceinline__ stream_place(uint4 *memory, uint64_t *barriers) {
    int warp = (int)threadIdx.x / 32;
    stage = shared_address(memory) + (uint32_t)(warp * stream_stage);
    barrier = shared_address(barriers + warp);
    parity = 0;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
      barrier_init(barrier, 1);
      barrier_init_fence();
    }
    __syncwarp();
#endif
  }
  /* Ask for n elements of this lane's row, n <= stream_segment and a multiple of 8; lanes from 16
   * on and rows that do not exist pass NULL. All lanes must call, with one row at least. */
  template <typename T> __device__ __forceinline__ void ask(const T *row, int n) const {
#if __CUDA_ARCH__ >= 900
    int bytes = 2 * n, rows = __popc(__ballot_sync(full_warp, row != nullptr));
    if (threadIdx.x % 32 == 0) barrier_expect(barrier, rows * bytes);
    __syncwarp(); /* and all lanes have read what was here */
    if (row != nullptr) bulk_load(stage + threadIdx.x % 32 * stream_row, row, bytes, barrier);
#endif
  }
  __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    barrier_wait(barrier, parity);
    parity ^= 1;
#endif
  }
  /* This lane's 8 elements of step u: of row g, and with upper = 1 of row g + 8. */
  __device__ __forceinline__ uint4 read(int u, int upper) const {
    uint32_t lane = threadIdx.x % 32;
    uint32_t at = stage + (lane / 4 + 8 * (uint32_t)upper) * stream_row + lane % 4 * 16;
    return load_shared(at + (uint32_t)u * (2 * skinny_chunk));
  }
};

/* Sums of a tile, in chains that do not wait for each other. Their order depends on k alone, as
 * skinny.cuh's does: a row of x gives the same bits whatever stands beside it. */
template <int TILES> struct stream_sums {
  static constexpr int chains = 2;
  float c[chains][TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < chains; h++)
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[h][j][i] = 0.0f;
  }
  /* The sum of row g (upper 0) or g + 8 with row 2 t + i of tile j of x. */
  __device__ __forceinline__ float total(int j, int upper, int i) const {
    float sum = 0.0f;
#pragma unroll
    for (int h = 0; h < chains; h++) sum += c[h][j][2 * upper + i];
    return sum;
  }
  /* += the segment that `place` waits for times elements [k0, k0 + n) of rows of x: row[j] is this
   * lane's in tile j, or NULL; `tiles` have any. */
  template <typename T>
  __device__ __forceinline__ void multiply(stream_place &place, const T *const (&row)[TILES],
                                           int tiles, int k0, int n) {
    constexpr int batch = TILES == 1 ? stream_steps : 8 / TILES; /* of 12 */
    int t = (int)threadIdx.x % 4 * 8;
    uint4 x[batch][TILES];
#pragma unroll
    for (int u0 = 0; u0 < stream_steps; u0 += batch) {
#pragma unroll
      for (int u = 0; u < batch; u++) {
        int i = (u0 + u) * skinny_chunk + t;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          x[u][j] = uint4{};
          if (j < tiles && i < n && row[j] != nullptr)
            x[u][j] = *reinterpret_cast<const uint4 *>(row[j] + k0 + i);
        }
      }
      if (u0 == 0) place.wait();
#pragma unroll
      for (int u = 0; u < batch; u++) {
        int at = u0 + u;
        uint4 low = place.read(at, 0), high = place.read(at, 1);
        if (at * skinny_chunk + t >= n) low = high = uint4{}; /* what lies there is older */
        uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          if (j > 0 && j >= tiles) break; /* the same for the whole warp */
          mma<T>(c[0][j], a, x[u][j].x, x[u][j].y);
          mma<T>(c[1][j], b, x[u][j].z, x[u][j].w);
        }
      }
    }
  }
};

#endif
