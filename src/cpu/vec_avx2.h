// The vector type that the simd_*.inl files are written over: 8 floats, AVX2 with FMA and F16C.
// Included by simd_avx2.cpp only. vec_avx512.h is the same list for 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd_unroll.h"

#define REFRAG_SIMD __attribute__((target("avx2,fma,f16c")))
#define REFRAG_SIMD_INLINE REFRAG_SIMD inline __attribute__((always_inline))

namespace refrag::avx2 {

using Vec = __m256;
using Mask = __m256;
inline constexpr int kLanes = 8;
inline constexpr int kAccumulators = 12;  // of 16 registers

// Lanes [0, n), for 0 <= n <= 8.
REFRAG_SIMD_INLINE __m256i first_lanes(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}

REFRAG_SIMD_INLINE Vec zero() {
    return _mm256_setzero_ps();
}
REFRAG_SIMD_INLINE Vec set1(float x) {
    return _mm256_set1_ps(x);
}
REFRAG_SIMD_INLINE Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
REFRAG_SIMD_INLINE void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x);
}
// The first n lanes (0 <= n <= kLanes); the others are 0, and their memory is not touched.
REFRAG_SIMD_INLINE Vec load_n(const float* p, int64_t n) {
    return _mm256_maskload_ps(p, first_lanes(n));
}
REFRAG_SIMD_INLINE void store_n(float* p, Vec x, int64_t n) {
    _mm256_maskstore_ps(p, first_lanes(n), x);
}

REFRAG_SIMD_INLINE Vec add(Vec a, Vec b) {
    return _mm256_add_ps(a, b);
}
REFRAG_SIMD_INLINE Vec sub(Vec a, Vec b) {
    return _mm256_sub_ps(a, b);
}
REFRAG_SIMD_INLINE Vec mul(Vec a, Vec b) {
    return _mm256_mul_ps(a, b);
}
REFRAG_SIMD_INLINE Vec div(Vec a, Vec b) {
    return _mm256_div_ps(a, b);
}
REFRAG_SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}  // a b + c
REFRAG_SIMD_INLINE Vec fma_minus(Vec a, Vec b, Vec c) {
    return _mm256_fmsub_ps(a, b, c);
}  // a b - c
REFRAG_SIMD_INLINE Vec fma_neg(Vec a, Vec b, Vec c) {
    return _mm256_fnmadd_ps(a, b, c);
}  // c - a b
// b where a is a NaN.
REFRAG_SIMD_INLINE Vec min(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
REFRAG_SIMD_INLINE Vec max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
REFRAG_SIMD_INLINE Vec abs(Vec x) {
    return _mm256_andnot_ps(set1(-0.0f), x);
}
REFRAG_SIMD_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm256_or_ps(abs(magnitude), _mm256_and_ps(set1(-0.0f), sign));
}
REFRAG_SIMD_INLINE Vec round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// p * 2^n rounded once, n whole in [-252, 254]: in two steps, for 2^n alone may be out of range.
REFRAG_SIMD_INLINE Vec scale_pow2(Vec p, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return mul(mul(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
REFRAG_SIMD_INLINE Mask less(Vec a, Vec b) {
    return _mm256_cmp_ps(a, b, _CMP_LT_OQ);
}
REFRAG_SIMD_INLINE Mask greater_equal(Vec a, Vec b) {
    return _mm256_cmp_ps(a, b, _CMP_GE_OQ);
}
REFRAG_SIMD_INLINE Vec select(Mask m, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, m);
}

REFRAG_SIMD_INLINE float first_lane(Vec x) {
    return _mm256_cvtss_f32(x);
}
// Sum or maximum of the lanes, halving: lane i with lane i + 4, then + 2, + 1.
REFRAG_SIMD_INLINE float sum_lanes(Vec x) {
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
REFRAG_SIMD_INLINE float max_lanes(Vec x) {
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

// Sums in double.
struct DoubleSum {
    __m256d low;
    __m256d high;
};
REFRAG_SIMD_INLINE DoubleSum double_zero() {
    return {_mm256_setzero_pd(), _mm256_setzero_pd()};
}
REFRAG_SIMD_INLINE void add_to(DoubleSum& sum, Vec x) {
    sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
REFRAG_SIMD_INLINE double total(const DoubleSum& sum) {
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(sum.low, sum.high));
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// 8 halves, widened.
REFRAG_SIMD_INLINE Vec load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 8 pairs of bf16, widened: the first and the second of each pair.
REFRAG_SIMD_INLINE void load_bf16_pairs(const uint16_t* p, Vec& first, Vec& second) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// 8 times 4 unsigned bytes: x[j] has the j-th byte of each.
REFRAG_SIMD_INLINE void load_bytes4(const uint8_t* p, Vec (&x)[4]) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                  low = _mm256_set1_epi32(0xff);
    x[0] = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, low));
    x[1] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(bytes, 8), low));
    x[2] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(bytes, 16), low));
    x[3] = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 24));
}

// Transposes an 8 x 8 block held in 8 vectors.
REFRAG_SIMD_INLINE void transpose(Vec (&x)[8]) {
    Vec y[8];
    REFRAG_UNROLL
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    REFRAG_UNROLL
    for (int i = 0; i < 8; i += 4) {
        REFRAG_UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m256d a = _mm256_castps_pd(y[i + j]), b = _mm256_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
    // x[4 g + c] now holds, in each 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c.
    REFRAG_UNROLL
    for (int c = 0; c < 4; ++c) {
        y[c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x20);
        y[4 + c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x31);
    }
    REFRAG_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = y[i];
}

}  // namespace refrag::avx2
