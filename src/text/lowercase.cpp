// See lowercase.h. Simple mappings and categories are utf8proc's.
#include "text/lowercase.h"

#include <algorithm>

#include "base/utf8.h"
#include "text/category.h"

namespace refrag {
namespace {

constexpr char32_t capital_sigma = 0x3A3;
constexpr char32_t small_sigma = 0x3C3;
constexpr char32_t final_sigma = 0x3C2;
constexpr char32_t capital_i_with_dot = 0x130;
constexpr char32_t dot_above = 0x307;

// The property Case_Ignorable: marks, modifiers, format characters, and what stands inside a word.
bool is_case_ignorable(char32_t code) {
    constexpr char32_t inside_words[] = {0x27,   0x2E,   0x3A,   0xB7,   0x387,  0x55F,
                                         0x5F4,  0x2018, 0x2019, 0x2024, 0x2027, 0xFE13,
                                         0xFE52, 0xFE55, 0xFF07, 0xFF0E, 0xFF1A};
    switch (category(code)) {
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_CF:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_SK:
            return true;
        default:
            return std::find(std::begin(inside_words), std::end(inside_words), code) !=
                   std::end(inside_words);
    }
}

// The property Cased of a character that is not case-ignorable: letters with case, ordinal indicators, Roman
// numerals, Latin letters in circles and squares.
bool is_cased(char32_t code) {
    switch (category(code)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
            return true;
        default:
            return code == 0xAA || code == 0xBA || (code >= 0x2160 && code <= 0x217F) ||
                   (code >= 0x24B6 && code <= 0x24E9) || (code >= 0x1F130 && code <= 0x1F149) ||
                   (code >= 0x1F150 && code <= 0x1F169) || (code >= 0x1F170 && code <= 0x1F189);
    }
}

// Is the first character from `at` that is not case-ignorable a cased one? `ignorable_until` remembers where
// the last run of ignorable characters ended, so that sigmas between many of them stay linear.
bool cased_follows(std::string_view text, size_t at, size_t& ignorable_until) {
    at = std::max(at, ignorable_until);
    while (at < text.size()) {
        const Utf8Step step = decode_utf8(text, at);
        if (!is_case_ignorable(step.code)) break;
        at += step.bytes;
    }
    ignorable_until = at;
    return at < text.size() && is_cased(decode_utf8(text, at).code);
}

}  // namespace

std::string lowercase(std::string_view text) {
    std::string lower;
    lower.reserve(text.size());
    bool cased_before = false;  // the last character that is not case-ignorable is a cased one
    size_t ignorable_until = 0;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        at += step.bytes;
        if (step.code == capital_sigma) {
            const bool last = cased_before && !cased_follows(text, at, ignorable_until);
            append_utf8(lower, last ? final_sigma : small_sigma);
        } else if (step.code == capital_i_with_dot) {
            lower.push_back('i');
            append_utf8(lower, dot_above);
        } else {
            append_utf8(lower,
                        static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(step.code))));
        }
        if (!is_case_ignorable(step.code)) cased_before = is_cased(step.code);
    }
    return lower;
}

}  // namespace refrag
