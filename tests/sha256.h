// SHA-256 (FIPS 180-4) of a string, for goldens that name texts outside the repository. Plain, not fast, and
// no part of the library.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

namespace refrag_test {

// One block of 64 bytes into the state; `k` are the round constants.
inline void sha256_block(std::array<uint32_t, 8>& state, const std::array<uint32_t, 64>& k,
                         const unsigned char* block) {
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 64; ++i) {
        if (i < 16) {
            for (size_t byte = 0; byte < 4; ++byte) w[i] = w[i] << 8 | block[4 * i + byte];
            continue;
        }
        const uint32_t a = w[i - 15];
        const uint32_t b = w[i - 2];
        w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
               (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    std::array<uint32_t, 8> s = state;
    for (size_t i = 0; i < 64; ++i) {
        const uint32_t sum1 = std::rotr(s[4], 6) ^ std::rotr(s[4], 11) ^ std::rotr(s[4], 25);
        const uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
        const uint32_t t1 = s[7] + sum1 + choice + k[i] + w[i];
        const uint32_t sum0 = std::rotr(s[0], 2) ^ std::rotr(s[0], 13) ^ std::rotr(s[0], 22);
        const uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
        s = {t1 + sum0 + majority, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
    }
    for (size_t i = 0; i < 8; ++i) state[i] += s[i];
}

// The first 32 bits of a number's fractional part; a double's 53 are enough for roots of small primes.
inline uint32_t fraction_bits(double value) {
    return static_cast<uint32_t>((value - std::floor(value)) * 4294967296.0);
}

// The digest in 64 hexadecimal digits.
inline std::string sha256(std::string_view text) {
    std::array<uint32_t, 64> k{};
    std::array<uint32_t, 8> state{};
    uint32_t n_primes = 0;
    for (uint32_t number = 2; n_primes < 64; ++number) {
        bool prime = true;
        for (uint32_t divisor = 2; divisor * divisor <= number; ++divisor)
            prime = prime && number % divisor != 0;
        if (!prime) continue;
        if (n_primes < 8) state[n_primes] = fraction_bits(std::sqrt(number));
        k[n_primes++] = fraction_bits(std::cbrt(number));
    }
    std::string padded(text);
    padded.push_back('\x80');
    padded.resize((padded.size() + 8 + 63) / 64 * 64 - 8, '\0');
    for (int shift = 56; shift >= 0; shift -= 8)
        padded.push_back(static_cast<char>(uint64_t{text.size()} * 8 >> shift & 0xFF));
    for (size_t at = 0; at < padded.size(); at += 64)
        sha256_block(state, k, reinterpret_cast<const unsigned char*>(padded.data()) + at);
    std::string hex;
    for (const uint32_t word : state)
        for (int shift = 28; shift >= 0; shift -= 4) hex.push_back("0123456789abcdef"[word >> shift & 15]);
    return hex;
}

}  // namespace refrag_test
