// The regular expressions of tokenizer files, by name, as hand-written scanners instead of a
// regular-expression engine: no backtracking beyond one run, linear time, no recursion. Only patterns that
// cover every text are here: their matches tile it.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace refrag {

enum class WordPattern {
    // '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+: GPT-2, RoBERTa
    gpt2,
    // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
    // \s+(?!\S)|\s+: cl100k, LLaMA 3, OLMo 2
    cl100k,
    qwen2,  // the same with \p{N} for \p{N}{1,3}
};

// The pattern that a file's regular expression stands for; none where it is not known.
std::optional<WordPattern> word_pattern_of(std::string_view regex);
// The known expressions in a few words, for messages.
std::string_view known_word_patterns();

// The end of the word that begins at text[begin]; needs valid UTF-8 and begin < text.size().
size_t word_end(WordPattern pattern, std::string_view text, size_t begin);

}  // namespace refrag
