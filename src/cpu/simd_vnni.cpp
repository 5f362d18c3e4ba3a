// Products of activations and weights of 8 bits with AVX-512's dot products of bytes (VNNI). Empty on other
// processors than x86-64.
//
// A tile of sums is up to 6 rows x 2 panels, or 2 rows x 4: for each group of 32 k, whole numbers add up in
// one set of registers, and their products with both scales in another. See Int8Gemm.
#if defined(__x86_64__)

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/simd_unroll.h"
#include "cpu/x86_intrinsics.h"

#define REFRAG_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace refrag::vnni {
namespace {

constexpr int64_t max_rows = 6;
constexpr int64_t few_rows = 2;
// Groups of a piece: 2 panels of it are 17 KB, which stay in the first cache level while the rows pass.
constexpr int64_t piece_groups = 16;

REFRAG_VNNI inline __attribute__((always_inline)) __m512i broadcast_four(const int8_t* q) {
    int32_t four;
    std::memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
}

template <int R, int P>
REFRAG_VNNI void tile(const Int8Group* a, int64_t a_stride, const Int8Block* b, int64_t b_stride,
                      int64_t n_groups, float* c, int64_t ldc, int64_t n_cols, bool accumulate) {
    __m512 sum[R][P];
    __mmask16 columns[P];
    REFRAG_UNROLL
    for (int p = 0; p < P; ++p) {
        columns[p] = lanes_below(n_cols - p * kPanel);
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            sum[r][p] = accumulate ? _mm512_maskz_loadu_ps(columns[p], c + r * ldc + p * kPanel)
                                   : _mm512_setzero_ps();
        }
    }
    for (int64_t g = 0; g < n_groups; ++g, ++a, ++b) {
        __m512i dot[R][P];
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) dot[r][p] = _mm512_set1_epi32(a[r * a_stride].start);
        }
        REFRAG_UNROLL
        for (int i = 0; i < kInt8Group / 4; ++i) {
            __m512i w[P];
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_si512(b[p * b_stride].q[i]);
            REFRAG_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m512i x = broadcast_four(a[r * a_stride].q + 4 * i);
                REFRAG_UNROLL
                for (int p = 0; p < P; ++p) dot[r][p] = _mm512_dpbusd_epi32(dot[r][p], w[p], x);
            }
        }
        __m512 scale[P];
        REFRAG_UNROLL
        for (int p = 0; p < P; ++p) {
            scale[p] = _mm512_maskz_cvtph_ps(
                0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b[p * b_stride].scale)));
        }
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            const __m512 a_scale = _mm512_set1_ps(a[r * a_stride].scale);
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) {
                sum[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][p]), _mm512_mul_ps(a_scale, scale[p]),
                                            sum[r][p]);
            }
        }
    }
    REFRAG_UNROLL
    for (int p = 0; p < P; ++p) {
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            _mm512_mask_storeu_ps(c + r * ldc + p * kPanel, columns[p], sum[r][p]);
        }
    }
}

template <int P>
REFRAG_VNNI void tile_rows(int64_t rows, const Int8Group* a, int64_t a_stride, const Int8Block* b,
                           int64_t b_stride, int64_t n_groups, float* c, int64_t ldc, int64_t n_cols,
                           bool accumulate) {
    switch (rows) {
        case 1:
            return tile<1, P>(a, a_stride, b, b_stride, n_groups, c, ldc, n_cols, accumulate);
        case 2:
            return tile<2, P>(a, a_stride, b, b_stride, n_groups, c, ldc, n_cols, accumulate);
        default:
            break;
    }
    if constexpr (P <= 2) {
        switch (rows) {
            case 3:
                return tile<3, P>(a, a_stride, b, b_stride, n_groups, c, ldc, n_cols, accumulate);
            case 4:
                return tile<4, P>(a, a_stride, b, b_stride, n_groups, c, ldc, n_cols, accumulate);
            case 5:
                return tile<5, P>(a, a_stride, b, b_stride, n_groups, c, ldc, n_cols, accumulate);
            default:
                return tile<6, P>(a, a_stride, b, b_stride, n_groups, c, ldc, n_cols, accumulate);
        }
    }
}

}  // namespace

REFRAG_VNNI void quantize_groups(Int8Group* out, const float* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (; n > 0; n -= kInt8Group, x += kInt8Group, ++out) {
        const __mmask32 lanes = n >= kInt8Group ? 0xffffffffu : (1u << n) - 1u;
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), x);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), x + 16);
        const __m512i bits =
            _mm512_maskz_max_epu32(0xffff, _mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                   _mm512_and_si512(_mm512_castps_si512(high), magnitude));
        const uint32_t largest_bits = _mm512_reduce_max_epu32(bits);
        float largest;
        std::memcpy(&largest, &largest_bits, sizeof largest);
        if (largest_bits >= 0x7f800000u || largest < 0x1p-100f) {
            std::memset(out->q, 0, sizeof out->q);
            out->scale = largest < 0x1p-100f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
            out->start = 0;
            continue;
        }
        const __m512 per_unit = _mm512_set1_ps(127.0f / largest);
        const __m512i q0 = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(low, per_unit));
        const __m512i q1 = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(high, per_unit));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out->q), _mm512_maskz_cvtepi32_epi8(0xffff, q0));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out->q + 16), _mm512_maskz_cvtepi32_epi8(0xffff, q1));
        out->scale = largest / 127.0f;
        out->start = -kInt8Zero * _mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1));
    }
}

REFRAG_VNNI void gemm_int8(const Int8Gemm& g) {
    const int64_t n_panels = (g.n_cols + kPanel - 1) / kPanel;
    const int64_t unit = g.rows <= few_rows ? 4 : 2;
    // Few rows pass too fast for a piece to pay.
    const int64_t piece = g.rows > 2 * max_rows ? piece_groups : std::max<int64_t>(g.n_groups, 1);
    for (int64_t p = 0; p < n_panels;) {
        const int64_t panels = n_panels - p >= unit ? unit : n_panels - p >= 2 ? 2 : 1;
        int64_t group = 0;
        do {
            const int64_t n_groups = std::min(piece, g.n_groups - group);
            const bool accumulate = g.accumulate || group > 0;
            for (int64_t r = 0; r < g.rows; r += max_rows) {
                const int64_t rows = std::min(max_rows, g.rows - r);
                const Int8Group* const a = g.a + r * g.a_stride + group;
                const Int8Block* const b = g.b + p * g.b_stride + group;
                float* const c = g.c + r * g.ldc + p * kPanel;
                const int64_t n_cols = g.n_cols - p * kPanel;
                if (panels == 4)
                    tile_rows<4>(rows, a, g.a_stride, b, g.b_stride, n_groups, c, g.ldc, n_cols, accumulate);
                else if (panels == 2)
                    tile_rows<2>(rows, a, g.a_stride, b, g.b_stride, n_groups, c, g.ldc, n_cols, accumulate);
                else
                    tile_rows<1>(rows, a, g.a_stride, b, g.b_stride, n_groups, c, g.ldc, n_cols, accumulate);
            }
            group += piece;
        } while (group < g.n_groups);
        p += panels;
    }
}

}  // namespace refrag::vnni

#endif
