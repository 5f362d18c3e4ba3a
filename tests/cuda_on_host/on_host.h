// What a .cu file finds instead of CUDA when it is compiled as C++ for the CPU (it is included before its
// first line): the keywords, built-in variables and intrinsics that this project's kernels use, over
// executor.h, cuda/device.cuh's wrappers of instructions, and the part of the runtime library that the
// backend calls, over host memory. Everything is of this project's own making: no CUDA toolkit is needed. A
// call or intrinsic that is missing here is a compile error, and then belongs here.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "executor.h"

// ---- keywords and variables -----------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx (::refrag_on_host::thread_index())
#define blockIdx (::refrag_on_host::block_index())
#define blockDim (::refrag_on_host::block_dim())
#define gridDim (::refrag_on_host::grid_dim())
// `type name[n]` in the block's shared memory.
#define REFRAG_SHARED(type, name, n)  \
    static const char name##_tag = 0; \
    type(&name)[n] =                  \
        *static_cast<type(*)[n]>(::refrag_on_host::static_shared_memory(&name##_tag, sizeof(type) * (n)))

namespace refrag_on_host {

using dim3 = Dim;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

// ---- intrinsics -----------------------------------------------------------------------------------------

inline void __syncthreads() {
    block_barrier();
}
inline void __syncwarp(uint32_t mask = 0xffffffff) {
    int nothing = 0;
    warp_together("__syncwarp", mask, &nothing, [](void* const*) {});
}

// Bit l of the result: whether lane l brought something that is not 0.
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    struct Mine {
        int predicate;
        uint32_t result;
    } mine{predicate, 0};
    warp_together("__ballot_sync", mask, &mine, [&](void* const* lanes) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; ++l) {
            if ((mask >> l & 1) == 0) continue;
            if (static_cast<Mine*>(lanes[l])->predicate != 0) votes |= 1u << l;
        }
        for (int l = 0; l < 32; ++l) {
            if ((mask >> l & 1) != 0) static_cast<Mine*>(lanes[l])->result = votes;
        }
    });
    return mine.result;
}
inline int __any_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0 ? 1 : 0;
}
inline int __all_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask ? 1 : 0;
}

// Lane l gets the value of lane source(l); where that is no lane of the warp, its own.
template <typename T, typename Source>
T shuffled(const char* what, uint32_t mask, T value, const Source& source) {
    struct Mine {
        T value;
        T result;
    } mine{value, value};
    warp_together(what, mask, &mine, [&](void* const* lanes) {
        for (int l = 0; l < 32; ++l) {
            const int from = source(l);
            if (lanes[l] == nullptr || (mask >> l & 1) == 0) continue;
            if (from < 0 || from > 31) continue;
            if ((mask >> from & 1) == 0) break_rule({"a shuffle from a lane outside of the mask"});
            static_cast<Mine*>(lanes[l])->result = static_cast<Mine*>(lanes[from])->value;
        }
    });
    return mine.result;
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
    return shuffled("__shfl_xor_sync", mask, value, [=](int l) { return l ^ lane_mask; });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta) {
    return shuffled("__shfl_down_sync", mask, value, [=](int l) { return l + delta; });
}
// Every lane may name another source.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source) {
    struct Mine {
        T value;
        T result;
        int source;
    } mine{value, value, source & 31};
    warp_together("__shfl_sync", mask, &mine, [&](void* const* lanes) {
        for (int l = 0; l < 32; ++l) {
            if ((mask >> l & 1) == 0) continue;
            auto* const at = static_cast<Mine*>(lanes[l]);
            if ((mask >> at->source & 1) == 0) break_rule({"__shfl_sync from a lane outside of the mask"});
            at->result = static_cast<Mine*>(lanes[at->source])->value;
        }
    });
    return mine.result;
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
using std::isinf;
using std::isnan;
template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}

// ---- cuda/device.cuh's wrappers -------------------------------------------------------------------------

