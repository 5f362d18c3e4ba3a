// Long documents into passages: at paragraph borders, each as long as it may be, with its place remembered.
//
//   paragraphs are runs of lines that are not blank; as many as fit make a passage
//   a paragraph that is too long ends at a sentence's end, else at white space, else between tokens
//   Markdown: a heading begins a passage, and the headings above a passage stand in its title
//
// A text that fits is one passage, whole and unchanged.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace refrag {

// Its number is part of a document's hash: another way of cutting indexes anew.
inline constexpr int kCutterVersion = 1;

struct CutSpan {
    size_t begin = 0;  // byte span in the text
    size_t end = 0;
    std::string heading;  // "Rivers - The Urvik": those above it; "" without
};

// `tokens`: the whole text's, whose spans tile it. max_tokens >= 1. Blank lines around a passage belong to
// none. A text without anything but blanks gives none.
std::vector<CutSpan> cut_document(std::string_view text, std::span<const Token> tokens, int64_t max_tokens,
                                  bool markdown);

}  // namespace refrag
