// The byte-level alphabet as two tables, built once.
#include "text/byte_level.h"

#include <array>

#include "base/utf8.h"

namespace refrag {

namespace {

constexpr bool spells_itself(uint32_t byte) {
    return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr uint32_t n_shifted = 68;  // bytes that do not spell themselves
constexpr uint32_t n_chars = 256 + n_shifted;

constexpr std::array<uint16_t, 256> chars = [] {
    std::array<uint16_t, 256> table{};
    uint16_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte)
        table[byte] = spells_itself(byte) ? static_cast<uint16_t>(byte) : next++;
    return table;
}();

constexpr std::array<int16_t, n_chars> bytes = [] {
    std::array<int16_t, n_chars> table{};
    for (auto& entry : table) entry = -1;
    for (uint32_t byte = 0; byte < 256; ++byte) table[chars[byte]] = static_cast<int16_t>(byte);
    return table;
}();

}  // namespace

char32_t byte_to_char(uint8_t byte) {
    return chars[byte];
}

std::optional<uint8_t> char_to_byte(char32_t code) {
    if (code >= n_chars || bytes[code] < 0) return std::nullopt;
    return static_cast<uint8_t>(bytes[code]);
}

std::optional<std::string> spelled_bytes(std::string_view piece) {
    std::string out;
    size_t at = 0;
    while (at < piece.size()) {
        const Utf8Step step = decode_utf8(piece, at);
        const auto byte = char_to_byte(step.code);
        if (!step.valid || !byte) return std::nullopt;
        out.push_back(static_cast<char>(*byte));
        at += step.bytes;
    }
    return out;
}

std::string piece_to_bytes(std::string_view piece) {
    return spelled_bytes(piece).value_or(std::string(piece));
}

}  // namespace refrag
