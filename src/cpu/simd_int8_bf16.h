// 8-bit weights widened to bf16 with AVX-512: one block of 32 k x 16 columns, which is one tile of the right
// operand. Included by simd_*.cpp only.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/simd_unroll.h"
#include "cpu/x86_intrinsics.h"

#define REFRAG_INT8_BF16                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) inline \
        __attribute__((always_inline))

namespace refrag::avx512_bf16 {

// The byte of each dword at the bits of `place`, as the number 2^exponent + byte: the byte lies in the
// mantissa under that exponent where its units are.
REFRAG_INT8_BF16 __m512 number(__m512i moved, __m512i place, __m512i power) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, place, power, 0xea));  // a & b | c
}

// Both rounded to bf16, by adding half a unit and cutting; pairs of words.
REFRAG_INT8_BF16 __m512i rounded_pairs(__m512 first, __m512 second) {
    const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
    return _mm512_ternarylogic_epi32(high, top, low, 0xea);
}

// Bound by the two vector ports: 19 instructions for 64 weights. cvtne2ps2bf16 and a permutation of words
// instead of the last 9 take a third longer.
REFRAG_INT8_BF16 void widen_block(uint16_t* tile, const Int8Block& block) {
    // (2^e + u) s - (2^e + 128) s = (u - 128) s is exact before it is rounded: 2^e + 128 has few enough bits.
    const __m512i at_15 = _mm512_set1_epi32(0xff << 15), of_256 = _mm512_set1_epi32((127 + 8) << 23);
    const __m512i at_8 = _mm512_set1_epi32(0xff << 8), of_32768 = _mm512_set1_epi32((127 + 15) << 23);
    const __m512 scale =
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.scale)));
    const __m512 shift = _mm512_mul_ps(scale, _mm512_set1_ps(-256.0f - kInt8Zero));
    const __m512 shift_1 = _mm512_mul_ps(scale, _mm512_set1_ps(-32768.0f - kInt8Zero));
    REFRAG_UNROLL
    for (int i = 0; i < kInt8Group / 4; ++i, tile += 4 * kPanel) {
        const __m512i bytes = _mm512_loadu_si512(block.q[i]);
        const __m512 x0 = number(_mm512_slli_epi32(bytes, 15), at_15, of_256);
        const __m512 x1 = number(bytes, at_8, of_32768);
        const __m512 x2 = number(_mm512_srli_epi32(bytes, 1), at_15, of_256);
        const __m512 x3 = number(_mm512_srli_epi32(bytes, 9), at_15, of_256);
        _mm512_storeu_si512(
            tile, rounded_pairs(_mm512_fmadd_ps(x0, scale, shift), _mm512_fmadd_ps(x1, scale, shift_1)));
        _mm512_storeu_si512(tile + 2 * kPanel, rounded_pairs(_mm512_fmadd_ps(x2, scale, shift),
                                                             _mm512_fmadd_ps(x3, scale, shift)));
    }
}

}  // namespace refrag::avx512_bf16
