// See peaks.h. Each loop keeps enough independent chains in registers to hide its instruction's latency.
#include "cpu/peaks.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#endif

#include "base/check.h"
#include "base/threads.h"
#include "cpu/cpu_backend.h"
#include "cpu/simd_unroll.h"
#if defined(__x86_64__)
#include "cpu/simd_amx.h"
#endif

namespace refrag {
namespace {

constexpr double kSeconds = 0.15;  // of timing, for each limit

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One way to multiply: `loop` does n rounds of `operations` each and returns something that depends on all.
struct ProductLoop {
    const char* instruction;
    double operations;
    float (*loop)(int64_t n);
};

// Chains of multiply-adds at once: 2 units of 4 or 5 cycles each need 10; the rest is for good measure.
constexpr int kChains = 24;

// The scalar build's way: multiplications and additions as the compiler vectorises them.
float fp32_scalar(int64_t n) {
    float sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = static_cast<float>(i);
    for (int64_t round = 0; round < n; ++round) {
        for (float& s : sum) s = s * 0.999f + 0.5f;
    }
    float total = 0.0f;
    for (const float s : sum) total += s;
    return total;
}

#if defined(__x86_64__)

constexpr int kNarrowChains = 12;  // of AVX2, which has 16 registers

__attribute__((target("avx2,fma"))) float fp32_avx2(int64_t n) {
    __m256 sum[kNarrowChains];
    for (int i = 0; i < kNarrowChains; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.5f);
    for (int64_t round = 0; round < n; ++round) {
        REFRAG_UNROLL
        for (int i = 0; i < kNarrowChains; ++i) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
    }
    for (int i = 1; i < kNarrowChains; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
    return _mm256_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f"))) float fp32_avx512(int64_t n) {
    __m512 sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.5f);
    for (int64_t round = 0; round < n; ++round) {
        REFRAG_UNROLL
        for (int i = 0; i < kChains; ++i) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
    }
    for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f,avx512bf16"))) float bf16_avx512(int64_t n) {
    __m512 sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_ps();
    // 2^-7, so that the sums stay far from the end of fp32's range.
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00);
    for (int64_t round = 0; round < n; ++round) {
        REFRAG_UNROLL
        for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, a);
    }
    for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f,avx512vnni"))) float int8_avx512(int64_t n) {
    __m512i sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_epi32(i);
    const __m512i a = _mm512_set1_epi8(1);
    for (int64_t round = 0; round < n; ++round) {
        REFRAG_UNROLL
        for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], a, a);
    }
    for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    int32_t lanes[16];
    _mm512_storeu_si512(lanes, sum[0]);
    return static_cast<float>(lanes[0]);
}

// The tile unit: 4 sums of 16x16, 2 tiles of each factor, as a product's inner loop has them. A tile
// multiplication is 16 x 16 x 32 bf16 or 16 x 16 x 64 int8 multiply-adds.
constexpr double kTileBf16 = 4 * 2.0 * 16 * 16 * 32;
constexpr double kTileInt8 = 4 * 2.0 * 16 * 16 * 64;

#define REFRAG_TILE_LOOP(multiply)                \
    _tile_loadconfig(&amx::whole_tiles);          \
    alignas(64) unsigned char ones[1024];         \
    std::memset(ones, 1, sizeof ones);            \
    _tile_zero(0);                                \
    _tile_zero(1);                                \
    _tile_zero(2);                                \
    _tile_zero(3);                                \
    _tile_loadd(4, ones, 64);                     \
    _tile_loadd(5, ones, 64);                     \
    _tile_loadd(6, ones, 64);                     \
    _tile_loadd(7, ones, 64);                     \
    for (int64_t round = 0; round < n; ++round) { \
        multiply(0, 4, 6);                        \
        multiply(1, 4, 7);                        \
        multiply(2, 5, 6);                        \
        multiply(3, 5, 7);                        \
    }                                             \
    alignas(64) float sums[256];                  \
    _tile_stored(0, sums, 64);                    \
    _tile_release();                              \
    return sums[0]

