/* CUDA without a card: memory is this process's, copies are copies, and what would be computed is not.
   ``null_libraries`` of null_cuda.py adds every other function that a library asks for; those do nothing and succeed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALLS 64
static struct { const char *name; long count; } calls[CALLS];
static long allocated;

static void called(const char *name) {
    for (int i = 0; i < CALLS; i++) {
        if (!calls[i].name) calls[i].name = name;
        if (!strcmp(calls[i].name, name)) { __sync_fetch_and_add(&calls[i].count, 1); return; }
    }
}
long null_calls(const char *name) {
    for (int i = 0; i < CALLS && calls[i].name; i++)
        if (!strcmp(calls[i].name, name)) return calls[i].count;
    return 0;
}
long null_allocated(void) { return allocated; }

/* --- memory --- */
static void *take(size_t size) {
    size_t *block = aligned_alloc(256, (size + 256 + 255) / 256 * 256);
    memset(block, 0, size + 256);
    block[0] = size;
    __sync_fetch_and_add(&allocated, (long)size);
    return (char *)block + 256;
}
static void give(void *at) {
    if (!at) return;
    size_t *block = (size_t *)((char *)at - 256);
    __sync_fetch_and_sub(&allocated, (long)block[0]);
    free(block);
}
int cudaMalloc(void **at, size_t size) { called("cudaMalloc"); *at = take(size); return 0; }
int cudaFree(void *at) { give(at); return 0; }
int cudaHostAlloc(void **at, size_t size, unsigned flags) { *at = malloc(size); return 0; }
int cudaMallocHost(void **at, size_t size) { *at = malloc(size); return 0; }
int cudaFreeHost(void *at) { free(at); return 0; }
int cudaMallocFromPoolAsync(void **at, size_t size, void *pool, void *stream) { *at = take(size); return 0; }
int cudaFreeAsync(void *at, void *stream) { give(at); return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = (size_t)8 << 30; return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memmove(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    called("cudaMemcpyAsync");
    memmove(to, from, size);
    return 0;
}
int cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return 0; }
int cudaMemsetAsync(void *at, int value, size_t size, void *stream) { memset(at, value, size); return 0; }
struct attributes { int type, device; void *device_at, *host_at; long reserved[8]; };
int cudaPointerGetAttributes(struct attributes *found, const void *at) {
    memset(found, 0, sizeof *found);
    found->type = 2;
    found->device_at = (void *)at;
    return 0;
}

/* --- the device: what a card of compute capability 9.0 says of itself; places in CUDA 13's cudaDeviceProp --- */
static void put(char *properties, int at, int value) { memcpy(properties + at, &value, 4); }
static void put_size(char *properties, int at, size_t value) { memcpy(properties + at, &value, 8); }
int cudaGetDeviceProperties(char *p, int device) {
    memset(p, 0, 720);
    strcpy(p, "null");
    put_size(p, 288, (size_t)8 << 30);
    put_size(p, 296, 49152);
    put(p, 304, 65536);
    put(p, 308, 32);
    put(p, 320, 1024);
    for (int i = 0; i < 3; i++) { put(p, 324 + 4 * i, i < 2 ? 1024 : 64); put(p, 336 + 4 * i, i ? 65535 : 2147483647); }
    put(p, 360, 9);
    put(p, 364, 0);
    put(p, 384, 132);
    put(p, 596, 50 << 20);
    put(p, 604, 2048);
    put_size(p, 624, 233472);
    put(p, 632, 65536);
    put_size(p, 672, 232448);
    put(p, 688, 32);
    put_size(p, 696, 1024);
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : 1;
    return 0;
}
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorName(int error) { return "cudaErrorNull"; }
const char *cudaGetErrorString(int error) { return "null"; }

/* --- streams, events, graphs --- */
static void *handle(void) { return malloc(16); }
static int capturing;
static int refused; /* whether captures fail, as those of an operation that cannot be captured do */
void null_refuse(int how) { refused = how; }
int cudaStreamCreate(void **stream) { *stream = handle(); return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle(); return 0; }
int cudaEventCreate(void **event) { *event = handle(); return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle(); return 0; }
int cudaStreamBeginCapture(void *stream, int mode) { called("cudaStreamBeginCapture"); capturing = 1; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = handle(); return refused ? 900 : 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaGraphInstantiate(void **exec, void *graph, unsigned long long flags) { *exec = handle(); return 0; }
int cudaGraphLaunch(void *exec, void *stream) { called("cudaGraphLaunch"); return 0; }
int cudaGraphExecDestroy(void *exec) { called("cudaGraphExecDestroy"); return 0; }
int cudaEventElapsedTime(float *ms, void *from, void *to) { *ms = 1; return 0; }

/* --- kernels --- */
static long nowhere[64];
void **__cudaRegisterFatBinary(void *binary) { return (void **)nowhere; }
int __cudaPushCallConfiguration(void) { return 0; }
int __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) { return 0; }
int __cudaGetKernel(void **kernel, const void *function) { *kernel = nowhere; return 0; }
int __cudaLaunchKernel(void) { called("launch"); return 0; }
int cudaLaunchKernel(void) { called("launch"); return 0; }
int cudaLaunchKernelExC(void) { called("launch"); return 0; }
int cudaFuncGetAttributes(void *found, const void *function) { memset(found, 0, 64); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 1; return 0; }
int cublasCreate_v2(void **made) { *made = handle(); return 0; }
int cublasLtCreate(void **made) { *made = handle(); return 0; }
int cublasGetMathMode(void *cublas, int *mode) { *mode = 0; return 0; }
int cublasSgemm_v2(void) { called("gemm"); return 0; }
int cublasGemmEx(void) { called("gemm"); return 0; }
int cublasGemmStridedBatchedEx(void) { called("gemm"); return 0; }
int cublasSgemmStridedBatched(void) { called("gemm"); return 0; }
const char *cublasGetStatusName(int status) { return "null"; }
const char *cublasGetStatusString(int status) { return "null"; }

/* --- the driver, as engines/backends/cuda.py asks it --- */
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Null Card"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }

/* --- cuDNN, which ONNX Runtime opens when a reduction asks for it --- */
int cudnnCreate(void **made) { *made = handle(); return 0; }
int cudnnCreateTensorDescriptor(void **made) { *made = handle(); return 0; }
int cudnnCreateReduceTensorDescriptor(void **made) { *made = handle(); return 0; }
int cudnnGetReductionWorkspaceSize(void *cudnn, void *how, void *from, void *to, size_t *size) { *size = 0; return 0; }
int cudnnGetReductionIndicesSize(void *cudnn, void *how, void *from, void *to, size_t *size) { *size = 0; return 0; }
int cudnnReduceTensor(void) { called("launch"); return 0; }
size_t cudnnGetVersion(void) { return 91000; }
const char *cudnnGetErrorString(int status) { return "null"; }
