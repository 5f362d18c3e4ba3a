// What the pre-tokenizers need of Unicode: cleaning malformed UTF-8 while remembering where each byte came
// from, and the classes \p{L}, \p{N} and \s as the regular expressions of tokenizer files use them. The
// categories are utf8proc's, so the Unicode version is that library's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/utf8.h"

namespace refrag {

// Classes of code points as the GPT-2 pattern tells them apart; they exclude one another.
enum class CharClass : uint8_t { letter, number, space, other };

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

bool is_valid_utf8(std::string_view text);

// Text as valid UTF-8, each maximal invalid subpart replaced by U+FFFD (as Rust's from_utf8_lossy and
// Python's errors="replace" do).
std::string replace_invalid_utf8(std::string_view text);

// Valid UTF-8 made from any bytes, with the way back to the original byte positions. `original` must outlive
// it.
class CleanText {
  public:
    explicit CleanText(std::string_view original);

    std::string_view text() const { return repairs_.empty() ? original_ : std::string_view(cleaned_); }
    // The original position of a position in text(). Monotonic; the positions inside a U+FFFD that stands for
    // n bytes fall on its first n bytes, then on its end. `hint` (start with 0) makes a walk linear.
    size_t original_position(size_t clean_position, size_t& hint) const;

  private:
    // A run of U+FFFD, each standing for equally many bytes.
    struct Repair {
        size_t clean;     // where the run stands in cleaned_
        size_t original;  // where the bytes it replaces begin
        size_t count;     // how many U+FFFD
        uint32_t bytes;   // how many bytes each stands for: 1..3
    };
    std::string_view original_;
    std::string cleaned_;
    std::vector<Repair> repairs_;
};

}  // namespace refrag
