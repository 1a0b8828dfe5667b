/* The CUDA device: a stream per lane, one cuBLASLt handle, memory that is planned once.
 *
 * A lane's operations run in order, so they need no waits between them; lanes.cu has the waits
 * between lanes. The workspace of cuBLASLt and the
 * buffer for partial sums are allocated here, so no operation allocates. Memory is plain
 * cudaMalloc: managed memory would page. */
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "kernels/cpu/cpu.h"
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/plain.h"

enum : int64_t {
  WORKSPACE = 32 << 20, /* what cuBLAS recommends on Hopper */
  PARTIAL = 16 << 20,
  RESERVE = 1 << 30 /* left to NCCL, cuDNN and lazily loaded kernels */
};

moe_status cuda_failed(const moe_device *dev, cudaError_t error, const char *what) {
  char place[96] = "";
  if (dev->label != nullptr && dev->label_layer >= 0)
    snprintf(place, sizeof place, " in layer %lld %s", (long long)dev->label_layer, dev->label);
  else if (dev->label != nullptr)
    snprintf(place, sizeof place, " in %s", dev->label);
  bool memory = error == cudaErrorMemoryAllocation;
  return moe_fail(memory ? MOE_NO_MEMORY : MOE_FAILED, "cuda: %s (%s)%s: %s: %s",
                  cudaGetErrorString(error), cudaGetErrorName(error), place, dev->name,
                  memory ? "the GPU's memory is full: plan for less with run.memory_gib" : what);
}

int moe_cuda_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError(); /* not sticky: no GPU is an answer */
    return 0;
  }
  return count;
}

void *moe_cuda_stream(const moe_device *dev) {
  return cuda_of(dev)->stream;
}
int moe_cuda_ordinal(const moe_device *dev) {
  return cuda_of(dev)->ordinal;
}

/* ---- memory -------------------------------------------------------------------------------- */

/* The current GPU belongs to the thread: a loader's thread would otherwise make a context on GPU 0.
 */
static void use(const moe_device *dev) {
  (void)cudaSetDevice(cuda_of(dev)->ordinal);
}

static int64_t free_bytes(moe_device *dev) {
  size_t available = 0, total = 0;
  use(dev);
  if (cudaMemGetInfo(&available, &total) != cudaSuccess) return 0;
  int64_t reserve = (int64_t)total / 16 < RESERVE ? (int64_t)total / 16 : RESERVE;
  return (int64_t)available > reserve ? (int64_t)available - reserve : 0;
}

static void *alloc(moe_device *dev, int64_t bytes) {
  void *data = nullptr;
  cudaStream_t stream = cuda_of(dev)->stream;
  use(dev);
  if (bytes < 0 || cudaMalloc(&data, (size_t)(bytes > 0 ? bytes : 1)) != cudaSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  if (cudaMemsetAsync(data, 0, (size_t)bytes, stream) != cudaSuccess ||
      cudaStreamSynchronize(stream) != cudaSuccess) {
    cudaFree(data);
    return nullptr;
  }
  return data;
}

static void release(moe_device *dev, void *data) {
  use(dev);
  cuda_offsets_changed(dev, data, 0);
  cudaFree(data);
}

/* cudaMallocHost has one thread touch one small page after the other, which for the copy that a
 * save of a large model is made from takes the better part of a minute. So all threads touch huge
 * pages, and what is there already is pinned. */
static void *alloc_host(moe_device *dev, int64_t bytes) {
  enum : int64_t { PAGE = 4 << 10, HUGE_PAGE = 2 << 20 };
  use(dev);
  if (bytes < 0) return nullptr;
  int64_t page = bytes < HUGE_PAGE ? PAGE : HUGE_PAGE, room = round_up(bytes > 0 ? bytes : 1, page);
  void *data = aligned_alloc((size_t)page, (size_t)room);
  if (data == nullptr) return nullptr;
  if (page == HUGE_PAGE) (void)madvise(data, (size_t)room, MADV_HUGEPAGE); /* a wish */
  (void)moe_cpu_zero(dev, moe_tensor_1d(data, MOE_F32, room / 4));
  if (cudaHostRegister(data, (size_t)room, cudaHostRegisterDefault) == cudaSuccess) return data;
  (void)cudaGetLastError();
  free(data);
  return nullptr;
}

static void release_host(moe_device *dev, void *data) {
  if (data == nullptr) return;
  use(dev);
  (void)cudaHostUnregister(data);
  free(data);
}

static moe_status upload(moe_device *dev, void *to, const void *from, int64_t bytes) {
  use(dev);
  cuda_offsets_changed(dev, to, bytes);
  CUDA_TRY(dev,
           cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyHostToDevice, cuda_of(dev)->stream));
  return MOE_OK;
}

