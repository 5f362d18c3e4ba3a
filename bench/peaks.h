// The machine's own limits, measured beside what they judge: fp32 multiply-adds a second (registers only) and
// bytes read a second (a buffer larger than the caches). On a shared machine they move; read shares, not
// absolute figures.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/arena.h"
#include "base/threads.h"
#include "cpu/cpu_backend.h"
#include "cpu/simd_unroll.h"

namespace refrag::bench {

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the fastest call of `body` within `budget` seconds, at least three calls.
inline double best_seconds(double budget, const std::function<void()>& body) {
    double best = 1e30;
    const double end = now() + budget;
    for (int i = 0; i < 3 || now() < end; ++i) {
        const double begin = now();
        body();
        best = std::min(best, now() - begin);
    }
    return best;
}

// ---- the machine's limits -----------------------------------------------------------------------------

// Multiply-adds in 24 independent chains of vectors, as the product's tile has them.
inline constexpr int kChains = 24;
inline constexpr int64_t kFmaRounds = 200000;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline float fma_loop_avx512() {
    __m512 sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.5f);
    for (int64_t n = 0; n < kFmaRounds; ++n) {
        REFRAG_UNROLL
        for (int i = 0; i < kChains; ++i) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
    }
    float lanes[16];
    for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    _mm512_storeu_ps(lanes, sum[0]);
    return lanes[0];
}

__attribute__((target("avx2,fma"))) inline float fma_loop_avx2() {
    constexpr int chains = kChains / 2;
    __m256 sum[chains];
    for (int i = 0; i < chains; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.5f);
    for (int64_t n = 0; n < kFmaRounds; ++n) {
        REFRAG_UNROLL
        for (int i = 0; i < chains; ++i) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
    }
    float lanes[8];
    for (int i = 1; i < chains; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
    _mm256_storeu_ps(lanes, sum[0]);
    return lanes[0];
}
#endif

// The scalar build's limit: plain multiplications and additions, as the compiler vectorises them.
inline float fma_loop_scalar() {
    float sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = static_cast<float>(i);
    for (int64_t n = 0; n < kFmaRounds; ++n) {
        for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * 0.999f + 0.5f;
    }
    float total = 0.0f;
    for (int i = 0; i < kChains; ++i) total += sum[i];
    return total;
}

class Machine {
  public:
    Machine(Backend& backend, int threads, CpuIsa isa, double budget)
        : isa_(isa), budget_(budget), pool_(threads), memory_(backend, kWords * 4) {
        std::memset(memory_.data(), 1, memory_.bytes());
    }

    double fma_gflops() {
        const double flops_each = has_avx512()           ? 2.0 * 16 * kChains
                                  : isa_ == CpuIsa::avx2 ? 2.0 * 8 * (kChains / 2)
                                                         : 2.0 * kChains;
        const double s = best_seconds(budget_, [&] {
            pool_.run(pool_.size(), [&](int64_t) {
#if defined(__x86_64__)
                sink_ = has_avx512()           ? fma_loop_avx512()
                        : isa_ == CpuIsa::avx2 ? fma_loop_avx2()
                                               : fma_loop_scalar();
#else
                sink_ = fma_loop_scalar();
#endif
            });
        });
        return flops_each * static_cast<double>(kFmaRounds) * pool_.size() / s * 1e-9;
    }

    // Reads 256 MiB, each thread four forward streams, as the matrix-vector product reads its panels.
    double read_gbs() {
        const double s = best_seconds(budget_, [&] {
            pool_.run(pool_.size(), [&](int64_t part) {
                const int64_t begin = kWords * part / pool_.size(), end = kWords * (part + 1) / pool_.size();
                sink_ = static_cast<float>(
                    mix_words(static_cast<const uint32_t*>(memory_.data()) + begin, (end - begin) / 64 * 16));
            });
        });
        return static_cast<double>(kWords) * 4.0 / s * 1e-9;
    }

  private:
    static constexpr int64_t kWords = int64_t{64} << 20;

    // All words of four streams of n words each, one after the other at p.
    static uint32_t mix_words(const uint32_t* p, int64_t n) {
#if defined(__x86_64__)
        __m128i mix[4][4] = {};
        for (int64_t i = 0; i < n; i += 16) {
            for (int stream = 0; stream < 4; ++stream) {
                for (int j = 0; j < 4; ++j) {
                    const auto* at = reinterpret_cast<const __m128i*>(p + stream * n + i + 4 * j);
                    mix[stream][j] = _mm_xor_si128(mix[stream][j], _mm_loadu_si128(at));
                }
            }
        }
        __m128i all = _mm_setzero_si128();
        for (const auto& stream : mix) {
            for (const __m128i& m : stream) all = _mm_xor_si128(all, m);
        }
        return static_cast<uint32_t>(_mm_cvtsi128_si32(all));
#else
        uint32_t mix = 0;
        for (int64_t i = 0; i < 4 * n; ++i) mix ^= p[i];
        return mix;
#endif
    }

    bool has_avx512() const {
        return isa_ != CpuIsa::scalar && isa_ != CpuIsa::avx2;
    }

    CpuIsa isa_;
    double budget_;
    ThreadPool pool_;
    Buffer memory_;
    std::atomic<float> sink_{0.0f};  // keeps the results alive
};

}  // namespace refrag::bench
