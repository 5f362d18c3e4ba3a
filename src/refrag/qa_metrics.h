// How an answer is judged: exact match and token F1 by SQuAD's definitions (Rajpurkar et al. 2016, 2018), to
// the letter of its evaluation script for 2.0, Python's notions of lower case, word and white space included.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

// The tokens that are compared: the text in lower case, without ASCII punctuation, without the words "a",
// "an" and "the", split at white space.
std::vector<std::string> answer_tokens(std::string_view text);

struct QaScore {
    double exact_match = 0.0;  // 0 or 1
    double f1 = 0.0;           // 0 to 1
};

// The best exact match and the best F1 over the gold answers, each taken by itself. Gold answers of which
// nothing remains are left out; where none remains the question counts as unanswerable, and its gold answer
// is the empty string. Where prediction or gold answer has no tokens, F1 is 1 if neither has any and 0
// otherwise.
QaScore score_answer(std::string_view prediction, std::span<const std::string> gold);

}  // namespace refrag
