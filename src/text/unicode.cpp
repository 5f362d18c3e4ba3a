// Classes of code points from utf8proc's general categories, ASCII from a table, and the cleaning of
// malformed text.
#include "text/unicode.h"

#include <algorithm>
#include <array>

#include "text/category.h"

namespace refrag {

namespace {

// White_Space of the Unicode character database; unchanged since Unicode 6.3.
constexpr bool has_white_space_property(char32_t c) {
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

struct ClassRange {
    char32_t first;
    char32_t last;
    CharClass cls;
};

// Letters and numbers of Unicode 15.1 and 16, for a utf8proc that does not know them yet: Hugging Face's
// regular expressions do, and a character's class decides ids. Sorted.
constexpr ClassRange later_assigned[] = {
    {0x1C89, 0x1C8A, CharClass::letter},   {0xA7CB, 0xA7CD, CharClass::letter},
    {0xA7DA, 0xA7DC, CharClass::letter},   {0x105C0, 0x105F3, CharClass::letter},
    {0x10D40, 0x10D49, CharClass::number}, {0x10D4A, 0x10D65, CharClass::letter},
    {0x10D6F, 0x10D85, CharClass::letter}, {0x10EC2, 0x10EC4, CharClass::letter},
    {0x11380, 0x11389, CharClass::letter}, {0x1138B, 0x1138B, CharClass::letter},
    {0x1138E, 0x1138E, CharClass::letter}, {0x11390, 0x113B5, CharClass::letter},
    {0x113B7, 0x113B7, CharClass::letter}, {0x113D1, 0x113D1, CharClass::letter},
    {0x113D3, 0x113D3, CharClass::letter}, {0x116D0, 0x116E3, CharClass::number},
    {0x11BC0, 0x11BE0, CharClass::letter}, {0x11BF0, 0x11BF9, CharClass::number},
    {0x13460, 0x143FA, CharClass::letter}, {0x16100, 0x1611D, CharClass::letter},
    {0x16130, 0x16139, CharClass::number}, {0x16D40, 0x16D6C, CharClass::letter},
    {0x16D70, 0x16D79, CharClass::number}, {0x18CFF, 0x18CFF, CharClass::letter},
    {0x1CCF0, 0x1CCF9, CharClass::number}, {0x1E5D0, 0x1E5ED, CharClass::letter},
    {0x1E5F0, 0x1E5F0, CharClass::letter}, {0x1E5F1, 0x1E5FA, CharClass::number},
    {0x2EBF0, 0x2EE5D, CharClass::letter}};

// Marks of the same versions. Sorted.
constexpr ClassRange later_marks[] = {
    {0x897, 0x897, CharClass::other},     {0x10D69, 0x10D6D, CharClass::other},
    {0x10EFC, 0x10EFC, CharClass::other}, {0x113B8, 0x113C0, CharClass::other},
    {0x113C2, 0x113C2, CharClass::other}, {0x113C5, 0x113C5, CharClass::other},
    {0x113C7, 0x113CA, CharClass::other}, {0x113CC, 0x113D0, CharClass::other},
    {0x113D2, 0x113D2, CharClass::other}, {0x113E1, 0x113E2, CharClass::other},
    {0x11F5A, 0x11F5A, CharClass::other}, {0x1611E, 0x1612F, CharClass::other},
    {0x1E5EE, 0x1E5EF, CharClass::other}};

template <size_t n>
const ClassRange* find_range(const ClassRange (&ranges)[n], char32_t code) {
    const ClassRange* range = std::lower_bound(ranges, ranges + n, code,
                                               [](const ClassRange& r, char32_t c) { return r.last < c; });
    return range != ranges + n && range->first <= code ? range : nullptr;
}

CharClass class_of_unassigned(char32_t code) {
    const ClassRange* range = find_range(later_assigned, code);
    return range != nullptr ? range->cls : CharClass::other;
}

}  // namespace

CharClass char_class(char32_t code) {
    if (code < 128) return ascii_classes[code];
    switch (category(code)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
            return CharClass::letter;
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_NO:
            return CharClass::number;
        case UTF8PROC_CATEGORY_CN:
            return class_of_unassigned(code);
        default:
            return has_white_space_property(code) ? CharClass::space : CharClass::other;
    }
}

bool is_word_char(char32_t code) {
    switch (category(code)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC:
            return true;
        case UTF8PROC_CATEGORY_CN:
            return find_range(later_assigned, code) != nullptr || find_range(later_marks, code) != nullptr;
        default:
            // Joiners, and the symbols that are Other_Alphabetic: circled and squared Latin letters.
            return code == 0x200C || code == 0x200D || (code >= 0x24B6 && code <= 0x24E9) ||
                   (code >= 0x1F130 && code <= 0x1F149) || (code >= 0x1F150 && code <= 0x1F169) ||
                   (code >= 0x1F170 && code <= 0x1F189);
    }
}

Utf8Step char_before(std::string_view text, size_t begin, size_t end) {
    size_t at = end - 1;
    while (at > begin && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    return decode_utf8(text, at);
}

size_t white_space_before(std::string_view text, size_t begin, size_t end) {
    while (end > begin) {
        const Utf8Step step = char_before(text, begin, end);
        if (!is_white_space(step.code)) break;
        end -= step.bytes;
    }
    return end;
}

size_t white_space_after(std::string_view text, size_t at) {
    while (at < text.size()) {
        const Utf8Step step = decode_utf8(text, at);
        if (!is_white_space(step.code)) break;
        at += step.bytes;
    }
    return at;
}

bool is_valid_utf8(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        const Utf8Step step = decode_utf8(text, at);
        if (!step.valid) return false;
        at += step.bytes;
    }
    return true;
}

std::string replace_invalid_utf8(std::string_view text) {
    std::string out;
    append_valid_utf8(out, text);
    return out;
}

void append_valid_utf8(std::string& out, std::string_view text) {
    size_t kept = 0;  // what lies before it is in `out`
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        if (!step.valid) {
            out.append(text, kept, at - kept);
            append_utf8(out, replacement_character);
            kept = at + step.bytes;
        }
        at += step.bytes;
    }
    out.append(text, kept);
}

CleanText::CleanText(std::string_view original) : original_(original) {
    size_t kept = 0;  // what lies before it is in cleaned_, once there is a repair
    size_t at = 0;
    while (at < original.size()) {
        if (static_cast<unsigned char>(original[at]) < 0x80) {
            ++at;
            continue;
        }
        const Utf8Step step = decode_utf8(original, at);
        if (!step.valid) {
            cleaned_.append(original.substr(kept, at - kept));
            map_.add(cleaned_.size(), at, 1, 3, step.bytes);
            append_utf8(cleaned_, replacement_character);
            kept = at + step.bytes;
        }
        at += step.bytes;
    }
    if (!map_.identity()) cleaned_.append(original.substr(kept));
}

}  // namespace refrag
