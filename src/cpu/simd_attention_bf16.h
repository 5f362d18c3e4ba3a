// What the two files of bf16 attention on AVX-512 share: targets, a prefetch, the softmax between the
// products. Included by simd_attention_bf16.cpp and simd_attention_amx.cpp only.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/x86_intrinsics.h"
#include "ops/backend.h"

#define REFRAG_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define REFRAG_BF16_INLINE REFRAG_BF16 inline __attribute__((always_inline))

namespace refrag::avx512_bf16 {

// Pages lie anywhere, so the processor does not foresee the next one.
inline void prefetch(const uint16_t* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(x + i, 0, 2);
}

// From scores at a.s to powers at a.p (left operand, one block of 16 rows after the other, kAttendEntries
// each), with a.m and a.l brought forward and a.acc scaled to the new a.m. Rows beyond a.rows hold anything.
void softmax_rows(const Bf16Attend& a);

}  // namespace refrag::avx512_bf16
