// See bm25.h.
#include "refrag/bm25.h"

#include <cmath>
#include <unordered_map>

#include "base/utf8.h"
#include "text/lowercase.h"
#include "text/unicode.h"

namespace refrag {
namespace {

struct Posting {
    size_t chunk;
    double tf;  // how often the word stands in it
};

// A word of the question.
struct QueryWord {
    double in_question = 0.0;       // how often
    std::vector<Posting> postings;  // of the chunks that have it, rising
};

}  // namespace

std::vector<TextWord> words_of(std::string_view text) {
    std::vector<TextWord> words;
    size_t begin = 0;
    bool inside = false;
    const auto end_word = [&](size_t end) {
        if (inside) words.push_back({lowercase(text.substr(begin, end - begin)), begin, end});
        inside = false;
    };
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        const CharClass kind = char_class(step.code);
        if (kind != CharClass::letter && kind != CharClass::number) {
            end_word(at);
        } else if (!inside) {
            begin = at;
            inside = true;
        }
        at += step.bytes;
    }
    end_word(text.size());
    return words;
}

std::vector<float> bm25_scores(std::span<const ChunkedText> texts, std::string_view question) {
    size_t n_chunks = 0;
    for (const ChunkedText& text : texts) n_chunks += text.chunk_ends.size();

    std::unordered_map<std::string, size_t> known;
    std::vector<QueryWord> query;  // in the question's order, which is the order of the sums
    for (TextWord& word : words_of(question)) {
        const auto [place, is_new] = known.try_emplace(std::move(word.word), query.size());
        if (is_new) query.emplace_back();
        query[place->second].in_question += 1.0;
    }

    std::vector<double> n_words(n_chunks, 0.0);
    double all_words = 0.0;
    size_t first = 0;  // of the text's chunks
    for (const ChunkedText& text : texts) {
        size_t chunk = 0;
        for (const TextWord& word : words_of(text.text)) {
            while (chunk < text.chunk_ends.size() && text.chunk_ends[chunk] <= word.begin) ++chunk;
            if (chunk == text.chunk_ends.size()) break;
            n_words[first + chunk] += 1.0;
            all_words += 1.0;
            const auto found = known.find(word.word);
            if (found == known.end()) continue;
            std::vector<Posting>& postings = query[found->second].postings;
            if (postings.empty() || postings.back().chunk != first + chunk)
                postings.push_back({first + chunk, 0.0});
            postings.back().tf += 1.0;
        }
        first += text.chunk_ends.size();
    }

    std::vector<double> scores(n_chunks, 0.0);
    const auto n_all = static_cast<double>(n_chunks);
    for (const QueryWord& word : query) {
        const auto n_with = static_cast<double>(word.postings.size());
        const double idf = std::log(1.0 + (n_all - n_with + 0.5) / (n_with + 0.5));
        for (const auto& [chunk, tf] : word.postings) {  // a chunk with a word makes all_words > 0
            const double length = n_words[chunk] * n_all / all_words;
            scores[chunk] += word.in_question * idf * tf / (tf + bm25_k1 * (1.0 - bm25_b + bm25_b * length));
        }
    }
    return {scores.begin(), scores.end()};
}

}  // namespace refrag
