// Products of bf16 matrices on AMX tiles. Empty on other processors than x86-64.
//
// Four accumulators of 16 x 16 (32 rows x 32 columns) take two tiles of each operand per 32 k. The tile unit
// needs 64 cycles for them, and the four loads as many at the second cache level's speed; so the right
// operand is cut into pieces of k that stay in the first level while the rows pass, and the sums wait
// meanwhile.
#if defined(__x86_64__)

#include <algorithm>

#include "cpu/simd_amx.h"

namespace refrag::amx {
namespace {

constexpr int64_t block_rows = 16;
// k of a piece: 2 panels of it are 16 KB.
constexpr int64_t piece_tiles = 8;
// Rows whose sums wait between pieces: 32 KB of them.
constexpr int64_t chunk_rows = 256;
constexpr int64_t tile_floats = block_rows * kPanel;

// A stretch of the right operand's next two panels, to be asked for meanwhile: weights come from memory or
// the last cache level, and tile loads do not announce themselves.
struct Ahead {
    const uint16_t* panels;  // the first of them
    int64_t stride;          // from it to the other
    int64_t line;            // the stretch in cache lines, counted through both panels
    int64_t end;
    int64_t lines;  // of one panel

    REFRAG_AMX void ask(int64_t n) {
        for (const int64_t stop = std::min(end, line + n); line < stop; ++line) {
            const uint16_t* panel = panels + (line >= lines ? stride : 0);
            _mm_prefetch(reinterpret_cast<const char*>(panel) + line % lines * 64, _MM_HINT_T1);
        }
    }
};

// Sums of R x P blocks (R, P in 1, 2), as R * P tiles at `sums`.
template <int R, int P>
REFRAG_AMX void add_piece(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                          int64_t k_tiles, float* sums, bool begin, Ahead ahead) {
    const int64_t ask = k_tiles > 0 ? (ahead.end - ahead.line + k_tiles - 1) / k_tiles : 0;
    if (begin) {
        _tile_zero(0);
        if constexpr (P == 2) _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2 && P == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, tile_row_bytes);
        if constexpr (P == 2) _tile_loadd(1, sums + tile_floats, tile_row_bytes);
        if constexpr (R == 2) _tile_loadd(2, sums + 2 * tile_floats, tile_row_bytes);
        if constexpr (R == 2 && P == 2) _tile_loadd(3, sums + 3 * tile_floats, tile_row_bytes);
    }
    for (int64_t k = 0; k < k_tiles; ++k, a += kTileElements, b += kTileElements) {
        ahead.ask(ask);
        _tile_loadd(6, b, tile_row_bytes);
        _tile_loadd(4, a, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, b + b_stride, tile_row_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, a + a_stride, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, tile_row_bytes);
    if constexpr (P == 2) _tile_stored(1, sums + tile_floats, tile_row_bytes);
    if constexpr (R == 2) _tile_stored(2, sums + 2 * tile_floats, tile_row_bytes);
    if constexpr (R == 2 && P == 2) _tile_stored(3, sums + 3 * tile_floats, tile_row_bytes);
}

REFRAG_AMX void add_piece(int row_blocks, int panels, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                          int64_t b_stride, int64_t k_tiles, float* sums, bool begin, const Ahead& ahead) {
    if (row_blocks == 2)
        return panels == 2 ? add_piece<2, 2>(a, a_stride, b, b_stride, k_tiles, sums, begin, ahead)
                           : add_piece<2, 1>(a, a_stride, b, b_stride, k_tiles, sums, begin, ahead);
    return panels == 2 ? add_piece<1, 2>(a, a_stride, b, b_stride, k_tiles, sums, begin, ahead)
                       : add_piece<1, 1>(a, a_stride, b, b_stride, k_tiles, sums, begin, ahead);
}

// One tile of sums between its place in c and its own: the first rows and columns of it.
REFRAG_AMX void read_sums(float* tile, const float* c, int64_t ldc, int64_t rows, __mmask16 columns) {
    for (int64_t r = 0; r < rows; ++r) {
        _mm512_store_ps(tile + r * kPanel, _mm512_maskz_loadu_ps(columns, c + r * ldc));
    }
}
REFRAG_AMX void write_sums(float* c, int64_t ldc, const float* tile, int64_t rows, __mmask16 columns) {
    for (int64_t r = 0; r < rows; ++r) {
        _mm512_mask_storeu_ps(c + r * ldc, columns, _mm512_load_ps(tile + r * kPanel));
    }
}

}  // namespace

REFRAG_AMX void gemm_bf16(const Bf16Gemm& g) {
    if (g.rows <= vector_rows && g.k_tiles <= vector_k_tiles) return gemm_bf16_vectors(g);
    alignas(64) float sums[chunk_rows * 2 * kPanel];
    _tile_loadconfig(&whole_tiles);
    const int64_t n_panels = (g.n_cols + kPanel - 1) / kPanel;
    for (int64_t chunk = 0; chunk < g.rows; chunk += chunk_rows) {
        const int64_t rows = std::min(chunk_rows, g.rows - chunk);
        const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
        // Few rows pass too fast for a piece to pay.
        const int64_t piece = row_blocks > 2 ? piece_tiles : std::max<int64_t>(g.k_tiles, 1);
        for (int64_t p = 0; p < n_panels; p += 2) {
            const int panels = n_panels - p > 1 ? 2 : 1;
            // Few rows read the weights as fast as they come: asking would only cost.
            const int64_t asked = row_blocks >= 8 ? std::clamp<int64_t>(n_panels - p - 2, 0, 2) : 0;
            Ahead ahead{asked > 0 ? g.b + (p + 2) * g.b_stride : nullptr, g.b_stride, 0, 0,
                        g.k_tiles * kTileElements / 32};
            const int64_t lines = asked * ahead.lines;
            const int64_t calls = (row_blocks + 1) / 2 * ((g.k_tiles + piece - 1) / piece);
            int64_t call = 0;
            for (int64_t k = 0; k < g.k_tiles; k += piece) {
                const bool first = k == 0, last = k + piece >= g.k_tiles;
                for (int64_t r = 0; r < row_blocks; r += 2) {
                    const int n = row_blocks - r > 1 ? 2 : 1;
                    float* const tiles = sums + r * 2 * tile_floats;
                    const auto each_tile = [&](auto&& move) {
                        for (int i = 0; i < n; ++i) {
                            for (int j = 0; j < panels; ++j) {
                                const int64_t row = (r + i) * block_rows, column = (p + j) * kPanel;
                                const int64_t columns = std::min(kPanel, g.n_cols - column);
                                move(tiles + (2 * i + j) * tile_floats, g.c + (chunk + row) * g.ldc + column,
                                     std::min(block_rows, rows - row), lanes_below(columns));
                            }
                        }
                    };
                    if (first && g.accumulate) {
                        each_tile([&](float* tile, const float* c, int64_t n_rows, __mmask16 columns) {
                            read_sums(tile, c, g.ldc, n_rows, columns);
                        });
                    }
                    ahead.line = lines * call / calls;
                    ahead.end = lines * ++call / calls;
                    add_piece(n, panels, g.a + (chunk / block_rows + r) * g.a_stride + k * kTileElements,
                              g.a_stride, g.b + p * g.b_stride + k * kTileElements, g.b_stride,
                              std::min(piece, g.k_tiles - k), tiles, first && !g.accumulate, ahead);
                    if (last) {
                        each_tile([&](const float* tile, float* c, int64_t n_rows, __mmask16 columns) {
                            write_sums(c, g.ldc, tile, n_rows, columns);
                        });
                    }
                }
            }
        }
    }
    _tile_release();
}

}  // namespace refrag::amx

#endif
