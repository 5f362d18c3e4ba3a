// Products of one or two rows of bf16 as AMX computes them, on vector units. Included by simd_*.cpp only.
//
// What a tile product adds to a sum, by Intel's definition: of 32 k, the even ones and the odd ones are added
// up apart, each product by a fused multiply-add from 0 on; then the two, and then that to the sum. All of it
// rounds to nearest, takes subnormal numbers as 0 and makes none.
#pragma once

#include "cpu/simd_amx.h"
#include "cpu/simd_unroll.h"

namespace refrag::amx {

// While it lives this thread's vector units treat subnormal numbers as the tile unit does.
class FlushSubnormals {
  public:
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // FTZ and DAZ
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
};

// Row `row` (below 16) of the first n tiles of a left operand as fp32.
inline void widen_row(float* to, const uint16_t* left, int64_t row, int64_t n_tiles) {
    for (int64_t k = 0; k < n_tiles; ++k, to += kTileK) {
        const uint16_t* const from = left + k * kTileElements + row * kTileK;
        for (int64_t i = 0; i < kTileK; ++i) to[i] = bf16_to_f32(from[i]);
    }
}

// sum[r][p] += x[r] times tile p, of R rows and P tiles of the right operand; x and tiles x_stride and
// b_stride apart. P tiles from `ahead` on, as far apart, are asked for meanwhile.
template <int R, int P>
REFRAG_AMX inline __attribute__((always_inline)) void add_tile(__m512 (&sum)[R][P], const float* x,
                                                               int64_t x_stride, const uint16_t* b,
                                                               int64_t b_stride, const uint16_t* ahead) {
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    __m512 even_sum[R][P], odd_sum[R][P];
    REFRAG_UNROLL
    for (int r = 0; r < R; ++r) {
        REFRAG_UNROLL
        for (int p = 0; p < P; ++p) even_sum[r][p] = odd_sum[r][p] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < kTileK / 2; ++i) {
        REFRAG_UNROLL
        for (int p = 0; p < P; ++p) {
            const int64_t line = p * b_stride + i * 2 * kPanel;
            _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
            const __m512i w = _mm512_loadu_si512(b + line);
            const __m512 w_even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
            const __m512 w_odd = _mm512_castsi512_ps(_mm512_and_si512(w, odd));
            REFRAG_UNROLL
            for (int r = 0; r < R; ++r) {
                const float* const pair = x + r * x_stride + 2 * i;
                // NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): callers have filled x
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

}  // namespace refrag::amx