static moe_status download(moe_device *dev, void *to, const void *from, int64_t bytes) {
  use(dev);
  CUDA_TRY(dev,
           cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToHost, cuda_of(dev)->stream));
  return MOE_OK;
}

static moe_status sync(moe_device *dev) {
  use(dev);
  cudaError_t error = cudaStreamSynchronize(cuda_of(dev)->stream);
  if (error == cudaSuccess) return MOE_OK;
  return cuda_failed(dev, error, "an earlier operation failed: run.debug = true names it");
}

/* ---- time ---------------------------------------------------------------------------------- */

static void mark(moe_device *dev, moe_mark *out) {
  cudaEvent_t event = static_cast<cudaEvent_t>(out->event);
  use(dev);
  if (event == nullptr && cudaEventCreate(&event) != cudaSuccess) return;
  if (dev->recording)
    cudaEventRecordWithFlags(event, cuda_of(dev)->stream, cudaEventRecordExternal);
  else
    cudaEventRecord(event, cuda_of(dev)->stream);
  out->event = event;
}

static moe_status wait_for(moe_device *dev, const moe_mark *mark) {
  use(dev);
  if (mark->event == nullptr) return sync(dev); /* no event was to be had */
  CUDA_TRY(dev, cudaEventSynchronize(static_cast<cudaEvent_t>(mark->event)));
  return MOE_OK;
}

static double between(moe_device *dev, const moe_mark *from, const moe_mark *to) {
  float ms = 0.0f;
  use(dev);
  if (from->event == nullptr || to->event == nullptr) return 0.0;
  bool timed = cudaEventElapsedTime(&ms, static_cast<cudaEvent_t>(from->event),
                                    static_cast<cudaEvent_t>(to->event)) == cudaSuccess;
  return timed ? 1e-3 * static_cast<double>(ms) : 0.0;
}

static void forget(moe_device *dev, moe_mark *mark) {
  use(dev);
  if (mark->event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(mark->event));
  mark->event = nullptr;
}

/* The first multiprocessor's count, so that two slots tell of the same one. There are enough blocks
 * for each to get some, since which gets which is not ours to say. */
static __global__ void read_first_clock(ulonglong2 *slot) {
  unsigned multiprocessor;
  unsigned long long ns;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  if (multiprocessor != 0) return;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  *slot = make_ulonglong2(static_cast<unsigned long long>(clock64()), ns);
}

static void count_cycles(moe_device *dev, uint64_t *slot) {
  unsigned blocks = 8 * static_cast<unsigned>(cuda_of(dev)->sms);
  use(dev);
  read_first_clock<<<blocks, 1, 0, cuda_of(dev)->stream>>>(reinterpret_cast<ulonglong2 *>(slot));
}

/* ---- published rates ----------------------------------------------------------------------- */