__attribute__((target("amx-tile,amx-bf16"))) float bf16_amx(int64_t n) {
    REFRAG_TILE_LOOP(_tile_dpbf16ps);
}
__attribute__((target("amx-tile,amx-int8"))) float int8_amx(int64_t n) {
    REFRAG_TILE_LOOP(_tile_dpbssd);
}
#undef REFRAG_TILE_LOOP

struct Features {
    bool avx2 = false, avx512 = false, bf16 = false, vnni = false, amx_bf16 = false, amx_int8 = false;
};

Features find_features() {
    Features f;
    f.avx2 = cpu_supports(CpuIsa::avx2);
    f.avx512 = cpu_supports(CpuIsa::avx512);
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!f.avx512 || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return f;
    f.vnni = (ecx & (1u << 11)) != 0;
    const bool tiles = (edx & (1u << 24)) != 0;
    const bool tile_bf16 = (edx & (1u << 22)) != 0, tile_int8 = (edx & (1u << 25)) != 0;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) f.bf16 = (eax & (1u << 5)) != 0;
#if defined(__linux__)
    // A process may use tiles only after asking for their room in its saved registers.
    constexpr long kRequestPermission = 0x1023;
    constexpr long kTileData = 18;
    const bool allowed = tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    f.amx_bf16 = allowed && tile_bf16;
    f.amx_int8 = allowed && tile_int8;
#endif
    return f;
}

#endif

struct Products {
    ProductLoop fp32{"scalar", 2.0 * kChains, fp32_scalar};
    ProductLoop bf16[2] = {};  // those there are; without a loop at the end
    ProductLoop int8[2] = {};
};

Products find_products() {
    Products p;
#if defined(__x86_64__)
    const Features f = find_features();
    if (f.avx2) p.fp32 = {"AVX2 vfmadd", 2.0 * 8 * kNarrowChains, fp32_avx2};
    if (f.avx512) p.fp32 = {"AVX-512 vfmadd", 2.0 * 16 * kChains, fp32_avx512};
    if (f.bf16) p.bf16[0] = {"AVX-512 vdpbf16ps", 2.0 * 32 * kChains, bf16_avx512};
    if (f.vnni) p.int8[0] = {"AVX-512 vpdpbusd", 2.0 * 64 * kChains, int8_avx512};
    if (f.amx_bf16) p.bf16[1] = {"AMX tdpbf16ps", kTileBf16, bf16_amx};
    if (f.amx_int8) p.int8[1] = {"AMX tdpbssd", kTileInt8, int8_amx};
#endif
    return p;
}

class Meter {
  public:
    explicit Meter(int n_threads) : pool_(n_threads) {}

    // 1e9 operations a second, of all threads together.
    double speed(const ProductLoop& product) {
        int64_t rounds = 1000;
        double best = 0.0;
        const double end = now_s() + kSeconds;
        for (int i = 0; i < 3 || now_s() < end; ++i) {
            const double began = now_s();
            pool_.run(pool_.size(), [&](int64_t) { sink_ = product.loop(rounds); });
            const double seconds = now_s() - began;
            const double operations = product.operations * static_cast<double>(rounds) * pool_.size();
            best = std::max(best, operations / seconds * 1e-9);
            // Long enough that starting the threads is nothing, short enough for several runs.
            if (seconds < kSeconds / 10) {
                rounds *= 2;
                i = 0;
            }
        }
        return best;
    }

