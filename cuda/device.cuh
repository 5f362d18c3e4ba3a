// What every kernel of this folder is written with: thin wrappers of the instructions that CUDA C++ has no
// function for, conversions, sums over a warp, and the one way to launch a kernel.
//
// The same .cu files compile as ordinary C++ against tests/cuda_on_host/ (REFRAG_CUDA_ON_HOST). That is how
// the kernels are tested where there is no GPU. The executor there brings its own version of everything in
// the first part below. So a kernel uses these names, and of CUDA itself only threadIdx ... gridDim,
// __syncthreads,
// __syncwarp and __shfl_*_sync. Blocks are whole warps.
#pragma once

#if !defined(REFRAG_CUDA_ON_HOST)
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "cuda_backend.h"

#if !defined(REFRAG_CUDA_ON_HOST)

// `type name[n]` in the block's shared memory.
#define REFRAG_SHARED(type, name, n) __shared__ type name[n]

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char refrag_dynamic_shared[];
    return reinterpret_cast<T*>(refrag_dynamic_shared);
}

// 16-bit floats are kept as their bits. Rounding is to nearest even; NaN stays NaN.
__device__ __forceinline__ float widen_bf16(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t round_bf16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ float widen_f16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ __forceinline__ uint16_t round_f16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
// Two of them in a register, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// d += a b, one tile of 16 x 8 with 16 products each (mma.sync.m16n8k16, fragments as PTX lays them out). The
// whole warp.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + r names row r (16 bytes, aligned) of
// matrix i; out[i] are two values of matrix i as mma's fragments want them, or of its transpose.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&out)[4], const void* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}

// Copies 16 aligned bytes from global to shared memory behind the thread's back, or writes zeros where
// `valid` is false (`global` is then not read). They are there after copy_async_wait() and, for other
// threads, a barrier.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes)
                 : "memory");
}
// Closes a group of copies; waits until at most N of this thread's groups are under way.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Enqueues kernel(args...).
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
    if (shared_bytes > 48 * 1024) {
        // More than every device has: to be asked for.
        const cudaError_t error =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
    return cudaGetLastError();
}

// Before loops whose counter picks registers: left as loops they would put arrays into memory. And before
// loops that unrolled would need more registers than there are.
#define REFRAG_UNROLL _Pragma("unroll")
#define REFRAG_LOOP _Pragma("unroll 1")
// Before loops that wait for memory: the reads of kTurns turns are under way at once.
#define REFRAG_UNROLL_TURNS _Pragma("unroll kTurns")

// 2^x to a relative error of 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif  // !REFRAG_CUDA_ON_HOST

// The call's text, place and what the driver says; out of memory has its own status.
#define CUDA_CHECK(call)                                                                                   \
    do {                                                                                                   \
        const cudaError_t cuda_check_error = (call);                                                       \
        if (cuda_check_error != cudaSuccess) {                                                             \
            ::refrag::fail(cuda_check_error == cudaErrorMemoryAllocation ? ::refrag::Status::out_of_memory \
                                                                         : ::refrag::Status::runtime,      \
                           "CUDA: ", cudaGetErrorString(cuda_check_error), " (" #call ", ", __FILE__, ":", \
                           __LINE__, ")");                                                                 \
        }                                                                                                  \
    } while (0)

namespace refrag::REFRAG_CUDA {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffff;

// Of a warp's lanes, the same in every lane: each adds what the lane 16, 8, 4, 2, 1 away holds, so that all
// lanes round alike.
__device__ __forceinline__ float warp_sum(float x) {
    for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int d = kWarp / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
    return x;
}

// 16-bit types as template parameters: their conversions and their mma.
struct Bf16 {
    static __device__ __forceinline__ float widen(uint16_t bits) { return widen_bf16(bits); }
    static __device__ __forceinline__ uint16_t round(float x) { return round_bf16(x); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
        mma_bf16(d, a, b);
    }
};
struct F16 {
    static __device__ __forceinline__ float widen(uint16_t bits) { return widen_f16(bits); }
    static __device__ __forceinline__ uint16_t round(float x) { return round_f16(x); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_f16(low, high); }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
        mma_f16(d, a, b);
    }
};

__host__ __device__ inline int64_t ceil_div(int64_t n, int64_t d) {
    return (n + d - 1) / d;
}

}  // namespace refrag::REFRAG_CUDA
