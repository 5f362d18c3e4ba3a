// The ways to cut at a delimiter.
#include "text/pre_tokenizer.h"

#include <algorithm>

#include "text/unicode.h"

namespace refrag {

namespace {

// Digits asks Rust's tables, which already know the numbers of Unicode 17; regular expressions do not.
bool is_digit(char32_t code) {
    return is_number(code) || (code >= 0x11DE0 && code <= 0x11DE9) || (code >= 0x16FF4 && code <= 0x16FF6);
}

}  // namespace

// The end of the match that begins at `at`; `at` itself where there is none.
size_t Split::match_end(std::string_view text, size_t at) const {
    if (at >= text.size()) return at;
    if (target == Target::literal) return text.substr(at).starts_with(literal) ? at + literal.size() : at;
    const Utf8Step step = decode_utf8(text, at);
    return is_digit(step.code) ? at + step.bytes : at;
}

// Where the first match at or after `at` begins; the end of the text where there is none.
size_t Split::find(std::string_view text, size_t at) const {
    if (target == Target::literal) return std::min(text.find(literal, at), text.size());
    while (at < text.size()) {
        const Utf8Step step = decode_utf8(text, at);
        if (is_digit(step.code)) break;
        at += step.bytes;
    }
    return at;
}

size_t Split::other_end(std::string_view text, size_t begin, bool& removed) const {
    size_t end = match_end(text, begin);
    if (end == begin) {
        end = find(text, begin);
        return behaviour == Behaviour::merged_with_previous ? match_end(text, end) : end;
    }
    if (behaviour == Behaviour::removed) removed = true;
    if (behaviour == Behaviour::contiguous)
        for (size_t next = match_end(text, end); next != end; next = match_end(text, end)) end = next;
    if (behaviour == Behaviour::merged_with_next && match_end(text, end) == end) end = find(text, end);
    return end;
}

}  // namespace refrag
