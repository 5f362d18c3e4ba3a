// Which chunks a question's words point to: Okapi BM25 (Robertson and Zaragoza 2009) over the chunks of one
// request, in the form of Lucene. No index and no training: the collection is what the request brings, so a
// word is rare or common among these chunks.
//
//     score(chunk) = sum over the question's words w, each as often as the question has it, of
//         idf(w) * tf / (tf + k1 * (1 - b + b * words of the chunk / mean words of a chunk))
//     idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5))
//
// with tf the times that w stands in the chunk, n the chunks that have it, N all chunks, k1 = 1.2, b = 0.75.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

inline constexpr double bm25_k1 = 1.2;
inline constexpr double bm25_b = 0.75;

struct TextWord {
    std::string word;  // in lower case
    size_t begin = 0;  // byte span in the text
    size_t end = 0;
};

// The words of a text: longest runs of letters (\p{L}) and numbers (\p{N}), in lower case. Any bytes are
// accepted; what is not UTF-8 ends a word.
std::vector<TextWord> words_of(std::string_view text);

// A passage's text, with where its chunks end. The chunks tile the text, so the last end is its size.
struct ChunkedText {
    std::string_view text;
    std::vector<size_t> chunk_ends;  // [n_chunks] byte positions, rising; may repeat
};

// One score a chunk, over all texts in order, 0 where no word of the question stands in it. Words are those
// of the whole text, so a chunk's border cuts none: a word belongs to the chunk where its first byte lies.
std::vector<float> bm25_scores(std::span<const ChunkedText> texts, std::string_view question);

}  // namespace refrag
