// What the pre-tokenizers need of Unicode: cleaning malformed UTF-8 while remembering where each byte came
// from, and the classes \p{L}, \p{N} and \s as the regular expressions of tokenizer files use them. The
// categories are utf8proc's, so the Unicode version is that library's.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/utf8.h"
#include "text/position_map.h"

namespace refrag {

// Classes of code points as the GPT-2 pattern tells them apart; they exclude one another.
enum class CharClass : uint8_t { letter, number, space, other };

constexpr bool is_ascii_letter(unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
inline constexpr std::array<CharClass, 128> ascii_classes = [] {
    std::array<CharClass, 128> classes{};
    for (unsigned char c = 0; c < 128; ++c)
        classes[c] = is_ascii_letter(c)                  ? CharClass::letter
                     : c >= '0' && c <= '9'              ? CharClass::number
                     : c == ' ' || (c >= 9 && c <= 0x0D) ? CharClass::space
                                                         : CharClass::other;
    return classes;
}();

// \p{L} (Lu Ll Lt Lm Lo), \p{N} (Nd Nl No), \s (the White_Space property), or none of these.
CharClass char_class(char32_t code);
inline bool is_letter(char32_t code) {
    return char_class(code) == CharClass::letter;
}
inline bool is_number(char32_t code) {
    return char_class(code) == CharClass::number;
}
inline bool is_white_space(char32_t code) {
    return char_class(code) == CharClass::space;
}
// \w: alphabetic, mark, decimal digit, connector punctuation or joiner.
bool is_word_char(char32_t code);

// Where the white space that begins at text[at] ends; where the white space that ends at `end` begins, not
// before `begin`. Both need valid UTF-8.
size_t white_space_after(std::string_view text, size_t at);
size_t white_space_before(std::string_view text, size_t begin, size_t end);
// The character that ends at `end`; needs valid UTF-8 and begin < end.
Utf8Step char_before(std::string_view text, size_t begin, size_t end);

bool is_valid_utf8(std::string_view text);

// Text as valid UTF-8, each maximal invalid subpart replaced by U+FFFD (as Rust's from_utf8_lossy and
// Python's errors="replace" do).
std::string replace_invalid_utf8(std::string_view text);
// The same, appended.
void append_valid_utf8(std::string& out, std::string_view text);

// Valid UTF-8 made from any bytes, with the way back to the original byte positions. `original` must outlive
// it.
class CleanText {
  public:
    explicit CleanText(std::string_view original);

    std::string_view text() const { return map_.identity() ? original_ : std::string_view(cleaned_); }
    const PositionMap& map() const { return map_; }
    // The original position of a position in text(): monotonic; see PositionMap::source_position.
    size_t original_position(size_t clean_position, size_t& hint) const {
        return map_.source_position(clean_position, hint);
    }

  private:
    std::string_view original_;
    std::string cleaned_;
    PositionMap map_;
};

}  // namespace refrag
