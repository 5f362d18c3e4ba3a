// See sha256.h.
#include "base/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace refrag {
namespace {

// FIPS 180-4, 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
alignas(16) constexpr std::array<uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// 5.3.3: the same of the square roots of the first 8 primes.
constexpr std::array<uint32_t, 8> kInitial = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                              0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

uint32_t big_endian(const uint8_t* bytes) {
    return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

// 6.2.2, in the standard's names.
void plain_blocks(std::array<uint32_t, 8>& state, const uint8_t* blocks, size_t n_blocks) {
    for (; n_blocks > 0; --n_blocks, blocks += 64) {
        std::array<uint32_t, 64> w;
        for (size_t t = 0; t < 16; ++t) w[t] = big_endian(blocks + 4 * t);
        for (size_t t = 16; t < 64; ++t) {
            const uint32_t sigma0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ w[t - 15] >> 3;
            const uint32_t sigma1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ w[t - 2] >> 10;
            w[t] = sigma1 + w[t - 7] + sigma0 + w[t - 16];
        }
        auto [a, b, c, d, e, f, g, h] = state;
        for (size_t t = 0; t < 64; ++t) {
            const uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
            const uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
            const uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
            const uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        const std::array<uint32_t, 8> sum = {a, b, c, d, e, f, g, h};
        for (size_t i = 0; i < 8; ++i) state[i] += sum[i];
    }
}

#if defined(__x86_64__)
// The instructions keep the state as (a, b, e, f) and (c, d, g, h), highest lane first, do two rounds at a
// time, and extend the message four words at a time.
__attribute__((target("sha,sse4.1"))) void cpu_blocks(std::array<uint32_t, 8>& state, const uint8_t* blocks,
                                                      size_t n_blocks) {
    const __m128i swap_bytes = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    auto* const at = reinterpret_cast<__m128i*>(state.data());
    const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(at), 0xb1);
    const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(at + 1), 0x1b);
    __m128i abef = _mm_alignr_epi8(badc, hgfe, 8);
    __m128i cdgh = _mm_blend_epi16(hgfe, badc, 0xf0);
    for (; n_blocks > 0; --n_blocks, blocks += 64) {
        const __m128i abef_before = abef;
        const __m128i cdgh_before = cdgh;
        __m128i w[4];
        for (size_t i = 0; i < 16; ++i) {
            __m128i& now = w[i % 4];
            if (i < 4) {
                const auto* const words = reinterpret_cast<const __m128i*>(blocks + 16 * i);
                now = _mm_shuffle_epi8(_mm_loadu_si128(words), swap_bytes);
            } else {
                const __m128i last = w[(i + 3) % 4];
                const __m128i nine_back = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
                const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) % 4]), nine_back);
                now = _mm_sha256msg2_epu32(sum, last);
            }
            const auto* const k = reinterpret_cast<const __m128i*>(kRound.data() + 4 * i);
            const __m128i wk = _mm_add_epi32(now, _mm_load_si128(k));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128(at, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(at + 1, _mm_alignr_epi8(dchg, feba, 8));
}
#else
constexpr auto cpu_blocks = plain_blocks;
#endif

}  // namespace

bool cpu_has_sha256() noexcept {
#if defined(__x86_64__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & (1u << 29)) != 0 &&
           __builtin_cpu_supports("sse4.1") != 0;
#else
    return false;
#endif
}

std::string Sha256Digest::hex() const {
    std::string text;
    for (const uint8_t byte : bytes) {
        text.push_back("0123456789abcdef"[byte >> 4]);
        text.push_back("0123456789abcdef"[byte & 15]);
    }
    return text;
}

size_t Sha256DigestHash::operator()(const Sha256Digest& digest) const noexcept {
    size_t hash;
    std::memcpy(&hash, digest.bytes.data(), sizeof hash);
    return hash;
}

Sha256::Sha256(Sha256Path path) : state_(kInitial) {
    static const bool has_instructions = cpu_has_sha256();
    const bool plain = path == Sha256Path::plain || (path == Sha256Path::automatic && !has_instructions);
    blocks_ = plain ? plain_blocks : cpu_blocks;
}

Sha256& Sha256::add(const void* data, size_t bytes) {
    const auto* from = static_cast<const uint8_t*>(data);
    const size_t held = n_bytes_ % pending_.size();
    n_bytes_ += bytes;
    if (held > 0) {
        const size_t n = std::min(bytes, pending_.size() - held);
        std::copy_n(from, n, pending_.begin() + static_cast<std::ptrdiff_t>(held));
        from += n;
        bytes -= n;
        if (held + n < pending_.size()) return *this;
        blocks_(state_, pending_.data(), 1);
    }
    blocks_(state_, from, bytes / 64);
    std::copy_n(from + bytes / 64 * 64, bytes % 64, pending_.begin());
    return *this;
}

Sha256& Sha256::add_field(std::string_view field) {
    std::array<uint8_t, 8> length;
    for (size_t i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(uint64_t{field.size()} >> (8 * i));
    return add(length.data(), length.size()).add(field);
}

Sha256Digest Sha256::digest() const {
    // 5.1.1: a one bit, zeros, and the number of bits as 8 bytes that end a block.
    Sha256 padded = *this;
    std::array<uint8_t, 72> end{};
    end[0] = 0x80;
    const size_t n = 64 - (n_bytes_ + 8) % 64;  // 1 to 64
    for (size_t i = 0; i < 8; ++i) end[n + i] = static_cast<uint8_t>(n_bytes_ * 8 >> (56 - 8 * i));
    padded.add(end.data(), n + 8);
    Sha256Digest digest;
    for (size_t i = 0; i < 32; ++i)
        digest.bytes[i] = static_cast<uint8_t>(padded.state_[i / 4] >> (24 - 8 * (i % 4)));
    return digest;
}

Sha256Digest sha256(std::string_view text) {
    return Sha256().add(text).digest();
}

}  // namespace refrag
