// Products of few rows of bf16 with 8-bit weights on AMX tiles. Weights are widened to bf16 while the tiles
// before them are multiplied, so that the vector units and the tile unit work at the same time. Widening
// takes longest. The sums are, bit for bit, those of gemm_bf16 with the weights widened before. Empty on
// other processors than x86-64.
#if defined(__x86_64__)

#include <algorithm>

#include "cpu/simd_amx.h"
#include "cpu/simd_int8_bf16.h"

namespace refrag::amx {
namespace {

// Widened tiles of each panel at a time: a tile is loaded when its stores have left for the cache, some tiles
// later.
constexpr int64_t ring_tiles = 4;
constexpr int64_t lag = 2;
// How many blocks of each panel ahead weights are asked for: the stores of widening fill the window before
// the next loads enter it. Beyond a panel's end come the panels that are next.
constexpr int64_t ahead_blocks = 8;

// The sums of R blocks of 16 rows x P panels, R and P in 1, 2.
template <int R, int P>
REFRAG_AMX void multiply(const Int8Bf16Gemm& g, const Int8Block* b, float* sums) {
    alignas(64) uint16_t ring[ring_tiles * P * kTileElements];
    _tile_zero(0);
    if constexpr (P == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && P == 2) _tile_zero(3);
    for (int64_t k = 0; k < g.k_tiles + lag; ++k) {
        if (k < g.k_tiles) {
            uint16_t* const to = ring + k % ring_tiles * P * kTileElements;
            const int64_t next = k + ahead_blocks;
            const Int8Block* const ahead =
                next < g.k_tiles ? b + next : b + P * g.b_stride + (next - g.k_tiles);
            REFRAG_UNROLL
            for (int p = 0; p < P; ++p) {
                const char* const line = reinterpret_cast<const char*>(ahead + p * g.b_stride);
                REFRAG_UNROLL
                for (int64_t i = 0; i <= static_cast<int64_t>(sizeof(Int8Block)); i += 64) {
                    _mm_prefetch(line + i, _MM_HINT_T1);
                }
                avx512_bf16::widen_block(to + p * kTileElements, b[p * g.b_stride + k]);
            }
        }
        if (k < lag) continue;
        const uint16_t* const from = ring + (k - lag) % ring_tiles * P * kTileElements;
        const uint16_t* const a = g.a + (k - lag) * kTileElements;
        _tile_loadd(6, from, tile_row_bytes);
        _tile_loadd(4, a, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, from + kTileElements, tile_row_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, a + g.a_stride, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
    }
    store_sums<R, P>(sums);
}

}  // namespace

REFRAG_AMX void gemm_int8_bf16(const Int8Bf16Gemm& g) {
    alignas(64) float sums[4 * tile_floats];
    _tile_loadconfig(&whole_tiles);
    for (int64_t column = 0; column < g.n_cols; column += 2 * kPanel) {
        const Int8Block* const b = g.b + column / kPanel * g.b_stride;
        const int64_t columns = std::min(2 * kPanel, g.n_cols - column);
        const bool two = columns > kPanel;
        if (g.rows > kPanel) {
            two ? multiply<2, 2>(g, b, sums) : multiply<2, 1>(g, b, sums);
        } else {
            two ? multiply<1, 2>(g, b, sums) : multiply<1, 1>(g, b, sums);
        }
        for (int64_t r = 0; r < g.rows; ++r) {
            for (int64_t n = 0; n < columns; n += kPanel) {
                const float* const from = sums + (r / kPanel * 2 + n / kPanel) * tile_floats;
                const auto lanes = lanes_below(columns - n);
                _mm512_mask_storeu_ps(g.c + r * g.ldc + column + n, lanes,
                                      _mm512_load_ps(from + r % kPanel * kPanel));
            }
        }
    }
    _tile_release();
}

}  // namespace refrag::amx

#endif
