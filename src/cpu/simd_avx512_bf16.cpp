// Products of bf16 matrices with AVX-512's dot product of bf16 pairs. Empty on other processors than x86-64.
//
// A tile of sums is up to 8 rows x 3 panels: a k-pair of each row is broadcast from memory, a k-pair of 16
// columns is one vector. See Bf16Gemm for the operands.
#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/simd_int8_bf16.h"
#include "cpu/simd_unroll.h"
#include "cpu/x86_intrinsics.h"

#define REFRAG_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace refrag::avx512_bf16 {
namespace {

constexpr int64_t block_rows = 16;
constexpr int64_t max_rows = 8;  // of a tile of sums
// k of a piece: 3 panels of it are 24 KB, which stay in the first cache level while the rows pass.
constexpr int64_t piece_tiles = 8;

REFRAG_BF16 inline __attribute__((always_inline)) __m512bh broadcast_pair(const uint16_t* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

// Rows [0, R) of a block at `a`, panels [0, P) at `b`.
template <int R, int P>
REFRAG_BF16 void tile(const uint16_t* a, const uint16_t* b, int64_t b_stride, int64_t k_tiles,
                      const float* start, float* c, int64_t ldc, int64_t n_cols) {
    __m512 sum[R][P];
    __mmask16 columns[P];
    REFRAG_UNROLL
    for (int p = 0; p < P; ++p) {
        columns[p] = lanes_below(n_cols - p * kPanel);
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            sum[r][p] = start != nullptr ? _mm512_maskz_loadu_ps(columns[p], start + r * ldc + p * kPanel)
                                         : _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < k_tiles; ++k, a += kTileElements, b += kTileElements) {
        for (int64_t pair = 0; pair < kTileK; pair += 2) {
            __m512bh w[P];
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) {
                w[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + p * b_stride + pair * kPanel));
            }
            REFRAG_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m512bh x = broadcast_pair(a + r * kTileK + pair);
                REFRAG_UNROLL
                for (int p = 0; p < P; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], x, w[p]);
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
REFRAG_BF16 void tile_rows(int64_t rows, const uint16_t* a, const uint16_t* b, int64_t b_stride,
                           int64_t k_tiles, const float* start, float* c, int64_t ldc, int64_t n_cols) {
    switch (rows) {
        case 1:
            return tile<1, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
        case 2:
            return tile<2, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
        case 3:
            return tile<3, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
        case 4:
            return tile<4, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
        default:
            break;
    }
    if constexpr (P <= 3) {
        switch (rows) {
            case 5:
                return tile<5, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
            case 6:
                return tile<6, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
            case 7:
                return tile<7, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
            default:
                return tile<8, P>(a, b, b_stride, k_tiles, start, c, ldc, n_cols);
        }
    }
}

}  // namespace

REFRAG_BF16 void pack_bf16(uint16_t* block, const float* x, int64_t ldx, int64_t rows, int64_t k) {
    for (int64_t at = 0; at < k; at += kTileK, block += kTileElements) {
        const int64_t left = k - at;
        const __mmask16 low = lanes_below(left), high = lanes_below(left - 16);
        for (int64_t r = 0; r < block_rows; ++r) {
            __m512i pairs = _mm512_setzero_si512();
            if (r < rows) {
                const float* from = x + r * ldx + at;
                pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + 16),
                                                                      _mm512_maskz_loadu_ps(low, from)));
            }
            _mm512_storeu_si512(block + r * kTileK, pairs);
        }
    }
}

REFRAG_BF16 void widen_int8_bf16(uint16_t* tiles, const Int8Block* blocks, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b) widen_block(tiles + b * kTileElements, blocks[b]);
}

REFRAG_BF16 void gemm_bf16(const Bf16Gemm& g) {
    const int64_t n_panels = (g.n_cols + kPanel - 1) / kPanel;
    // More panels at once where the rows leave registers for them.
    const bool few = g.rows <= 4;
    const int64_t group = few ? 6 : 3;
    const int64_t piece = g.rows > 2 * block_rows ? piece_tiles : std::max<int64_t>(g.k_tiles, 1);
    for (int64_t p = 0; p < n_panels;) {
        const int64_t panels = std::min(group, n_panels - p);
        for (int64_t k = 0; k < g.k_tiles; k += piece) {
            const int64_t k_tiles = std::min(piece, g.k_tiles - k);
            const float* const begin = k > 0 ? g.c : g.start;
            for (int64_t r = 0; r < g.rows; r += max_rows) {
                const int64_t rows = std::min(max_rows, g.rows - r);
                const uint16_t* a =
                    g.a + r / block_rows * g.a_stride + r % block_rows * kTileK + k * kTileElements;
                const uint16_t* b = g.b + p * g.b_stride + k * kTileElements;
                float* c = g.c + r * g.ldc + p * kPanel;
                const float* start = begin != nullptr ? begin + r * g.ldc + p * kPanel : nullptr;
                const int64_t n_cols = g.n_cols - p * kPanel;
                if (panels == 6)
                    tile_rows<6>(rows, a, b, g.b_stride, k_tiles, start, c, g.ldc, n_cols);
                else if (panels >= 3)
                    tile_rows<3>(rows, a, b, g.b_stride, k_tiles, start, c, g.ldc, n_cols);
                else if (panels == 2)
                    tile_rows<2>(rows, a, b, g.b_stride, k_tiles, start, c, g.ldc, n_cols);
                else
                    tile_rows<1>(rows, a, b, g.b_stride, k_tiles, start, c, g.ldc, n_cols);
            }
        }
        p += panels == 6 ? 6 : panels >= 3 ? 3 : panels;
    }
}

}  // namespace refrag::avx512_bf16

#endif
