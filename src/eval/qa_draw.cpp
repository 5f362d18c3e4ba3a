// See qa_draw.h.
#include "eval/qa_draw.h"

#include <algorithm>
#include <unordered_map>

#include "base/check.h"
#include "io/file.h"
#include "refrag/random.h"
#include "refrag/select.h"

namespace refrag {
namespace {

// A generator for one question and one purpose, so that what is drawn for one says nothing about another.
Random generator(uint64_t seed, size_t question, uint64_t purpose) {
    const uint64_t mixed = Random(seed).next() ^ question;
    return Random(Random(mixed).next() ^ purpose);
}

}  // namespace

std::vector<size_t> draw_questions(const QaData& data, size_t limit, uint64_t seed) {
    std::vector<size_t> firsts;
    for (size_t i = 0; i < data.questions.size(); ++i) {
        if (data.questions[i].turn == 1) firsts.push_back(i);
    }
    const size_t n = limit == 0 ? firsts.size() : std::min(limit, firsts.size());
    const std::vector<bool> chosen = select_random(std::ssize(firsts), static_cast<int64_t>(n), seed);
    std::vector<size_t> questions;
    for (size_t i = 0; i < chosen.size(); ++i) {
        if (chosen[i]) questions.push_back(firsts[i]);
    }
    return questions;
}

std::vector<size_t> draw_distractors(const QaData& data, size_t question, size_t n, uint64_t seed) {
    const size_t gold = data.questions[question].passage;
    const size_t article = data.article[gold];
    const size_t own_first = data.article_first[article];
    const size_t own = data.article_size(article);
    const size_t others = data.passages.size() - own;
    REFRAG_CHECK(n <= others, Status::usage, "distractors: expected at most ", others,
                 " (the passages of other articles than question ",
                 printable(data.questions[question].id, 60), "'s), found ", n);
    // The first n places of a Fisher-Yates shuffle, of which only what has moved is kept.
    Random random = generator(seed, question, 1);
    std::unordered_map<size_t, size_t> moved;
    const auto at = [&](size_t place) {
        const auto found = moved.find(place);
        return found == moved.end() ? place : found->second;
    };
    std::vector<size_t> drawn;
    for (size_t i = 0; i < n; ++i) {
        const size_t pick = i + static_cast<size_t>(random.below(others - i));
        const size_t place = at(pick);
        moved[pick] = at(i);
        drawn.push_back(data.by_article[place < own_first ? place : place + own]);
    }
    return drawn;
}

std::vector<size_t> place_gold(const QaData& data, size_t question, const std::vector<size_t>& distractors,
                               size_t n, uint64_t seed) {
    REFRAG_DCHECK(n <= distractors.size());
    std::vector<size_t> passages(distractors.begin(), distractors.begin() + static_cast<std::ptrdiff_t>(n));
    Random random = generator(seed, question, 2 + n);
    const auto place = static_cast<std::ptrdiff_t>(random.below(n + 1));
    passages.insert(passages.begin() + place, data.questions[question].passage);
    return passages;
}

}  // namespace refrag