    // Bytes read, each thread four forward streams as a matrix-vector product reads its panels.
    double read_speed(uint64_t bytes) {
        constexpr uint64_t kHugePage = uint64_t{2} << 20;
        bytes = std::max(bytes / kHugePage, uint64_t{1}) * kHugePage;
        const std::unique_ptr<void, void (*)(void*)> memory(
            std::aligned_alloc(kHugePage, static_cast<size_t>(bytes)), std::free);
        if (memory == nullptr)
            fail(Status::out_of_memory, "out of memory: cannot allocate ", bytes, " bytes");
#if defined(__linux__)
        (void)madvise(memory.get(), static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
        auto* base = static_cast<unsigned char*>(memory.get());
        const uint64_t part = bytes / static_cast<uint64_t>(pool_.size()) / 256 * 256;
        const auto each = [&](const std::function<void(unsigned char*)>& body) {
            pool_.run(pool_.size(), [&](int64_t i) { body(base + static_cast<uint64_t>(i) * part); });
        };
        each([&](unsigned char* p) { std::memset(p, 1, static_cast<size_t>(part)); });
        double best = 0.0;
        const double end = now_s() + 2 * kSeconds;
        for (int i = 0; i < 3 || now_s() < end; ++i) {
            const double began = now_s();
            each([&](unsigned char* p) { sink_ = static_cast<float>(mixed_words(p, part)); });
            const double read = static_cast<double>(part) * pool_.size();
            best = std::max(best, read / (now_s() - began) * 1e-9);
        }
        return best;
    }

  private:
    // All words of a part, in four streams one after the other at p.
    static uint64_t mixed_words(const unsigned char* p, uint64_t bytes) {
        const uint64_t stream = bytes / 4;
#if defined(__x86_64__)
        __m128i mix[4][4] = {};
        for (uint64_t at = 0; at < stream; at += 64) {
            REFRAG_UNROLL
            for (uint64_t s = 0; s < 4; ++s) {
                REFRAG_UNROLL
                for (uint64_t j = 0; j < 4; ++j) {
                    const auto* from = reinterpret_cast<const __m128i*>(p + s * stream + at + 16 * j);
                    mix[s][j] = _mm_xor_si128(mix[s][j], _mm_load_si128(from));
                }
            }
        }
        __m128i all = _mm_setzero_si128();
        for (const auto& line : mix) {
            for (const __m128i& words : line) all = _mm_xor_si128(all, words);
        }
        return static_cast<uint64_t>(_mm_cvtsi128_si64(all));
#else
        uint64_t mix[4] = {};
        for (uint64_t at = 0; at < stream; at += 8) {
            for (uint64_t s = 0; s < 4; ++s) {
                uint64_t word;
                std::memcpy(&word, p + s * stream + at, sizeof word);
                mix[s] ^= word;
            }
        }
        return mix[0] ^ mix[1] ^ mix[2] ^ mix[3];
#endif
    }

    ThreadPool pool_;
    std::atomic<float> sink_{0.0f};  // keeps the results alive
};

// Twice the last cache, so that a pass has thrown out what the next one reads first.
uint64_t read_bytes(uint64_t most) {
    uint64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = static_cast<uint64_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
    const uint64_t wanted = std::clamp(2 * cache, uint64_t{256} << 20, uint64_t{2} << 30);
    return std::min(wanted, most);
}

}  // namespace

MachinePeaks measure_peaks(int n_threads, uint64_t max_buffer_bytes) {
    Meter meter(n_threads == 0 ? default_threads() : n_threads);
    const Products products = find_products();
    MachinePeaks peaks;
    peaks.fp32_gflops = meter.speed(products.fp32);
    peaks.fp32_instruction = products.fp32.instruction;
    const auto best_of = [&](const ProductLoop(&choices)[2], double& speed, std::string& instruction) {
        speed = peaks.fp32_gflops;
        instruction = peaks.fp32_instruction;
        for (const ProductLoop& product : choices) {
            if (product.loop == nullptr) continue;
            const double found = meter.speed(product);
            if (found <= speed) continue;
            speed = found;
            instruction = product.instruction;
        }
    };
    best_of(products.bf16, peaks.bf16_gflops, peaks.bf16_instruction);
    best_of(products.int8, peaks.int8_gops, peaks.int8_instruction);
    peaks.read_gbs = meter.read_speed(read_bytes(max_buffer_bytes));
    return peaks;
}

std::string cpu_name() {
    std::string found;
    if (std::FILE* file = std::fopen("/proc/cpuinfo", "re"); file != nullptr) {
        char line[512];
        while (found.empty() && std::fgets(line, sizeof line, file) != nullptr) {
            const std::string text(line);
            const size_t colon = text.find(": ");
            if (text.starts_with("model name") && colon != std::string::npos)
                found = text.substr(colon + 2, text.find('\n') - colon - 2);
        }
        std::fclose(file);
    }
    utsname system{};
    if (found.empty() && uname(&system) == 0) found = system.machine;
    return found;
}

}  // namespace refrag
