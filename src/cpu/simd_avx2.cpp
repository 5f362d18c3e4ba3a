// The vector loops compiled for AVX2, and their table. Empty on other processors than x86-64.
#if defined(__x86_64__)

#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/scalar_math.h"
#include "cpu/simd_unroll.h"
#include "cpu/vec_avx2.h"
#include "ops/backend.h"

namespace refrag {
namespace avx2 {

// Apart, for order matters here: each uses the ones before it.
#include "cpu/simd_common.inl"

#include "cpu/simd_math.inl"

#include "cpu/simd_rows.inl"

#include "cpu/simd_gemm.inl"

#include "cpu/simd_attention.inl"

}  // namespace avx2

const CpuKernels kAvx2Kernels = {
    avx2::gemm_tile, avx2::widen_panel,    avx2::widen_int8,    avx2::add,          avx2::gelu, avx2::tanh,
    avx2::silu_mul,  avx2::rms_norm,       avx2::layer_norm,    avx2::l2_normalize, avx2::rope, avx2::max,
    avx2::sum_exp,   avx2::transpose_keys, avx2::softmax_block, avx2::scale,
};

}  // namespace refrag

#endif
