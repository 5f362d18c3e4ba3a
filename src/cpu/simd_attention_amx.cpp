// Attention in bf16 on AMX tiles. Empty on other processors than x86-64. See attention_bf16.cpp for what is
// computed, and simd_attention_bf16.cpp for the softmax between the two products.
#if defined(__x86_64__)

#include "cpu/simd_amx.h"
#include "cpu/simd_attention_bf16.h"

namespace refrag::amx {
namespace {

// Scores of R blocks of 16 rows with one page.
template <int R>
REFRAG_AMX void scores(const uint16_t* q, const uint16_t* k, int64_t dim, float* s) {
    constexpr int64_t s_bytes = kAttendEntries * 4;
    const int64_t block = kPanel * dim;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (R == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t d = 0; d < block; d += kTileElements) {
        _tile_loadd(6, k + d, tile_row_bytes);
        _tile_loadd(4, q + d, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, k + block + d, tile_row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) {
            _tile_loadd(5, q + block + d, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, s, s_bytes);
    _tile_stored(1, s + kPanel, s_bytes);
    if constexpr (R == 2) {
        _tile_stored(2, s + kPanel * kAttendEntries, s_bytes);
        _tile_stored(3, s + kPanel * kAttendEntries + kPanel, s_bytes);
    }
}

// acc += P V of all pages, 32 dimensions from d on.
template <int R>
REFRAG_AMX void values(const Bf16Attend& a, int64_t d) {
    const int64_t acc_bytes = a.dim * 4;
    float* const acc = a.acc + d;
    float* const acc2 = acc + kPanel * a.dim;
    _tile_loadd(0, acc, acc_bytes);
    _tile_loadd(1, acc + kPanel, acc_bytes);
    if constexpr (R == 2) {
        _tile_loadd(2, acc2, acc_bytes);
        _tile_loadd(3, acc2 + kPanel, acc_bytes);
    }
    for (int64_t i = 0; i < a.n_pages; ++i) {
        const uint16_t* const v = a.v[i] + d * kPageEntries;
        const uint16_t* const p = a.p + i * kTileElements;
        _tile_loadd(6, v, tile_row_bytes);
        _tile_loadd(4, p, tile_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, v + kTileElements, tile_row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) {
            _tile_loadd(5, p + kPanel * kAttendEntries, tile_row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, acc, acc_bytes);
    _tile_stored(1, acc + kPanel, acc_bytes);
    if constexpr (R == 2) {
        _tile_stored(2, acc2, acc_bytes);
        _tile_stored(3, acc2 + kPanel, acc_bytes);
    }
}

template <int R>
REFRAG_AMX void attend(const Bf16Attend& a) {
    for (int64_t i = 0; i < a.n_pages; ++i) {
        if (i < a.n_next) avx512_bf16::prefetch(a.next[i], kPageEntries * a.dim);
        scores<R>(a.q, a.k[i], a.dim, a.s + i * kPageEntries);
    }
    avx512_bf16::softmax_rows(a);
    for (int64_t i = 0; i < a.n_next; ++i) {
        avx512_bf16::prefetch(a.next[i] + kPageEntries * a.dim, kPageEntries * a.dim);
    }
    for (int64_t d = 0; d < a.dim; d += 2 * kPanel) values<R>(a, d);
}

}  // namespace

REFRAG_AMX void attend_bf16(const Bf16Attend& a) {
    if (a.rows <= vector_rows && a.dim <= vector_dim) return attend_bf16_vectors(a);
    _tile_loadconfig(&whole_tiles);
    if (a.rows > kPanel)
        attend<2>(a);
    else
        attend<1>(a);
    _tile_release();
}

}  // namespace refrag::amx

#endif