/* Dense TFLOP/s with float32 sums, from the vendor's data sheets; the first name that fits. */
static const struct {
  const char *name;
  double half, tf32, f32;
  bool bf16;
} rates[] = {{"H100 PCIe", 756, 378, 51, true},  {"H100 NVL", 835, 417.5, 60, true},
             {"H100", 989, 494.5, 67, true},     {"H200", 989, 494.5, 67, true},
             {"H800", 989, 494.5, 67, true},     {"H20", 148, 74, 44, true},
             {"GH200", 989, 494.5, 67, true},    {"B200", 2250, 1125, 80, true},
             {"B100", 1750, 875, 60, true},      {"A100", 312, 156, 19.5, true},
             {"A800", 312, 156, 19.5, true},     {"A30", 165, 82, 10.3, true},
             {"A40", 149.7, 74.8, 37.4, true},   {"A6000", 154.8, 77.4, 38.7, true},
             {"A10G", 70, 35, 31.2, true},       {"A10", 125, 62.5, 31.2, true},
             {"L40S", 362, 183, 91.6, true},     {"L40", 181, 90.5, 90.5, true},
             {"L4", 121, 60, 30.3, true},        {"RTX 4090", 165.2, 82.6, 82.6, true},
             {"RTX 3090", 71, 35.6, 35.6, true}, {"V100", 125, 0, 15.7, false},
             {"T4", 65, 0, 8.1, false},          {"TITAN V", 110, 0, 13.8, false}};

static double peak_tflops(moe_device *dev, moe_dtype dtype) {
  for (const auto &r : rates) {
    if (strstr(dev->name, r.name) == nullptr) continue;
    if (dtype == MOE_F32) return dev->options.tf32 && r.tf32 > 0 ? r.tf32 : r.f32;
    if (dtype == MOE_F16 || (dtype == MOE_BF16 && r.bf16)) return r.half;
  }
  return 0;
}

/* ---- opening and closing ------------------------------------------------------------------- */

static void close_device(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  if (s == nullptr) return;
  use(dev);
  cuda_lanes_wait(s);
#ifdef MOE_WITH_CUDNN
  cuda_cudnn_close(dev);
#endif
  cuda_plans_destroy(s->plans);
  cuda_offsets_destroy(dev);
  if (s->blas != nullptr) cublasLtDestroy(s->blas);
  cudaFree(s->workspace);
  cudaFree(s->partial);
  cudaFree(s->ended);
  cudaFree(s->beside);
  cuda_lanes_destroy(s);
  free(s);
  dev->state = nullptr;
}

static moe_status describe(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  cudaDeviceProp p;
  CUDA_TRY(dev, cudaGetDeviceProperties(&p, s->ordinal));
  snprintf(dev->name, sizeof dev->name, "%.120s", p.name);
  CUDA_TRY(dev, cudaDeviceGetPCIBusId(dev->bus_id, sizeof dev->bus_id, s->ordinal));
  s->sms = p.multiProcessorCount;
  s->arch = p.major * 10 + p.minor;
  s->max_shared = (int)p.sharedMemPerBlockOptin;
  if (s->arch < 70)
    return moe_fail(MOE_USAGE, "cuda: %s has compute capability %d.%d: 7.0 or newer is needed",
                    p.name, p.major, p.minor);
  return MOE_OK;
}

static moe_status acquire(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  CUDA_TRY(dev, cudaSetDevice(s->ordinal));
  MOE_TRY(describe(dev));
  MOE_TRY(cuda_lanes_create(dev));
  s->workspace_bytes = WORKSPACE;
  s->partial_bytes = PARTIAL;
  CUDA_TRY(dev, cudaMalloc(&s->workspace, WORKSPACE));
  CUDA_TRY(dev, cudaMalloc(reinterpret_cast<void **>(&s->partial), PARTIAL));
  s->beside = static_cast<double *>(alloc(dev, (1 + 8LL * s->sms) * (int64_t)sizeof *s->beside));
  s->ended = static_cast<unsigned *>(alloc(dev, (int64_t)sizeof *s->ended));
  if (s->beside == nullptr || s->ended == nullptr)
    return moe_fail(MOE_NO_MEMORY, "cuda: no memory for partial sums");
  cublasStatus_t blas = cublasLtCreate(&s->blas);
  if (blas != CUBLAS_STATUS_SUCCESS)
    return moe_fail(MOE_FAILED, "cuda: cuBLASLt does not start on %s: %s", dev->name,
                    cublasLtGetStatusString(blas));
  MOE_TRY(cuda_offsets_create(dev));
  return cuda_experts_choose(dev);
}