inline float widen_bf16(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t round_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float widen_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = half >> 10 & 0x1f;
    const uint32_t mantissa = half & 0x3ff;
    if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return __uint_as_float(sign | __float_as_uint(magnitude));
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
// To nearest even, as cvt.rn.f16.f32: beyond 65519.99 to infinity.
inline uint16_t round_f16(float x) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // a subnormal half: its unit is 2^-24
        const float units = std::nearbyint(__uint_as_float(magnitude) * 0x1p24f);
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(units));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}
inline uint32_t pack_bf16(float low, float high) {
    return static_cast<uint32_t>(round_bf16(high)) << 16 | round_bf16(low);
}
inline uint32_t pack_f16(float low, float high) {
    return static_cast<uint32_t>(round_f16(high)) << 16 | round_f16(low);
}

#define REFRAG_UNROLL
#define REFRAG_LOOP
#define REFRAG_UNROLL_TURNS
inline float power_of_2(float x) {
    return std::exp2(x);
}

template <typename T>
T* dynamic_shared() {
    return static_cast<T*>(dynamic_shared_memory());
}

// d += a b for one tile m16n8k16; the fragments are laid out as PTX's mma.sync lays them out.
template <typename Widen>
void mma_together(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Widen widen) {
    struct Mine {
        float* d;
        const uint32_t* a;
        const uint32_t* b;
    } mine{d, a, b};
    warp_together(what, 0xffffffff, &mine, [&](void* const* lanes) {
        float left[16][16], right[16][8];
        const auto half = [&](uint32_t pair, int i) { return widen(static_cast<uint16_t>(pair >> 16 * i)); };
        for (int l = 0; l < 32; ++l) {
            const Mine& lane = *static_cast<Mine*>(lanes[l]);
            const int row = l / 4, pair = l % 4 * 2;
            for (int i = 0; i < 2; ++i) {
                left[row][pair + i] = half(lane.a[0], i);
                left[row + 8][pair + i] = half(lane.a[1], i);
                left[row][pair + 8 + i] = half(lane.a[2], i);
                left[row + 8][pair + 8 + i] = half(lane.a[3], i);
                right[pair + i][row] = half(lane.b[0], i);
                right[pair + 8 + i][row] = half(lane.b[1], i);
            }
        }
        for (int l = 0; l < 32; ++l) {
            const Mine& lane = *static_cast<Mine*>(lanes[l]);
            for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                lane.d[i] += sum;
            }
        }
    });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_together("mma bf16", d, a, b, widen_bf16);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_together("mma f16", d, a, b, widen_f16);
}

// ldmatrix .x4: lane 8 i + r names row r (8 halves, 16 bytes) of matrix i; lane l gets of matrix i the halves
// (l % 4) * 2 and the next of row l / 4, or, transposed, of column l / 4.
inline void load_matrices(const char* what, uint32_t (&out)[4], const void* row, bool transposed) {
    struct Mine {
        uint32_t* out;
        const void* row;
    } mine{out, row};
    warp_together(what, 0xffffffff, &mine, [&](void* const* lanes) {
        uint16_t matrix[4][8][8];
        for (int l = 0; l < 32; ++l) {
            const void* const from = static_cast<Mine*>(lanes[l])->row;
            if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
                break_rule({"ldmatrix: a row at no multiple of 16"});
            std::memcpy(matrix[l / 8][l % 8], from, 16);
        }
        for (int l = 0; l < 32; ++l) {
            const int r = l / 4, c = l % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                const uint32_t low = transposed ? matrix[i][c][r] : matrix[i][r][c];
                const uint32_t high = transposed ? matrix[i][c + 1][r] : matrix[i][r][c + 1];
                static_cast<Mine*>(lanes[l])->out[i] = high << 16 | low;
            }
        }
    });
}
inline void load_matrix_x4(uint32_t (&out)[4], const void* row) {
    load_matrices("ldmatrix", out, row, false);
}
inline void load_matrix_x4_trans(uint32_t (&out)[4], const void* row) {
    load_matrices("ldmatrix.trans", out, row, true);
}

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
    copy_async(shared, valid ? global : nullptr);
}
template <int N>
void copy_async_wait() {
    copy_async_wait(N);
}

