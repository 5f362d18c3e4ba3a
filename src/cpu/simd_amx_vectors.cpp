// Products of one or two rows of bf16 as AMX computes them, on vector units: weights pass once, as fast as
// memory gives them, and tile loads take them at .9 of that. Empty on other processors than x86-64.
//
// What a tile product adds to a sum, by Intel's definition: of 32 k, the even ones and the odd ones are added
// up apart, each product by a fused multiply-add from 0 on; then the two, and then that to the sum. All of it
// rounds to nearest, takes subnormal numbers as 0 and makes none.
#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "cpu/simd_amx.h"
#include "cpu/simd_unroll.h"

namespace refrag::amx {
namespace {

// Panels at once: their streams hide each other's waiting.
constexpr int64_t max_panels = 4;
// How many tiles of each panel ahead weights are asked for; beyond a panel's end come the panels that are
// next.
constexpr int64_t ahead_tiles = 2;
constexpr int64_t pairs = kTileK / 2;
constexpr unsigned flush_subnormals = 0x8040;  // FTZ and DAZ of MXCSR

// x[row][k] widened, of rows that follow each other.
template <int R, int P>
REFRAG_AMX void multiply(const Bf16Gemm& g, const float* x, const uint16_t* b, float* c, int64_t n_cols) {
    __m512 sum[R][P];
    __mmask16 columns[P];
    REFRAG_UNROLL
    for (int p = 0; p < P; ++p) {
        columns[p] = static_cast<__mmask16>((1u << std::min(kPanel, n_cols - p * kPanel)) - 1u);
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            sum[r][p] = g.accumulate ? _mm512_maskz_loadu_ps(columns[p], c + r * g.ldc + p * kPanel)
                                     : _mm512_setzero_ps();
        }
    }
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t k = 0; k < g.k_tiles; ++k, b += kTileElements, x += kTileK) {
        const int64_t next = k + ahead_tiles - g.k_tiles;
        const uint16_t* const ahead =
            b + ahead_tiles * kTileElements + (next < 0 ? 0 : P * g.b_stride - g.k_tiles * kTileElements);
        __m512 even_sum[R][P], odd_sum[R][P];
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) even_sum[r][p] = odd_sum[r][p] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < pairs; ++i) {
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) {
                const int64_t line = p * g.b_stride + i * 2 * kPanel;
                _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
                const __m512i w = _mm512_loadu_si512(b + line);
                const __m512 w_even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
                const __m512 w_odd = _mm512_castsi512_ps(_mm512_and_si512(w, odd));
                REFRAG_UNROLL
                for (int r = 0; r < R; ++r) {
                    const float* const pair = x + r * g.k_tiles * kTileK + 2 * i;
                    even_sum[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(pair[0]), w_even, even_sum[r][p]);
                    odd_sum[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(pair[1]), w_odd, odd_sum[r][p]);
                }
            }
        }
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) {
                sum[r][p] = _mm512_add_ps(sum[r][p], _mm512_add_ps(even_sum[r][p], odd_sum[r][p]));
            }
        }
    }
    REFRAG_UNROLL
    for (int p = 0; p < P; ++p) {
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            _mm512_mask_storeu_ps(c + r * g.ldc + p * kPanel, columns[p], sum[r][p]);
        }
    }
}

template <int R>
REFRAG_AMX __attribute__((noinline)) void multiply_all(const Bf16Gemm& g, const float* x) {
    const int64_t n_panels = (g.n_cols + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < n_panels;) {
        const uint16_t* const b = g.b + p * g.b_stride;
        float* const c = g.c + p * kPanel;
        const int64_t n_cols = g.n_cols - p * kPanel;
        if (n_panels - p >= max_panels) {
            multiply<R, max_panels>(g, x, b, c, n_cols);
            p += max_panels;
        } else if (n_panels - p >= 2) {
            multiply<R, 2>(g, x, b, c, n_cols);
            p += 2;
        } else {
            multiply<R, 1>(g, x, b, c, n_cols);
            p += 1;
        }
    }
}

}  // namespace

void gemm_bf16_vectors(const Bf16Gemm& g) {
    alignas(64) float x[vector_rows * vector_k_tiles * kTileK];
    for (int64_t r = 0; r < g.rows; ++r) {
        for (int64_t k = 0; k < g.k_tiles; ++k) {
            const uint16_t* const from = g.a + k * kTileElements + r * kTileK;
            float* const to = x + (r * g.k_tiles + k) * kTileK;
            for (int64_t i = 0; i < kTileK; ++i) to[i] = bf16_to_f32(from[i]);
        }
    }
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | flush_subnormals);
    g.rows == 1 ? multiply_all<1>(g, x) : multiply_all<2>(g, x);
    _mm_setcsr(before);
}

}  // namespace refrag::amx

#endif
