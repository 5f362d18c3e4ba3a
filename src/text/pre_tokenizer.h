// Cuts text into the words that BPE works on, by hand-written scanners instead of a regular-expression
// engine: no backtracking beyond one character, linear time, no recursion.
#pragma once

#include <cstddef>
#include <string_view>

namespace refrag {

// How a segment is cut. Words tile the segment.
enum class WordPattern {
    whole,  // one word
    gpt2,   // '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
};

// The end of the word that begins at text[begin]; needs valid UTF-8 and begin < text.size().
size_t word_end(WordPattern pattern, std::string_view text, size_t begin);

}  // namespace refrag
