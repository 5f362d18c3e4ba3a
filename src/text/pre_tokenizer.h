// Cuts text into the words that BPE works on. A pre-tokenizer is a list of steps; this is one step that only
// cuts (steps that also change the text are in rewrite.h).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "text/word_pattern.h"

namespace refrag {

// A step of Hugging Face's Split kind: what is looked for, and what becomes of it.
struct Split {
    enum class Target {
        words,    // `pattern`, whose matches tile the text
        literal,  // every occurrence of `literal`
        digit,    // every character that Rust calls numeric: \p{N}, and that of Unicode 17
    };
    enum class Behaviour { isolated, removed, merged_with_previous, merged_with_next, contiguous };

    Target target = Target::words;
    WordPattern pattern = WordPattern::gpt2;
    std::string literal;  // not empty
    Behaviour behaviour = Behaviour::isolated;

    // The end of the piece that begins at text[begin]; `removed` says whether it is left out. Needs valid
    // UTF-8 and begin < text.size(). A walk over a text takes linear time.
    size_t piece_end(std::string_view text, size_t begin, bool& removed) const {
        removed = false;
        return target == Target::words ? word_end(pattern, text, begin) : other_end(text, begin, removed);
    }

  private:
    size_t other_end(std::string_view text, size_t begin, bool& removed) const;
    size_t match_end(std::string_view text, size_t at) const;
    size_t find(std::string_view text, size_t at) const;
};

}  // namespace refrag