// ---- the runtime library --------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorDevicesUnavailable = 46,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidResourceHandle = 400,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMemoryPoolsSupported = 115,
};
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4 };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

struct cudaDeviceProp {
    char name[256];
};

// The steps of a captured stream, replayed in order.
struct Graph {
    std::vector<std::function<void()>> steps;
};
struct Stream {
    int device;  // work is enqueued by threads whose current device it is, as CUDA demands
    Graph* capturing = nullptr;
};
struct Event {};
struct MemPool {};
using cudaStream_t = Stream*;
using cudaEvent_t = Event*;
using cudaGraph_t = Graph*;
using cudaGraphExec_t = Graph*;
using cudaMemPool_t = MemPool*;

// The device's memory, so that running out of it can be tested. Allocations are malloc's, one each. All
// threads' together, whereas each thread runs its own kernels.
struct Device {
    std::atomic<size_t> total_bytes = size_t{1} << 32;
    std::atomic<size_t> used_bytes = 0;
    std::atomic<uint64_t> n_allocated = 0;
    std::atomic<int> n_devices = 1;  // all of them this one's memory
    std::atomic<bool> has_driver = true;
    std::atomic<bool> has_pools = true;
    std::atomic<bool> has_cublas = true;
    std::atomic<bool> opens =
        true;  // else making a stream fails, as where another process has the device alone
    std::atomic<int> capability = 9;
};
Device& device();

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation        ? "out of memory"
           : error == cudaErrorNoDevice              ? "no device"
           : error == cudaErrorInvalidResourceHandle ? "invalid resource handle"
           : error == cudaErrorDevicesUnavailable    ? "devices unavailable"
                                                     : "?";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = device().n_devices;
    return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
// The calling thread's, as the runtime keeps it.
inline int& current_device() {
    thread_local int current = 0;
    return current;
}
inline cudaError_t cudaSetDevice(int ordinal) {
    if (ordinal < 0 || ordinal >= device().n_devices) return cudaErrorInvalidValue;
    current_device() = ordinal;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int) {
    std::strcpy(prop->name, "kernels on the host");
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount            ? 4
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
             : attribute == cudaDevAttrComputeCapabilityMajor       ? device().capability.load()
             : attribute == cudaDevAttrMemoryPoolsSupported         ? (device().has_pools ? 1 : 0)
                                                                    : 0;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = device().has_driver ? 13000 : 0;
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    *total_bytes = device().total_bytes;
    *free_bytes = device().total_bytes - device().used_bytes;
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* data, cudaStream_t stream);
inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = nullptr;
    return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** data, size_t bytes) {
    *data = std::malloc(bytes);
    return *data != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void* data) {
    std::free(data);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    if (!device().opens) return cudaErrorDevicesUnavailable;
    *stream = new Stream{current_device()};
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return stream->capturing == nullptr ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new Event;
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
template <typename Step>
cudaError_t enqueue(cudaStream_t stream, Step step) {
    if (stream->device != current_device()) return cudaErrorInvalidResourceHandle;
    if (stream->capturing != nullptr)
        stream->capturing->steps.emplace_back(std::move(step));
    else
        step();
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
    return enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->capturing = new Graph;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = std::exchange(stream->capturing, nullptr);
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = new Graph(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (const auto& step : exec->steps) step();
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), Dim grid, Dim block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
    return enqueue(stream, [=, values = std::tuple<Params...>(args...)] {
        run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
    });
}

}  // namespace refrag_on_host

using namespace refrag_on_host;
