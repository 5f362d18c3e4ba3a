// One step of UTF-8 decoding and encoding, shared by the JSON writer and the tokenizers.
// Malformed input follows the Unicode standard's "maximal subpart" practice (table 3-7): every maximal
// prefix of a well-formed sequence counts as one U+FFFD, every other stray byte as one U+FFFD of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace refrag {

constexpr char32_t replacement_character = 0xFFFD;

// One decoded step. `bytes` is how many input bytes it takes (1..4); `code` is U+FFFD where `valid` is false.
// `cut` says that the input ended inside a sequence that more bytes could have completed.
struct Utf8Step {
    char32_t code;
    uint32_t bytes;
    bool valid;
    bool cut;
};

// Decodes the character at text[at]; needs at < text.size().
inline Utf8Step decode_utf8(std::string_view text, size_t at) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
    const uint32_t lead = byte(at);
    if (lead < 0x80) return {static_cast<char32_t>(lead), 1, true, false};

    uint32_t length = 0;
    uint32_t low = 0x80;  // bounds of the second byte; they exclude overlong forms, surrogates and > U+10FFFF
    uint32_t high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
        length = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        length = 3;
        if (lead == 0xE0) low = 0xA0;
        if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        length = 4;
        if (lead == 0xF0) low = 0x90;
        if (lead == 0xF4) high = 0x8F;
    } else {
        return {replacement_character, 1, false, false};
    }

    uint32_t code = lead & (0x7Fu >> length);
    for (uint32_t i = 1; i < length; ++i) {
        if (at + i >= text.size()) return {replacement_character, i, false, true};
        const uint32_t next = byte(at + i);
        if (next < low || next > high) return {replacement_character, i, false, false};
        code = (code << 6) | (next & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    return {static_cast<char32_t>(code), length, true, false};
}

// Appends the UTF-8 form of a code point; needs a Unicode scalar value.
inline void append_utf8(std::string& out, char32_t code) {
    const auto put = [&](uint32_t value) {
        out.push_back(static_cast<char>(static_cast<unsigned char>(value)));
    };
    const uint32_t c = static_cast<uint32_t>(code);
    if (c < 0x80) {
        put(c);
    } else if (c < 0x800) {
        put(0xC0 | (c >> 6));
        put(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        put(0xE0 | (c >> 12));
        put(0x80 | ((c >> 6) & 0x3F));
        put(0x80 | (c & 0x3F));
    } else {
        put(0xF0 | (c >> 18));
        put(0x80 | ((c >> 12) & 0x3F));
        put(0x80 | ((c >> 6) & 0x3F));
        put(0x80 | (c & 0x3F));
    }
}

}  // namespace refrag
