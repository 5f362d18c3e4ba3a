// The vector type that the simd_*.inl files are written over: 16 floats, AVX-512.
// Included by simd_avx512.cpp only. vec_avx2.h is the same list for 8 floats.
#pragma once

#include <cstdint>

#include "cpu/simd_unroll.h"
#include "cpu/x86_intrinsics.h"

#define REFRAG_SIMD __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define REFRAG_SIMD_INLINE REFRAG_SIMD inline __attribute__((always_inline))

namespace refrag::avx512 {

using Vec = __m512;
using Mask = __mmask16;
inline constexpr int kLanes = 16;
inline constexpr int kAccumulators = 24;  // of 32 registers

// Lanes [0, n), for 0 <= n <= 16.
REFRAG_SIMD_INLINE Mask first_lanes(int64_t n) {
    return static_cast<Mask>((1u << n) - 1u);
}

REFRAG_SIMD_INLINE Vec zero() {
    return _mm512_setzero_ps();
}
REFRAG_SIMD_INLINE Vec set1(float x) {
    return _mm512_set1_ps(x);
}
REFRAG_SIMD_INLINE Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
REFRAG_SIMD_INLINE void store(float* p, Vec x) {
    _mm512_storeu_ps(p, x);
}
// The first n lanes (0 <= n <= kLanes); the others are 0, and their memory is not touched.
REFRAG_SIMD_INLINE Vec load_n(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
REFRAG_SIMD_INLINE void store_n(float* p, Vec x, int64_t n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), x);
}

REFRAG_SIMD_INLINE Vec add(Vec a, Vec b) {
    return _mm512_add_ps(a, b);
}
REFRAG_SIMD_INLINE Vec sub(Vec a, Vec b) {
    return _mm512_sub_ps(a, b);
}
REFRAG_SIMD_INLINE Vec mul(Vec a, Vec b) {
    return _mm512_mul_ps(a, b);
}
REFRAG_SIMD_INLINE Vec div(Vec a, Vec b) {
    return _mm512_div_ps(a, b);
}
REFRAG_SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}  // a b + c
REFRAG_SIMD_INLINE Vec fma_minus(Vec a, Vec b, Vec c) {
    return _mm512_fmsub_ps(a, b, c);
}  // a b - c
REFRAG_SIMD_INLINE Vec fma_neg(Vec a, Vec b, Vec c) {
    return _mm512_fnmadd_ps(a, b, c);
}  // c - a b
// b where a is a NaN.
REFRAG_SIMD_INLINE Vec min(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
REFRAG_SIMD_INLINE Vec max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
REFRAG_SIMD_INLINE Vec abs(Vec x) {
    return _mm512_abs_ps(x);
}
REFRAG_SIMD_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm512_or_ps(_mm512_andnot_ps(set1(-0.0f), magnitude), _mm512_and_ps(set1(-0.0f), sign));
}
REFRAG_SIMD_INLINE Vec round(Vec x) {
    return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// p * 2^n rounded once, n whole.
REFRAG_SIMD_INLINE Vec scale_pow2(Vec p, Vec n) {
    return _mm512_maskz_scalef_ps(0xffff, p, n);
}
REFRAG_SIMD_INLINE Mask less(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
REFRAG_SIMD_INLINE Mask greater_equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
REFRAG_SIMD_INLINE Vec select(Mask m, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(m, no, yes);
}

REFRAG_SIMD_INLINE float first_lane(Vec x) {
    return _mm512_cvtss_f32(x);
}
// Sum or maximum of the lanes, halving: lane i with lane i + 8, then + 4, + 2, + 1.
REFRAG_SIMD_INLINE float sum_lanes(Vec x) {
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
REFRAG_SIMD_INLINE float max_lanes(Vec x) {
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

// Sums in double: DoubleSum s{}; s.add(x); s.total().
struct DoubleSum {
    __m512d low;
    __m512d high;
};
REFRAG_SIMD_INLINE DoubleSum double_zero() {
    return {_mm512_setzero_pd(), _mm512_setzero_pd()};
}
REFRAG_SIMD_INLINE void add_to(DoubleSum& sum, Vec x) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    sum.low = _mm512_add_pd(sum.low, _mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256(x)));
    sum.high = _mm512_add_pd(sum.high, _mm512_maskz_cvtps_pd(0xff, high));
}
REFRAG_SIMD_INLINE double total(const DoubleSum& sum) {
    double lanes[8];
    _mm512_storeu_pd(lanes, _mm512_add_pd(sum.low, sum.high));
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// 16 halves, widened.
REFRAG_SIMD_INLINE Vec load_f16(const uint16_t* p) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// 16 pairs of bf16, widened: the first and the second of each pair.
REFRAG_SIMD_INLINE void load_bf16_pairs(const uint16_t* p, Vec& first, Vec& second) {
    const __m512i pairs = _mm512_loadu_si512(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// 16 times 4 unsigned bytes: x[j] has the j-th byte of each.
REFRAG_SIMD_INLINE void load_bytes4(const uint8_t* p, Vec (&x)[4]) {
    const __m512i bytes = _mm512_loadu_si512(p), low = _mm512_set1_epi32(0xff);
    x[0] = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, low));
    x[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, 8), low));
    x[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, 16), low));
    x[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 24));
}

// Transposes a 16 x 16 block held in 16 vectors.
REFRAG_SIMD_INLINE void transpose(Vec (&x)[16]) {
    Vec y[16];
    REFRAG_UNROLL
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    REFRAG_UNROLL
    for (int i = 0; i < 16; i += 4) {
        REFRAG_UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // x[4 g + c] now holds, in each 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c.
    REFRAG_UNROLL
    for (int c = 0; c < 4; ++c) {
        const Vec a = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88);
        const Vec b = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
        const Vec d = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd);
        const Vec e = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_f32x4(a, b, 0x88);
        y[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
        y[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
        y[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
    }
    REFRAG_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

}  // namespace refrag::avx512
