// How an answer is judged: exact match and token F1 by SQuAD's definitions (Rajpurkar et al. 2016, 2018), to
// the letter of its evaluation script for 2.0, Python's notions of lower case, word and white space included;
// and ROUGE-L (Lin 2004), as summaries are judged by.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

// The tokens that are compared: the text in lower case, without ASCII punctuation, without the words "a",
// "an" and "the", split at white space.
std::vector<std::string> answer_tokens(std::string_view text);

// The tokens that ROUGE compares, those of the Python package rouge_score without stemming: the text in lower
// case, split at every run of characters that are neither a-z nor 0-9.
std::vector<std::string> rouge_tokens(std::string_view text);

// ROUGE-L of one reference (Lin 2004, section 3.1). L is the length of the longest common subsequence of both
// texts' tokens; each text is one sequence, whatever its sentences. P = L / tokens of the prediction, R = L /
// tokens of the reference; the score is their F-measure with beta = 1. 0 where either text has no token.
double rouge_l(std::span<const std::string> prediction, std::span<const std::string> reference);

struct QaScore {
    double exact_match = 0.0;  // 0 or 1
    double f1 = 0.0;           // 0 to 1
    double rouge_l = 0.0;      // 0 to 1
};

// The best exact match, the best F1 and the best ROUGE-L over the gold answers, each taken by itself. A gold
// answer that is not blank but of which normalisation leaves nothing ("A") is compared as it stands, in lower
// case; here SQuAD's script takes silence for right. Blank gold answers are left out; where no other is there
// the question counts as unanswerable, and its gold answer is the empty string: by SQuAD 2.0's rule a
// prediction of which nothing remains is right, and ROUGE-L is the exact match there. Where prediction or
// gold answer has no tokens, F1 is 1 if neither has any and 0 otherwise. `no_answer` is how a model says that
// there is no answer: a prediction or gold answer with the same tokens counts as the empty one.
QaScore score_answer(std::string_view prediction, std::span<const std::string> gold,
                     std::string_view no_answer = {});

}  // namespace refrag
