// Products of one or two rows of bf16 as AMX computes them, on vector units: weights pass once, as fast as
// memory gives them, and tile loads take them at .9 of that. Empty on other processors than x86-64.
#if defined(__x86_64__)

#include <algorithm>

#include "cpu/simd_amx_vectors.h"

namespace refrag::amx {
namespace {

// Panels at once: their streams hide each other's waiting.
constexpr int64_t max_panels = 4;
// How many tiles of each panel ahead weights are asked for; beyond a panel's end come the panels that are
// next.
constexpr int64_t ahead_tiles = 2;

// x[row][k] widened, of rows that follow each other.
template <int R, int P>
REFRAG_AMX void multiply(const Bf16Gemm& g, const float* x, const uint16_t* b, const float* start, float* c,
                         int64_t n_cols) {
    __m512 sum[R][P];
    __mmask16 columns[P];
    REFRAG_UNROLL
    for (int p = 0; p < P; ++p) {
        columns[p] = lanes_below(n_cols - p * kPanel);
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            sum[r][p] = start != nullptr ? _mm512_maskz_loadu_ps(columns[p], start + r * g.ldc + p * kPanel)
                                         : _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < g.k_tiles; ++k, b += kTileElements, x += kTileK) {
        const int64_t next = k + ahead_tiles - g.k_tiles;
        const uint16_t* const ahead =
            b + ahead_tiles * kTileElements + (next < 0 ? 0 : P * g.b_stride - g.k_tiles * kTileElements);
        add_tile<R, P>(sum, x, g.k_tiles * kTileK, b, g.b_stride, ahead);
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
        const float* const start = g.start != nullptr ? g.start + p * kPanel : nullptr;
        const int64_t n_cols = g.n_cols - p * kPanel;
        if (n_panels - p >= max_panels) {
            multiply<R, max_panels>(g, x, b, start, c, n_cols);
            p += max_panels;
        } else if (n_panels - p >= 2) {
            multiply<R, 2>(g, x, b, start, c, n_cols);
            p += 2;
        } else {
            multiply<R, 1>(g, x, b, start, c, n_cols);
            p += 1;
        }
    }
}

}  // namespace

void gemm_bf16_vectors(const Bf16Gemm& g) {
    alignas(64) float x[vector_rows * vector_k_tiles * kTileK];
    for (int64_t r = 0; r < g.rows; ++r) widen_row(x + r * g.k_tiles * kTileK, g.a, r, g.k_tiles);
    const FlushSubnormals flush;
    g.rows == 1 ? multiply_all<1>(g, x) : multiply_all<2>(g, x);
}

}  // namespace refrag::amx

#endif
