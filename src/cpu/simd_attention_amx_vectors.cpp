// Attention in bf16 of one or two rows as AMX computes it, on vector units: keys and values pass once, as
// fast as memory gives them. Empty on other processors than x86-64. See simd_attention_amx.cpp.
#if defined(__x86_64__)

#include "cpu/simd_amx_vectors.h"
#include "cpu/simd_attention_bf16.h"

namespace refrag::amx {
namespace {

// The page that is asked for while page i is read, or page i again.
const uint16_t* ahead_of(const Bf16Attend& a, int64_t i, const uint16_t* page, int64_t offset) {
    return i < a.n_next ? a.next[i] + offset : page;
}

// s = q K of all pages; q[row][dim] widened.
template <int R>
REFRAG_AMX __attribute__((noinline)) void scores(const Bf16Attend& a, const float* q) {
    const int64_t panel = kPanel * a.dim;
    for (int64_t i = 0; i < a.n_pages; ++i) {
        const uint16_t* const ahead = ahead_of(a, i, a.k[i], 0);
        __m512 sum[R][2];
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int64_t d = 0; d < a.dim; d += kTileK) {
            add_tile<R, 2>(sum, q + d, a.dim, a.k[i] + d * kPanel, panel, ahead + d * kPanel);
        }
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            float* const s = a.s + r * kAttendEntries + i * kPageEntries;
            _mm512_storeu_ps(s, sum[r][0]);
            _mm512_storeu_ps(s + kPanel, sum[r][1]);
        }
    }
}

// acc += P V of all pages, P panels of dimensions from d on; p[row][kAttendEntries] widened.
template <int R, int P>
REFRAG_AMX __attribute__((noinline)) void values(const Bf16Attend& a, const float* p, int64_t d) {
    __m512 sum[R][P];
    REFRAG_UNROLL
    for (int r = 0; r < R; ++r) {
        REFRAG_UNROLL
        for (int n = 0; n < P; ++n) sum[r][n] = _mm512_loadu_ps(a.acc + r * a.dim + d + n * kPanel);
    }
    for (int64_t i = 0; i < a.n_pages; ++i) {
        const uint16_t* const v = a.v[i] + d * kPageEntries;
        const uint16_t* const ahead = ahead_of(a, i, v, (a.dim + d) * kPageEntries);
        add_tile<R, P>(sum, p + i * kPageEntries, kAttendEntries, v, kTileElements, ahead);
    }
    REFRAG_UNROLL
    for (int r = 0; r < R; ++r) {
        REFRAG_UNROLL
        for (int n = 0; n < P; ++n) _mm512_storeu_ps(a.acc + r * a.dim + d + n * kPanel, sum[r][n]);
    }
}

template <int R>
void attend(const Bf16Attend& a) {
    alignas(64) float q[R * vector_dim];
    alignas(64) float p[R * kAttendEntries];
    for (int64_t r = 0; r < R; ++r) widen_row(q + r * a.dim, a.q, r, a.dim / kTileK);
    {
        const FlushSubnormals flush;
        scores<R>(a, q);
    }
    avx512_bf16::softmax_rows(a);
    for (int64_t r = 0; r < R; ++r) widen_row(p + r * kAttendEntries, a.p, r, a.n_pages);
    const FlushSubnormals flush;
    for (int64_t d = 0; d < a.dim;) {
        if (a.dim - d >= 4 * kPanel) {
            values<R, 4>(a, p, d);
            d += 4 * kPanel;
        } else {
            values<R, 2>(a, p, d);
            d += 2 * kPanel;
        }
    }
}

}  // namespace

void attend_bf16_vectors(const Bf16Attend& a) {
    a.rows == 1 ? attend<1>(a) : attend<2>(a);
}

}  // namespace refrag::amx

#endif
