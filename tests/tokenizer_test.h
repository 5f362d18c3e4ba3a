// What the tests of tokenizers share beside golden.h: bytes and hashes as their goldens write them, and
// spans.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "golden.h"
#include "text/tokenizer.h"

namespace refrag_test {

// Two hexadecimal digits a byte, small letters.
inline std::string from_hex(std::string_view hex) {
    const auto digit = [](char c) { return static_cast<uint32_t>(c <= '9' ? c - '0' : c - 'a' + 10); };
    std::string bytes;
    for (size_t i = 0; i + 1 < hex.size(); i += 2)
        bytes.push_back(static_cast<char>(digit(hex[i]) << 4 | digit(hex[i + 1])));
    return bytes;
}

// 16 hexadecimal digits.
inline std::string hex64(uint64_t value) {
    std::string text(16, '0');
    for (size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
    return text;
}

// 64-bit FNV-1a.
inline std::string fnv1a(std::string_view bytes) {
    uint64_t value = 0xCBF29CE484222325u;
    for (const char c : bytes) value = (value ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
    return hex64(value);
}

inline std::vector<int32_t> ids_of(const std::vector<refrag::Token>& tokens) {
    std::vector<int32_t> ids;
    for (const refrag::Token& token : tokens) ids.push_back(token.id);
    return ids;
}

// Ids as the goldens hash them: little-endian integers of 32 bits.
inline std::string bytes_of_ids(const std::vector<int32_t>& ids) {
    std::string bytes;
    for (const int32_t id : ids)
        for (int shift = 0; shift < 32; shift += 8)
            bytes.push_back(static_cast<char>(static_cast<uint32_t>(id) >> shift & 0xFF));
    return bytes;
}

// Do the tokens' spans follow each other over all n_bytes?
inline bool tiles(const std::vector<refrag::Token>& tokens, size_t n_bytes) {
    size_t at = 0;
    for (const refrag::Token& token : tokens) {
        if (token.begin != at || token.end < at) return false;
        at = token.end;
    }
    return at == n_bytes;
}

}  // namespace refrag_test
