// The GPT-2 pattern as a scanner. Its alternatives are tried in the pattern's order; each needs to look at
// one character to decide whether it matches.
#include "text/pre_tokenizer.h"

#include "text/unicode.h"

namespace refrag {

namespace {

struct Char {
    CharClass cls;
    size_t end;  // where the next character begins
};

Char char_at(std::string_view text, size_t at) {
    const auto byte = static_cast<unsigned char>(text[at]);
    if (byte < 0x80) return {char_class(byte), at + 1};
    const Utf8Step step = decode_utf8(text, at);
    return {char_class(step.code), at + step.bytes};
}

// The end of the run of one class that begins at `at`.
size_t run_end(std::string_view text, size_t at, CharClass cls) {
    while (at < text.size()) {
        const Char next = char_at(text, at);
        if (next.cls != cls) break;
        at = next.end;
    }
    return at;
}

// The length of 's 't 'm 'd 'll 've 're at `at`, 0 where there is none.
size_t contraction(std::string_view text, size_t at) {
    const std::string_view rest = text.substr(at, 3);
    if (rest.size() < 2 || rest[0] != '\'') return 0;
    if (rest[1] == 's' || rest[1] == 't' || rest[1] == 'm' || rest[1] == 'd') return 2;
    return rest == "'ll" || rest == "'ve" || rest == "'re" ? 3 : 0;
}

size_t gpt2_word_end(std::string_view text, size_t begin) {
    if (const size_t length = contraction(text, begin); length > 0) return begin + length;

    // " ?\p{L}+" and its two siblings: one space may lead a run of any other class.
    const Char first = char_at(text, begin);
    if (first.cls != CharClass::space) return run_end(text, first.end, first.cls);
    if (text[begin] == ' ' && first.end < text.size()) {
        const Char second = char_at(text, first.end);
        if (second.cls != CharClass::space) return run_end(text, second.end, second.cls);
    }

    // "\s+(?!\S)": a run of white space leaves its last character to the word that follows; "\s+" takes it
    // where it is the only one, or where nothing follows.
    size_t last = begin;
    size_t end = first.end;
    while (end < text.size()) {
        const Char next = char_at(text, end);
        if (next.cls != CharClass::space) return last > begin ? last : end;
        last = end;
        end = next.end;
    }
    return end;
}

}  // namespace

size_t word_end(WordPattern pattern, std::string_view text, size_t begin) {
    return pattern == WordPattern::gpt2 ? gpt2_word_end(text, begin) : text.size();
}

}  // namespace refrag
