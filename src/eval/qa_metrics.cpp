// See qa_metrics.h.
#include "eval/qa_metrics.h"

#include <algorithm>

#include "text/lowercase.h"
#include "text/unicode.h"

namespace refrag {
namespace {

// Python's string.punctuation.
bool is_ascii_punctuation(char c) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
}

// Python's str.split() also splits at four control characters that are not White_Space.
bool splits(char32_t code) {
    return is_white_space(code) || (code >= 0x1C && code <= 0x1F);
}

// Python's \w; "_" is gone with the punctuation.
bool is_in_word(char32_t code) {
    return is_letter(code) || is_number(code);
}

bool is_article(std::string_view word) {
    return word == "a" || word == "an" || word == "the";
}

// `a` and `b` sorted; tokens that both have, each as often as both have it.
size_t n_common(const std::vector<std::string>& a, const std::vector<std::string>& b) {
    size_t common = 0;
    for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
        const int order = a[i].compare(b[j]);
        if (order == 0) ++common;
        if (order <= 0) ++i;
        if (order >= 0) ++j;
    }
    return common;
}

double token_f1(const std::vector<std::string>& prediction, const std::vector<std::string>& gold) {
    if (prediction.empty() || gold.empty()) return prediction.empty() && gold.empty() ? 1.0 : 0.0;
    const auto common = static_cast<double>(n_common(prediction, gold));
    return 2.0 * common / static_cast<double>(prediction.size() + gold.size());
}

// A text of which normalisation leaves nothing, as it stands: in lower case, without white space around it.
std::string as_it_stands(std::string_view text) {
    const std::string lower = lowercase(text);
    size_t begin = lower.size(), end = 0;
    for (size_t at = 0; at < lower.size();) {
        const Utf8Step step = decode_utf8(lower, at);
        if (!splits(step.code)) {
            begin = std::min(begin, at);
            end = at + step.bytes;
        }
        at += step.bytes;
    }
    return begin < end ? lower.substr(begin, end - begin) : std::string();
}

}  // namespace

std::vector<std::string> answer_tokens(std::string_view text) {
    std::string plain = lowercase(text);
    std::erase_if(plain, is_ascii_punctuation);
    // A token is what lies between white space. A word, which may be an article, ends at any character that
    // is not a letter or number. An article leaves a gap behind: "x–a–y" becomes "x–" and "–y".
    std::vector<std::string> tokens;
    std::string token;
    size_t word = 0;  // where the current word begins in `token`
    const auto end_word = [&] {
        if (!is_article(std::string_view(token).substr(word))) return;
        token.resize(word);
        if (!token.empty()) tokens.push_back(std::move(token));
        token.clear();
    };
    const auto end_token = [&] {
        end_word();
        if (!token.empty()) tokens.push_back(std::move(token));
        token.clear();
        word = 0;
    };
    for (size_t at = 0; at < plain.size();) {
        const Utf8Step step = decode_utf8(plain, at);
        if (splits(step.code)) {
            end_token();
        } else if (is_in_word(step.code)) {
            token.append(plain, at, step.bytes);
        } else {
            end_word();
            token.append(plain, at, step.bytes);
            word = token.size();
        }
        at += step.bytes;
    }
    end_token();
    return tokens;
}

std::vector<std::string> rouge_tokens(std::string_view text) {
    std::vector<std::string> tokens;
    std::string token;
    const auto end_token = [&] {
        if (!token.empty()) tokens.push_back(std::move(token));
        token.clear();
    };
    // Bytes do for characters: every byte of one outside ASCII is outside both ranges.
    for (const char c : lowercase(text)) {
        if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9')) {
            token.push_back(c);
        } else {
            end_token();
        }
    }
    end_token();
    return tokens;
}

double rouge_l(std::span<const std::string> prediction, std::span<const std::string> reference) {
    if (prediction.empty() || reference.empty()) return 0.0;
    // One row of the table of prefixes' longest common subsequences: length[j] for `reference` up to j and
    // `prediction` up to the token at hand.
    std::vector<size_t> length(reference.size() + 1, 0);
    for (const std::string& token : prediction) {
        size_t diagonal = 0;  // length[j - 1] before this token
        for (size_t j = 1; j <= reference.size(); ++j) {
            const size_t above = length[j];
            length[j] = token == reference[j - 1] ? diagonal + 1 : std::max(above, length[j - 1]);
            diagonal = above;
        }
    }
    // 2PR / (P + R)
    return 2.0 * static_cast<double>(length.back()) /
           static_cast<double>(prediction.size() + reference.size());
}

QaScore score_answer(std::string_view prediction, std::span<const std::string> gold,
                     std::string_view no_answer) {
    const std::vector<std::string> silence = answer_tokens(no_answer);
    std::vector<std::string> said = answer_tokens(prediction);
    std::vector<std::string> said_words = rouge_tokens(prediction);
    if (!silence.empty() && said == silence) {
        said.clear();
        said_words.clear();
    }
    std::vector<std::string> said_sorted = said;
    std::sort(said_sorted.begin(), said_sorted.end());
    QaScore best;
    const auto compare = [&](std::vector<std::string> tokens) {
        best.exact_match = std::max(best.exact_match, tokens == said ? 1.0 : 0.0);
        std::sort(tokens.begin(), tokens.end());
        best.f1 = std::max(best.f1, token_f1(said_sorted, tokens));
    };
    bool answerable = false;
    for (const std::string& text : gold) {
        std::vector<std::string> tokens = answer_tokens(text);
        if (tokens.empty()) {
            // "A", "the": an answer all the same, and no silence equals it.
            const std::string whole = as_it_stands(text);
            if (whole.empty()) continue;
            answerable = true;
            const double same = whole == as_it_stands(prediction) ? 1.0 : 0.0;
            best.exact_match = std::max(best.exact_match, same);
            best.f1 = std::max(best.f1, same);
            best.rouge_l = std::max({best.rouge_l, same, rouge_l(said_words, rouge_tokens(text))});
            continue;
        }
        if (tokens == silence) continue;
        answerable = true;
        compare(std::move(tokens));
        best.rouge_l = std::max(best.rouge_l, rouge_l(said_words, rouge_tokens(text)));
    }
    if (!answerable) {
        compare({});
        best.rouge_l = best.exact_match;
    }
    return best;
}

}  // namespace refrag