static const moe_backend *table(void);

moe_status moe_cuda_open(moe_device *dev) {
  int count = moe_cuda_count();
  if (count < 1)
    return moe_fail(MOE_USAGE, "cuda: no GPU is visible: check nvidia-smi and "
                               "CUDA_VISIBLE_DEVICES, or use run.backend = cpu");
  cuda_state *s = static_cast<cuda_state *>(calloc(1, sizeof *s));
  if (s == nullptr) return moe_fail(MOE_NO_MEMORY, "cuda: no memory for the device's state");
  s->ordinal = dev->options.local_rank % count;
  s->own_gemm = cuda_wished("MOE_GEMM", "own");
  snprintf(dev->name, sizeof dev->name, "GPU %d", s->ordinal);
  dev->state = s;
  moe_status status = acquire(dev);
  if (status != MOE_OK) {
    close_device(dev);
    return status;
  }
  dev->backend = table();
  return MOE_OK;
}

static const moe_backend *table(void) {
  static moe_backend t = {};
  t.name = "cuda";
  t.is_host = false;
  t.close = close_device;
  t.free_bytes = free_bytes;
  t.peak_tflops = peak_tflops;
  t.alloc = alloc;
  t.free = release;
  t.alloc_host = alloc_host;
  t.free_host = release_host;
  t.upload = upload;
  t.download = download;
  t.sync = sync;
  t.use_lane = cuda_use_lane;
  t.wait_lane = cuda_wait_lane;
  t.follow = cuda_follow;
  t.lend = cuda_lend;
  t.mark = mark;
  t.wait = wait_for;
  t.between = between;
  t.forget = forget;
  t.count_cycles = count_cycles;
  t.graph_begin = cuda_graph_begin;
  t.graph_end = cuda_graph_end;
  t.graph_launch = cuda_graph_launch;
  t.graph_destroy = cuda_graph_destroy;
#define SLOT(name) t.name = moe_cuda_##name
  SLOT(zero), SLOT(fill), SLOT(draw_normal), SLOT(copy), SLOT(add), SLOT(sum_rows), SLOT(scale);
  SLOT(sum_squares);
  SLOT(embed), SLOT(embed_backward);
  SLOT(rms_norm), SLOT(rms_norm_backward);
  SLOT(gemm), SLOT(norm_gemm), SLOT(norm_router), SLOT(router_norm_backward);
  SLOT(rope);
  SLOT(attention), SLOT(attention_backward), SLOT(attention_scratch);
  SLOT(router), SLOT(router_drop), SLOT(router_backward);
  SLOT(permute_plan), SLOT(permute_window), SLOT(localize_experts);
  SLOT(gather_rows), SLOT(gather_gates), SLOT(combine_rows), SLOT(combine_norm),
      SLOT(combine_gates);
  SLOT(expert_up), SLOT(expert_down), SLOT(expert_down_backward), SLOT(expert_up_backward);
  SLOT(gates_backward), SLOT(gather_backward);
  SLOT(expert_weight_grad), SLOT(expert_scratch);
  SLOT(attention_cached), SLOT(attention_cached_scratch), SLOT(experts_decode);
  SLOT(sum_choices);
  SLOT(cross_entropy);
  SLOT(clip_scale), SLOT(adamw);
  SLOT(sample), SLOT(advance);
#undef SLOT
  return &t;
}
