// The vector loops compiled for AVX-512, and their table. Empty on other processors than x86-64.
#if defined(__x86_64__)

#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/scalar_math.h"
#include "cpu/simd_unroll.h"
#include "cpu/vec_avx512.h"
#include "ops/backend.h"

namespace refrag {
namespace avx512 {

// Apart, for order matters here: each uses the ones before it.
#include "cpu/simd_common.inl"

#include "cpu/simd_math.inl"

#include "cpu/simd_rows.inl"

#include "cpu/simd_gemm.inl"

#include "cpu/simd_attention.inl"

}  // namespace avx512

namespace avx512_bf16 {
void pack_bf16(uint16_t* block, const float* x, int64_t ldx, int64_t rows, int64_t k);
void gemm_bf16(const Bf16Gemm& g);
void pack_kv(uint16_t* page, int64_t first, int64_t n, const float* k, int64_t ldk, const float* v,
             int64_t ldv, int64_t dim);
void attend_bf16(const Bf16Attend& a);
void widen_int8_bf16(uint16_t* tiles, const Int8Block* blocks, int64_t n_blocks);
}  // namespace avx512_bf16
namespace amx {
void gemm_bf16(const Bf16Gemm& g);
void gemm_int8_bf16(const Int8Bf16Gemm& g);
void attend_bf16(const Bf16Attend& a);
}  // namespace amx
namespace vnni {
void quantize_groups(Int8Group* out, const float* x, int64_t n);
void gemm_int8(const Int8Gemm& g);
}  // namespace vnni

namespace {

constexpr CpuKernels loops() {
    CpuKernels kernels = {
        avx512::gemm_tile,  avx512::widen_panel,    avx512::widen_int8,    avx512::add,
        avx512::gelu,       avx512::tanh,           avx512::silu_mul,      avx512::rms_norm,
        avx512::layer_norm, avx512::l2_normalize,   avx512::rope,          avx512::max,
        avx512::sum_exp,    avx512::transpose_keys, avx512::softmax_block, avx512::scale,
    };
    kernels.quantize_groups = vnni::quantize_groups;  // used where cpu_supports() finds VNNI
    kernels.gemm_int8 = vnni::gemm_int8;
    return kernels;
}

constexpr CpuKernels with_bf16(void (*gemm)(const Bf16Gemm&), void (*attend)(const Bf16Attend&),
                               void (*gemm_int8)(const Int8Bf16Gemm&)) {
    CpuKernels kernels = loops();
    kernels.pack_bf16 = avx512_bf16::pack_bf16;
    kernels.gemm_bf16 = gemm;
    kernels.pack_kv = avx512_bf16::pack_kv;
    kernels.attend_bf16 = attend;
    kernels.widen_int8_bf16 = avx512_bf16::widen_int8_bf16;
    kernels.gemm_int8_bf16 = gemm_int8;
    return kernels;
}

}  // namespace

const CpuKernels kAvx512Kernels = loops();
const CpuKernels kAvx512Bf16Kernels = with_bf16(avx512_bf16::gemm_bf16, avx512_bf16::attend_bf16, nullptr);
const CpuKernels kAmxKernels = [] {
    CpuKernels kernels = with_bf16(amx::gemm_bf16, amx::attend_bf16, amx::gemm_int8_bf16);
    kernels.gemm_bf16_epilogue = true;
    return kernels;
}();

}  // namespace refrag

#endif
