// Products of bf16 matrices on AMX tiles. Empty on other processors than x86-64.
//
// Four accumulators of 16 x 16 (32 rows x 32 columns) take two tiles of each operand per 32 k. The tile unit
// needs 64 cycles for them. The four loads need as many at the second cache level's speed, which leaves no
// room. So the right operand is cut into pieces of k that stay in the first level while the rows pass; the
// sums wait meanwhile.
#if defined(__x86_64__)

#include <algorithm>

#include "cpu/simd_amx.h"

namespace refrag::avx512 {
void silu_mul(float* gate, const float* up, int64_t n);
}

namespace refrag::amx {
namespace {

constexpr int64_t block_rows = 16;
// k of a piece: 2 panels of it are 16 KB.
constexpr int64_t piece_tiles = 8;
// Rows whose sums wait between pieces: 32 KB of them.
constexpr int64_t chunk_rows = 256;

// A stretch of the right operand's next two panels, to be asked for meanwhile: weights come from memory or
// the last cache level, and tile loads do not announce themselves.
struct Ahead {
    const uint16_t* panels[2];
    int64_t line;  // the stretch in cache lines, counted through both panels
    int64_t end;
    int64_t lines;  // of one panel

    REFRAG_AMX void ask(int64_t n) {
        for (const int64_t stop = std::min(end, line + n); line < stop; ++line) {
            const uint16_t* panel = panels[line >= lines];
            _mm_prefetch(reinterpret_cast<const char*>(panel) + line % lines * 64, _MM_HINT_T1);
        }
    }
};

// Sums of R x P blocks (R, P in 1, 2), as R * P tiles at `sums`. The second panel is at b2.
template <int R, int P>
REFRAG_AMX void add_piece(const uint16_t* a, int64_t a_stride, const uint16_t* b, const uint16_t* b2,
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
    for (int64_t k = 0; k < k_tiles; ++k, a += kTileElements, b += kTileElements, b2 += kTileElements) {
        ahead.ask(ask);
        _tile_loadd(6, b, tile_row_bytes);
        _tile_loadd(4, a, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, b2, tile_row_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, a + a_stride, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
    }
    store_sums<R, P>(sums);
}

REFRAG_AMX void add_piece(int row_blocks, int panels, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                          const uint16_t* b2, int64_t k_tiles, float* sums, bool begin, const Ahead& ahead) {
    if (row_blocks == 2)
        return panels == 2 ? add_piece<2, 2>(a, a_stride, b, b2, k_tiles, sums, begin, ahead)
                           : add_piece<2, 1>(a, a_stride, b, b2, k_tiles, sums, begin, ahead);
    return panels == 2 ? add_piece<1, 2>(a, a_stride, b, b2, k_tiles, sums, begin, ahead)
                       : add_piece<1, 1>(a, a_stride, b, b2, k_tiles, sums, begin, ahead);
}

// One tile of sums between its place in memory and its own: the first rows and columns of it.
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
REFRAG_AMX void add_sums(float* c, int64_t ldc, const float* tile, int64_t rows, __mmask16 columns) {
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 x = _mm512_maskz_loadu_ps(columns, c + r * ldc);
        _mm512_mask_storeu_ps(c + r * ldc, columns, _mm512_add_ps(x, _mm512_load_ps(tile + r * kPanel)));
    }
}

}  // namespace

// A step takes two panels: columns that follow each other, or (silu_mul) the same columns of two products.
REFRAG_AMX void gemm_bf16(const Bf16Gemm& g) {
    if (g.rows <= vector_rows && g.k_tiles <= vector_k_tiles) return gemm_bf16_vectors(g);
    alignas(64) float sums[chunk_rows * 2 * kPanel];
    _tile_loadconfig(&whole_tiles);
    const bool paired = g.epilogue == Epilogue::silu_mul;
    const int64_t n_panels = (g.n_cols + kPanel - 1) / kPanel, step = paired ? 1 : 2;
    const auto panel = [&](int64_t p, int j, const uint16_t* up, const uint16_t* b) {
        return paired && j == 1 ? up + p * g.b_stride : b + (p + j) * g.b_stride;
    };
    for (int64_t chunk = 0; chunk < g.rows; chunk += chunk_rows) {
        const int64_t rows = std::min(chunk_rows, g.rows - chunk);
        const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
        // Few rows pass too fast for a piece to pay.
        const int64_t piece = row_blocks > 2 ? piece_tiles : std::max<int64_t>(g.k_tiles, 1);
        for (int64_t p = 0; p < n_panels; p += step) {
            const int panels = paired || n_panels - p > 1 ? 2 : 1;
            // Few rows read the weights as fast as they come: asking would only cost.
            const int64_t left = n_panels - p - step;
            const int64_t asked = row_blocks < 8 || left <= 0 ? 0 : paired ? 2 : std::min<int64_t>(left, 2);
            Ahead ahead{{}, 0, 0, g.k_tiles * kTileElements / 32};
            for (int j = 0; j < asked; ++j) ahead.panels[j] = panel(p + step, j, g.up_b, g.b);
            const int64_t lines = asked * ahead.lines;
            const int64_t calls = (row_blocks + 1) / 2 * ((g.k_tiles + piece - 1) / piece);
            int64_t call = 0;
            for (int64_t k = 0; k < g.k_tiles; k += piece) {
                const bool first = k == 0, last = k + piece >= g.k_tiles;
                for (int64_t r = 0; r < row_blocks; r += 2) {
                    const int n = row_blocks - r > 1 ? 2 : 1;
                    float* const tiles = sums + r * 2 * tile_floats;
                    // move(tile, where in memory, rows, columns) for the tile of row block i and panel j.
                    const auto each_tile = [&](auto&& move) {
                        for (int i = 0; i < n; ++i) {
                            for (int j = 0; j < panels; ++j) {
                                const int64_t row = (r + i) * block_rows;
                                const int64_t column = (p + (paired ? 0 : j)) * kPanel;
                                move(tiles + (2 * i + j) * tile_floats, (chunk + row) * g.ldc + column,
                                     std::min(block_rows, rows - row), lanes_below(g.n_cols - column), j);
                            }
                        }
                    };
                    if (first && g.start != nullptr) {
                        each_tile([&](float* tile, int64_t at, int64_t n_rows, __mmask16 columns, int j) {
                            const float* const from = paired && j == 1 ? g.up_start : g.start;
                            read_sums(tile, from + at, g.ldc, n_rows, columns);
                        });
                    }
                    if (last && g.epilogue == Epilogue::add) {
                        each_tile([&](float*, int64_t to, int64_t n_rows, __mmask16, int) {
                            for (int64_t i = 0; i < n_rows; ++i) {
                                _mm_prefetch(reinterpret_cast<const char*>(g.c + to + i * g.ldc),
                                             _MM_HINT_T0);
                            }
                        });
                    }
                    ahead.line = lines * call / calls;
                    ahead.end = lines * ++call / calls;
                    const int64_t at = k * kTileElements;
                    add_piece(n, panels, g.a + (chunk / block_rows + r) * g.a_stride + at, g.a_stride,
                              panel(p, 0, g.up_b, g.b) + at, panel(p, panels - 1, g.up_b, g.b) + at,
                              std::min(piece, g.k_tiles - k), tiles, first && g.start == nullptr, ahead);
                    if (!last) continue;
                    each_tile([&](float* tile, int64_t to, int64_t n_rows, __mmask16 columns, int j) {
                        if (paired && j == 0) avx512::silu_mul(tile, tile + tile_floats, tile_floats);
                        if (g.epilogue == Epilogue::add)
                            add_sums(g.c + to, g.ldc, tile, n_rows, columns);
                        else if (!paired || j == 0)
                            write_sums(g.c + to, g.ldc, tile, n_rows, columns);
                    });
                }
            }
        }
    }
    _tile_release();
}

}  // namespace refrag::amx

#endif
