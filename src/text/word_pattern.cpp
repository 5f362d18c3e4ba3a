// The scanners. The alternatives of a pattern are tried in its order; each needs to look at one or two
// characters to decide whether it matches.
#include "text/word_pattern.h"

#include <utility>

#include "text/unicode.h"

namespace refrag {

namespace {

struct Char {
    CharClass cls;
    size_t end;  // where the next character begins
};

Char char_at(std::string_view text, size_t at) {
    const auto byte = static_cast<unsigned char>(text[at]);
    if (byte < 0x80) return {ascii_classes[byte], at + 1};
    const Utf8Step step = decode_utf8(text, at);
    return {char_class(step.code), at + step.bytes};
}

bool is_newline(char c) {
    return c == '\n' || c == '\r';
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

size_t newlines_end(std::string_view text, size_t at) {
    while (at < text.size() && is_newline(text[at])) ++at;
    return at;
}

// The length of 's 't 'm 'd 'll 've 're at `at`, 0 where there is none.
size_t contraction(std::string_view text, size_t at) {
    const std::string_view rest = text.substr(at, 3);
    if (rest.size() < 2 || rest[0] != '\'') return 0;
    if (rest[1] == 's' || rest[1] == 't' || rest[1] == 'm' || rest[1] == 'd') return 2;
    return rest == "'ll" || rest == "'ve" || rest == "'re" ? 3 : 0;
}

// The same under (?i:). Of the characters beyond ASCII only U+017F, the long s, folds into one of these
// letters.
size_t contraction_of_any_case(std::string_view text, size_t at) {
    const std::string_view rest = text.substr(at, 3);
    if (rest.size() < 2 || rest[0] != '\'') return 0;
    if (rest == "'\xC5\xBF") return 3;
    const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; };
    const char first = lower(rest[1]);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if (rest.size() < 3) return 0;
    const char second = lower(rest[2]);
    const bool found =
        (first == 'l' && second == 'l') || (first == 'v' && second == 'e') || (first == 'r' && second == 'e');
    return found ? 3 : 0;
}

// "\s+(?!\S)|\s+" for the run of white space that begins at `begin`: it leaves its last character to the word
// that follows, unless that is its only one or nothing follows. With `newlines` "\s*[\r\n]+" comes first: up
// to the run's last line break.
size_t white_space_end(std::string_view text, size_t begin, bool newlines) {
    size_t last = begin;
    size_t at = begin;
    size_t line_end = begin;
    while (at < text.size()) {
        const Char next = char_at(text, at);
        if (next.cls != CharClass::space) break;
        if (is_newline(text[at])) line_end = next.end;
        last = at;
        at = next.end;
    }
    if (newlines && line_end > begin) return line_end;
    return at == text.size() || last == begin ? at : last;
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
    return white_space_end(text, begin, false);
}

size_t cl100k_word_end(std::string_view text, size_t begin, int max_digits) {
    if (const size_t length = contraction_of_any_case(text, begin); length > 0) return begin + length;

    const Char first = char_at(text, begin);
    if (first.cls == CharClass::letter) return run_end(text, first.end, CharClass::letter);
    if (first.cls == CharClass::number) {
        size_t end = first.end;
        for (int n = 1; n < max_digits && end < text.size(); ++n) {
            const Char next = char_at(text, end);
            if (next.cls != CharClass::number) break;
            end = next.end;
        }
        return end;
    }
    // "[^\r\n\p{L}\p{N}]?\p{L}+": any character but those may lead letters; a space may also lead a run of
    // neither letters, numbers nor white space, which takes the line breaks after it along.
    if (first.end < text.size() && !is_newline(text[begin])) {
        const Char second = char_at(text, first.end);
        if (second.cls == CharClass::letter) return run_end(text, second.end, CharClass::letter);
        if (text[begin] == ' ' && second.cls == CharClass::other)
            return newlines_end(text, run_end(text, second.end, CharClass::other));
    }
    if (first.cls == CharClass::other) return newlines_end(text, run_end(text, first.end, CharClass::other));
    return white_space_end(text, begin, true);
}

#define REFRAG_CL100K(digits)                                            \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

// The possessive forms (as tiktoken writes cl100k) match the same: nothing after a quantifier ever needs what
// it took.
constexpr std::pair<std::string_view, WordPattern> spellings[] = {
    {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", WordPattern::gpt2},
    {"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", WordPattern::gpt2},
    {REFRAG_CL100K("\\p{N}{1,3}"), WordPattern::cl100k},
    {"'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|"
     "\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
     WordPattern::cl100k},
    {REFRAG_CL100K("\\p{N}"), WordPattern::qwen2},
};

#undef REFRAG_CL100K

}  // namespace

std::optional<WordPattern> word_pattern_of(std::string_view regex) {
    for (const auto& [spelling, pattern] : spellings)
        if (spelling == regex) return pattern;
    return std::nullopt;
}

std::string_view known_word_patterns() {
    return "the pattern of GPT-2, cl100k (LLaMA 3, OLMo 2) or Qwen 2";
}

size_t word_end(WordPattern pattern, std::string_view text, size_t begin) {
    switch (pattern) {
        case WordPattern::gpt2:
            return gpt2_word_end(text, begin);
        case WordPattern::cl100k:
            return cl100k_word_end(text, begin, 3);
        case WordPattern::qwen2:
            return cl100k_word_end(text, begin, 1);
    }
    return text.size();
}

}  // namespace refrag
