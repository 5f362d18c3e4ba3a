// The alphabet of byte-level vocabularies: every byte has one printable character, so that pieces are
// readable text without spaces. Printable Latin-1 bytes stand for themselves; the other 68 are U+0100,
// U+0101, ... in order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace refrag {

// The character that spells a byte: U+0120 ("Ġ") for a space.
char32_t byte_to_char(uint8_t byte);

// The byte a character spells; empty for a character outside the alphabet.
std::optional<uint8_t> char_to_byte(char32_t code);

// The bytes that a piece spells; empty for a piece with any character outside the alphabet.
std::optional<std::string> spelled_bytes(std::string_view piece);

// The bytes a piece stands for. A piece with any character outside the alphabet stands for its own UTF-8
// bytes.
std::string piece_to_bytes(std::string_view piece);

}  // namespace refrag
