// See citations.h.
#include "refrag/citations.h"

#include <algorithm>
#include <set>
#include <unordered_map>

#include "base/utf8.h"
#include "refrag/bm25.h"

namespace refrag {
namespace {

// What the decoder read of a passage: words of stretches of expanded chunks, one stretch after another. An
// empty word stands between stretches, so that no run crosses a gap.
struct ReadPassage {
    size_t passage = 0;
    std::vector<std::string> words;
};

std::vector<ReadPassage> read_passages_of(const Model& model, std::span<const Segment> segments,
                                          const Answer& answer) {
    std::vector<ReadPassage> out;
    size_t at = 0;  // of answer.chunks, which are in the order of the segments
    size_t passage = 0;
    for (size_t s = 0; s < segments.size(); ++s) {
        const auto* segment = std::get_if<PassageSegment>(&segments[s]);
        if (segment == nullptr) continue;
        ReadPassage read{passage++, {}};
        const std::shared_ptr<const CutPassage> cut = segment->passage->cut(model);
        const std::string_view text = cut->text();
        while (at < answer.chunks.size() && answer.chunks[at].segment == s) {
            size_t end = at;
            while (end < answer.chunks.size() && answer.chunks[end].segment == s &&
                   answer.chunks[end].expanded)
                ++end;
            if (end == at) {
                ++at;
                continue;
            }
            const size_t first = answer.chunks[at].begin;
            const size_t last = answer.chunks[end - 1].end;
            if (!read.words.empty()) read.words.emplace_back();
            for (TextWord& word : words_of(text))
                if (word.begin >= first && word.end <= last) read.words.push_back(std::move(word.word));
            at = end;
        }
        if (!read.words.empty()) out.push_back(std::move(read));
    }
    return out;
}

bool says_something(const std::string& word) {
    size_t letters = 0;
    for (size_t at = 0; at < word.size();) {
        const Utf8Step step = decode_utf8(word, at);
        if (step.code >= '0' && step.code <= '9') return true;
        ++letters;
        at += step.bytes;
    }
    return letters >= 4;
}

// Length of the longest run of `answer` words from `from` on that stands in `words`.
size_t longest_run(const std::vector<std::string>& words, const std::vector<std::string>& answer,
                   size_t from) {
    size_t best = 0;
    for (size_t i = 0; i < words.size(); ++i) {
        size_t n = 0;
        while (i + n < words.size() && from + n < answer.size() && words[i + n] == answer[from + n]) ++n;
        best = std::max(best, n);
    }
    return best;
}

}  // namespace

std::vector<Citation> find_citations(const Model& model, std::span<const Segment> segments,
                                     const Answer& answer) {
    const std::vector<ReadPassage> passages = read_passages_of(model, segments, answer);
    const std::vector<TextWord> found = words_of(answer.text);
    std::vector<std::string> words;
    words.reserve(found.size());
    for (const TextWord& word : found) words.push_back(word.word);
    std::unordered_map<std::string, size_t> n_with;  // passages that have a word
    for (const ReadPassage& passage : passages)
        for (const std::string& word : std::set<std::string>(passage.words.begin(), passage.words.end()))
            ++n_with[word];
    std::vector<Citation> citations;
    for (size_t i = 0; i < words.size();) {
        size_t n = 0;
        std::vector<size_t> of;
        for (const ReadPassage& passage : passages) {
            const size_t run = longest_run(passage.words, words, i);
            if (run > n) of.clear();
            if (run >= n && run > 0) of.push_back(passage.passage);
            n = std::max(n, run);
        }
        const bool rare = n_with[words[i]] * 2 <= std::max<size_t>(passages.size(), 2);
        const bool says = std::any_of(words.begin() + static_cast<std::ptrdiff_t>(i),
                                      words.begin() + static_cast<std::ptrdiff_t>(i + n), says_something);
        if (!says || (n == 1 && !rare)) {
            ++i;
            continue;
        }
        citations.push_back({found[i].begin, found[i + n - 1].end, std::move(of)});
        i += n;
    }
    return citations;
}

std::pair<size_t, size_t> in_characters(std::string_view text, size_t begin, size_t end) {
    std::pair<size_t, size_t> out{0, 0};
    for (size_t at = 0; at < std::min(end, text.size());) {
        if (at < begin) ++out.first;
        ++out.second;
        at += decode_utf8(text, at).bytes;
    }
    return out;
}

}  // namespace refrag
