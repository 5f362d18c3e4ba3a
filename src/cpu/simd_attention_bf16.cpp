// Attention in bf16 on AVX-512: pages packed, the running softmax, and its products where there are no AMX
// tiles. Empty on other processors than x86-64. See attention_bf16.cpp for what is computed.
#if defined(__x86_64__)

#include "cpu/simd_attention_bf16.h"

#include <limits>

#include "cpu/simd_unroll.h"

namespace refrag::avx512_bf16 {

void gemm_bf16(const Bf16Gemm& g);

namespace {

// 2^f within 7.5e-5 relative for f in [0, 1): a minimax polynomial computed for this file.
constexpr float kExp2[4] = {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f};

// Transposes a 16 x 16 block of 32-bit lanes.
REFRAG_BF16_INLINE void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    REFRAG_UNROLL
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    REFRAG_UNROLL
    for (int i = 0; i < 16; i += 4) {
        REFRAG_UNROLL
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    }
    // x[4 g + c] now holds, in each 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c.
    REFRAG_UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        const __m512i e = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        y[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        y[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        y[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    REFRAG_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

struct Max {
    REFRAG_BF16_INLINE __m512 operator()(__m512 a, __m512 b) const { return _mm512_max_ps(a, b); }
};
struct Add {
    REFRAG_BF16_INLINE __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};

// Lane r: x[r]'s 16 lanes reduced, in the same order for every r.
template <typename Op>
REFRAG_BF16_INLINE __m512 reduce_rows(const __m512 (&x)[16]) {
    const Op op;
    __m512 a[8], b[4], c[2];
    REFRAG_UNROLL
    for (int i = 0; i < 8; ++i) {
        a[i] = op(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
    REFRAG_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                  _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    REFRAG_UNROLL
    for (int i = 0; i < 2; ++i) {
        c[i] = op(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                  _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    }
    return op(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// 2^x for x <= 0; -inf gives 0, NaN gives NaN.
REFRAG_BF16_INLINE __m512 exp2_below_1(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(kExp2[3]);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[2]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[1]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[0]));
    return _mm512_scalef_ps(p, x);  // takes x down to a whole number itself
}

REFRAG_BF16_INLINE __m512i to_bf16(__m512 low, __m512 high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 16 scores of a row from entry e on; -inf for those that it does not see.
template <bool partial>
REFRAG_BF16_INLINE __m512 score(const float* s, const int32_t* visible, int64_t r, int64_t e) {
    const __m512 x = _mm512_load_ps(s + r * kAttendEntries + e);
    if constexpr (!partial) return x;
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    return _mm512_mask_mov_ps(none, lanes_below(visible[r] - e), x);
}

// `partial`: some row does not see all entries.
template <bool partial>
REFRAG_BF16 void softmax(const float* s, int64_t rows, int64_t n_pages, const int32_t* visible, float* m,
                         float* l, float* acc, int64_t dim, uint16_t* p) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 lanes[16];
    for (int64_t r = 0; r < 16; ++r) lanes[r] = none;
    for (int64_t r = 0; r < rows; ++r) {
        __m512 low = none, high = none;
        for (int64_t e = 0; e < n_pages * kPageEntries; e += kPageEntries) {
            // The second operand where one is a NaN.
            low = _mm512_max_ps(score<partial>(s, visible, r, e), low);
            high = _mm512_max_ps(score<partial>(s, visible, r, e + 16), high);
        }
        lanes[r] = _mm512_max_ps(low, high);
    }
    const __m512 before = _mm512_loadu_ps(m);
    const __m512 largest =
        _mm512_roundscale_ps(reduce_rows<Max>(lanes), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    const __m512 after = _mm512_max_ps(largest, before);
    // While all scores are -inf, subtracting their maximum would make NaN of what may still become finite.
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(after, none, _CMP_NEQ_UQ), after);
    const __m512 keep = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_sub_ps(before, shift));
    alignas(64) float shifts[16], keeps[16];
    _mm512_store_ps(shifts, shift);
    _mm512_store_ps(keeps, keep);

    for (int64_t r = 0; r < 16; ++r) lanes[r] = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 row_shift = _mm512_set1_ps(shifts[r]);
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t i = 0; i < n_pages; ++i) {
            const __m512 a =
                exp2_below_1(_mm512_sub_ps(score<partial>(s, visible, r, i * kPageEntries), row_shift));
            const __m512 b =
                exp2_below_1(_mm512_sub_ps(score<partial>(s, visible, r, i * kPageEntries + 16), row_shift));
            low = _mm512_add_ps(low, a);
            high = _mm512_add_ps(high, b);
            _mm512_store_si512(p + i * kTileElements + r * kTileK, to_bf16(a, b));
        }
        lanes[r] = _mm512_add_ps(low, high);
    }
    _mm512_storeu_ps(l, _mm512_fmadd_ps(_mm512_loadu_ps(l), keep, reduce_rows<Add>(lanes)));
    _mm512_storeu_ps(m, after);

    // Before its first entry a row's sums are zeros.
    unsigned changed = _mm512_cmp_ps_mask(keep, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) &
                       _mm512_cmp_ps_mask(before, none, _CMP_NEQ_UQ) & lanes_below(rows);
    for (; changed != 0; changed &= changed - 1) {
        const int r = __builtin_ctz(changed);
        const __m512 factor = _mm512_set1_ps(keeps[r]);
        for (int64_t d = 0; d < dim; d += kPanel) {
            float* const at = acc + r * dim + d;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
        }
    }
}

}  // namespace

REFRAG_BF16 void softmax_rows(const Bf16Attend& a) {
    const int64_t entries = a.n_pages * kPageEntries;
    for (int64_t r = 0; r < a.rows; r += kPanel) {
        const int64_t rows = a.rows - r < kPanel ? a.rows - r : kPanel;
        if (a.hidden != nullptr) {
            for (int64_t i = r; i < r + rows; ++i)
                for (int64_t e = 0; e < a.hidden[i]; ++e)
                    a.s[i * kAttendEntries + e] = -std::numeric_limits<float>::infinity();
        }
        const __mmask16 present = lanes_below(rows);
        const __mmask16 all =
            _mm512_mask_cmpge_epi32_mask(present, _mm512_maskz_loadu_epi32(present, a.visible + r),
                                         _mm512_set1_epi32(static_cast<int32_t>(entries)));
        const auto run = all == present ? softmax<false> : softmax<true>;
        run(a.s + r * kAttendEntries, rows, a.n_pages, a.visible + r, a.m + r, a.l + r, a.acc + r * a.dim,
            a.dim, a.p + r * kAttendEntries);
    }
}

REFRAG_BF16 void attend_bf16(const Bf16Attend& a) {
    Bf16Gemm g{};
    g.rows = a.rows;
    for (int64_t i = 0; i < a.n_pages; ++i) {
        if (i < a.n_next) prefetch(a.next[i], kPageEntries * a.dim);
        g.a = a.q;
        g.a_stride = kPanel * a.dim;
        g.b = a.k[i];
        g.b_stride = kPanel * a.dim;
        g.c = a.s + i * kPageEntries;
        g.ldc = kAttendEntries;
        g.n_cols = kPageEntries;
        g.k_tiles = a.dim / kTileK;
        gemm_bf16(g);
    }
    softmax_rows(a);
    for (int64_t i = 0; i < a.n_pages; ++i) {
        if (i < a.n_next) prefetch(a.next[i] + kPageEntries * a.dim, kPageEntries * a.dim);
        g.a = a.p + i * kTileElements;
        g.a_stride = kPanel * kAttendEntries;
        g.b = a.v[i];
        g.b_stride = kTileElements;
        g.c = a.acc;
        g.ldc = a.dim;
        g.n_cols = a.dim;
        g.k_tiles = 1;
        g.start = a.acc;
        gemm_bf16(g);
    }
}

REFRAG_BF16 void pack_kv(uint16_t* page, int64_t first, int64_t n, const float* k, int64_t ldk,
                         const float* v, int64_t ldv, int64_t dim) {
    // K: 16 entries' pairs of dimensions, transposed.
    for (int64_t panel = first / kPanel; panel * kPanel < first + n; ++panel) {
        const int64_t begin = panel * kPanel;  // its first entry
        const __mmask16 entries =
            lanes_below(first + n - begin) & static_cast<__mmask16>(~lanes_below(first - begin));
        for (int64_t d = 0; d < dim; d += kTileK) {
            __m512i x[16];
            for (int64_t i = 0; i < 16; ++i) {
                x[i] = _mm512_setzero_si512();
                if ((entries >> i & 1) == 0) continue;
                const float* const from = k + (begin + i - first) * ldk + d;
                x[i] = to_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
            }
            transpose(x);
            uint16_t* const to = page + panel * kPanel * dim + d * kPanel;
            REFRAG_UNROLL
            for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(to + i * 2 * kPanel, entries, x[i]);
        }
    }
    // V: two entries side by side.
    uint16_t* const values = page + kPageEntries * dim;
    for (int64_t e = first / 2 * 2; e < first + n; e += 2) {
        const bool has_even = e >= first, has_odd = e + 1 < first + n;
        const __mmask32 parts = (has_even ? 0x55555555u : 0u) | (has_odd ? 0xaaaaaaaau : 0u);
        const float* const even = v + (has_even ? e - first : 0) * ldv;
        const float* const odd = v + (has_odd ? e + 1 - first : n - 1) * ldv;
        for (int64_t d = 0; d < dim; d += kPanel) {
            const __m512i both = to_bf16(_mm512_loadu_ps(even + d), _mm512_loadu_ps(odd + d));
            const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
            const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
            _mm512_mask_storeu_epi16(values + d / kPanel * kTileElements + e * kPanel, parts,
                                     _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

}  // namespace refrag::avx512_bf16

#endif
